"""The head and the choice of a token: logits against float64, choices against the distribution and by chi-square."""

import pytest
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.head_sample import head_sample, reference
from tests.kernels.gpu_cases import in_dtypes

EPS = 1e-6


def case(rows, hidden, vocab, num_ids, temperatures=(1.0,), dtype=torch.float32, device="cpu", spread=2.0):
    """Rows take the temperatures in turn, 0 for greedy."""
    g = torch.Generator().manual_seed(0)
    x, norm = torch.randn(rows, hidden, generator=g), 1 + 0.3 * torch.randn(hidden, generator=g)
    head = torch.randn(vocab, hidden, generator=g) * spread / hidden**0.5
    temperature = torch.tensor(temperatures)[torch.arange(rows) % len(temperatures)]
    inverse = torch.where(temperature == 0, 0.0, 1 / temperature.clamp(min=1e-3))
    uniform = torch.rand(rows, generator=g)
    x, norm, head = (y.to(device, dtype) for y in (x, norm, head))
    return x, norm, EPS, head, num_ids, inverse.to(device), uniform.to(device)


def exact_logits(x, norm, eps, head, *_):
    return F.rms_norm(x.double(), x.shape[-1:], norm.double(), eps) @ head.double().t()


def distribution(logits, num_ids, inverse):
    """log-probs [B, num_ids] in float64 of what each row is drawn from; greedy rows at temperature 1."""
    scale = torch.where(inverse == 0, 1.0, inverse).double()[:, None]
    return (logits[:, :num_ids].double() * scale).log_softmax(-1)


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check(arguments, out, tolerance):
    """Check the logits and, given these, each row's choice and its log-prob.

    The uniform number must lie in the drawn id's part of the cumulative distribution, to 1e-5 (float32 sums of a whole
    vocabulary).
    """
    num_ids, inverse, uniform = arguments[4:]
    ids, logprob, logits, finite = out
    assert distance(logits, exact_logits(*arguments)) < tolerance
    assert finite.all()
    logs = distribution(logits, num_ids, inverse)
    torch.testing.assert_close(logprob.double(), logs.gather(1, ids[:, None])[:, 0], rtol=0, atol=2e-5)
    greedy = inverse == 0
    assert torch.equal(ids[greedy], logits[greedy, :num_ids].argmax(-1))
    ends = logs.exp().cumsum(-1)
    end = ends.gather(1, ids[:, None])[:, 0]
    start = end - logs.exp().gather(1, ids[:, None])[:, 0]
    assert ((start - 1e-5 <= uniform) & (uniform <= end + 1e-5))[~greedy].all()


# rows, hidden, vocabulary, ids. The ids end in a tile, at its end, or tiles before the last; each form of the product
SHAPES = [(1, 40, 90, 83), (1, 16, 30, 30), (5, 300, 203, 96), (34, 64, 260, 33), (66, 32, 150, 128)]


@pytest.mark.parametrize("sizes", SHAPES)
def test_interpreted(sizes):
    """1e-6: float32 sums."""
    arguments = case(*sizes, temperatures=(0.7, 0.0, 1.0, 1.6))
    with backend.interpreted():
        check(arguments, head_sample(*arguments), 1e-6)


@pytest.mark.parametrize("sizes", SHAPES)
def test_without_a_norm_interpreted(sizes):
    """Rows normed before give what the kernel gives that norms them, to 1e-6: another order of float32 sums."""
    x, norm, eps, *rest = case(*sizes, temperatures=(0.7, 0.0, 1.0, 1.6))
    normed = F.rms_norm(x.double(), x.shape[-1:], norm.double(), eps).float()
    with backend.interpreted():
        out, expected = head_sample(normed, None, eps, *rest), head_sample(x, norm, eps, *rest)
    assert torch.equal(out[0], expected[0])
    torch.testing.assert_close(out[1], expected[1], rtol=0, atol=1e-5)
    assert distance(out[2], expected[2]) < 1e-6
    assert torch.equal(head_sample(normed, None, eps, *rest)[0], expected[0])  # the formula


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("how", ["formula", "interpreted"])
def test_ids_that_are_not_allowed(sizes, how):
    """They are never drawn, and what is drawn is as if their logits were −∞. The best id of row 0 is one of them, all
    ids of a tile, and one whose logit is not finite."""
    x, norm, eps, head, num_ids, inverse, uniform = case(*sizes, temperatures=(0.0, 0.7, 1.0, 1.6))
    best = exact_logits(x, norm, eps, head)[0, :num_ids].argmax()
    allowed = torch.arange(len(head)) % 5 != 2
    allowed[:17] = allowed[best] = False
    head[3] = float("nan")
    allowed[num_ids - 1] = best != num_ids - 1
    uniform[0] = 0.0
    with backend.interpreted() if how == "interpreted" else torch.no_grad():
        ids, logprob, logits, finite = head_sample(x, norm, eps, head, num_ids, inverse, uniform, allowed)
    assert finite.all()
    assert allowed[ids].all()
    logits = logits.masked_fill(~allowed, float("-inf"))
    logs = distribution(logits, num_ids, inverse)
    torch.testing.assert_close(logprob.double(), logs.gather(1, ids[:, None])[:, 0], rtol=0, atol=2e-5)
    assert torch.equal(ids[inverse == 0], logits[inverse == 0, :num_ids].argmax(-1))
    ends = logs.exp().cumsum(-1).gather(1, ids[:, None])[:, 0]
    inside = (ends - logs.exp().gather(1, ids[:, None])[:, 0] - 1e-5 <= uniform) & (uniform <= ends + 1e-5)
    assert inside[inverse != 0].all()


def test_float16_interpreted():
    """The logits are not rounded to float16. Their error comes from the norm's two roundings, 2e-4 each."""
    arguments = case(*SHAPES[2], dtype=torch.float16)
    with backend.interpreted():
        check(arguments, head_sample(*arguments), 4e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_formula(dtype, tolerance):
    arguments = case(12, 24, 50, 41, (0.7, 0.0, 1.0), dtype)
    out = head_sample(*arguments)
    check(arguments, out, tolerance)
    assert out[1].dtype == out[2].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def chi_square(ids, probs):
    """(statistic, degrees of freedom) of drawn ids; ids expected less than 8 times count as one."""
    expected = probs * len(ids)
    counts = torch.bincount(ids, minlength=len(probs)).double()
    rare = expected < 8
    if rare.any():
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    return ((counts - expected).square() / expected.clamp(min=1e-9)).sum().item(), len(expected) - 1


def assert_follows(ids, probs):
    """Chi-square is at most five standard deviations above its mean, and above that for the reversed distribution."""
    statistic, freedom = chi_square(ids, probs)
    limit = freedom + 5 * (2 * freedom) ** 0.5
    assert freedom >= 4
    assert statistic < limit < chi_square(ids, probs.flip(0))[0]


def drawn_often(draws, device, *sizes):
    """(arguments, the distribution): one row again and again, other uniforms each time."""
    x, norm, eps, head, num_ids, inverse, _ = case(1, *sizes, device=device)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(1)).to(device)
    probs = distribution(exact_logits(x, norm, eps, head), num_ids, inverse)[0].exp()
    rows = x.expand(draws, -1).contiguous()
    return (rows, norm, eps, head, num_ids, inverse.expand(draws).contiguous(), uniform), probs


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution(temperature):
    arguments, probs = drawn_often(20_000, "cpu", 16, 30, 23, (temperature,))
    assert_follows(head_sample(*arguments)[0], probs)


def test_draws_follow_the_distribution_interpreted():
    """With few draws, because one takes 50 ms in the interpreter. `check` tests where each draw must fall."""
    arguments, probs = drawn_often(100, "cpu", 16, 60, 42, (1.3,))
    with backend.interpreted():
        assert_follows(head_sample(*arguments)[0], probs)


def hand_made(logits, num_ids, inverse, uniform):
    """Arguments that give these logits [B, V].

    x is a row of the unit matrix. RMSNorm multiplies it by √D, so the head is divided by √D.
    """
    rows = len(logits)
    hidden = max(rows, 2)
    head = torch.zeros(logits.shape[1], hidden)
    head[:, :rows] = logits.t() / hidden**0.5
    x = torch.eye(hidden)[:rows]
    return x, torch.ones(hidden), 1e-30, head, num_ids, torch.tensor(inverse), torch.tensor(uniform)


def ends_of_a_distribution():
    """(arguments, ids): three possible ids of 60 and padding; uniforms of 0, just below 1 and 1."""
    logits = torch.full((5, 80), -1e4)
    logits[:, [7, 40, 50]] = 1.0
    logits[:, 60:] = 1e4  # padding
    below = 1 - 2**-24
    return hand_made(logits, 60, [1.0, 1.0, 1.0, 0.0, 1.0], [0.0, below, 0.5, 0.9, 1.0]), [7, 50, 40, 7, 50]


@pytest.mark.parametrize("interpret", [False, True])
def test_ends_of_the_distribution(interpret):
    """Uniforms of 0 and just below 1 never choose an id of probability 0, nor one past num_ids."""
    arguments, expected = ends_of_a_distribution()
    if interpret:
        with backend.interpreted():
            ids, logprob, *_ = head_sample(*arguments)
    else:
        ids, logprob, *_ = head_sample(*arguments)
    assert ids.tolist() == expected
    torch.testing.assert_close(logprob, torch.full((5,), 1 / 3).log(), rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")  # of numpy, in the interpreter
@pytest.mark.parametrize("interpret", [False, True])
def test_a_row_that_is_not_finite_is_named_alone(interpret):
    """One row has a NaN and one an infinity. A NaN in the padding of the vocabulary does not count."""
    x, norm, eps, head, num_ids, inverse, uniform = case(6, 16, 90, 70, (1.0, 0.0))
    alone = head_sample(x, norm, eps, head, num_ids, inverse, uniform)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    head[80] = float("nan")
    if interpret:
        with backend.interpreted():
            ids, logprob, _, finite = head_sample(x, norm, eps, head, num_ids, inverse, uniform)
    else:
        ids, logprob, _, finite = head_sample(x, norm, eps, head, num_ids, inverse, uniform)
    assert finite.tolist() == [True, False, False, True, True, True]
    assert ((ids >= 0) & (ids < num_ids)).all()
    assert torch.equal(ids[finite], alone[0][finite])
    torch.testing.assert_close(logprob[finite], alone[1][finite], rtol=0, atol=1e-5)


def test_uniforms_of_both_widths_and_no_rows():
    *rest, uniform = case(4, 16, 40, 40)
    with backend.interpreted():
        for a, b in zip(head_sample(*rest, uniform), head_sample(*rest, uniform.double())):
            assert torch.equal(a, b)
        ids, logprob, logits, finite = head_sample(rest[0][:0], *rest[1:4], 40, rest[5][:0], uniform[:0])
    assert ids.shape == logprob.shape == finite.shape == (0,)
    assert logits.shape == (0, 40)


def test_opcheck_and_compile():
    arguments = *case(2, 16, 40, 33), torch.arange(40) % 4 != 1
    for context in (torch.no_grad(), backend.interpreted()):
        with context:
            torch.library.opcheck(
                torch.ops.qwen3f.head_sample, arguments, test_utils=("test_schema", "test_faketensor")
            )
    compiled = torch.compile(lambda *a: head_sample(*a), fullgraph=True, backend="aot_eager", dynamic=False)
    for a, b in zip(compiled(*arguments), head_sample(*arguments)):
        assert torch.equal(a, b)


def test_wrong_arguments_are_named():
    x, norm, eps, head, num_ids, inverse, uniform = case(2, 16, 40, 33)
    wrong = [
        ((x[0], norm, eps, head, num_ids, inverse, uniform), "x must be"),
        ((x, norm[:3], eps, head, num_ids, inverse, uniform), "norm must be"),
        ((x, norm, eps, head.t(), num_ids, inverse, uniform), "head must be"),
        ((x, norm, eps, head, 0, inverse, uniform), "num_ids must be"),
        ((x, norm, eps, head, 41, inverse, uniform), "num_ids must be"),
        ((x, norm, eps, head, num_ids, inverse.double(), uniform), "inv_temperature must be"),
        ((x, norm, eps, head, num_ids, inverse, uniform[:1]), "uniform must be"),
        ((x, norm, eps, head, num_ids, inverse, uniform.to("meta")), "uniform is on meta"),
        ((x, norm, eps, head, num_ids, inverse, uniform, torch.ones(33, dtype=torch.bool)), "allowed must be"),
        ((x, norm, eps, head, num_ids, inverse, uniform, torch.ones(40)), "allowed must be"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            head_sample(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 32, 64, 256])
@pytest.mark.parametrize("hidden, vocab, num_ids, dtype", in_dtypes([(1024, 151936, 151669), (1000, 5000, 4097)]))
def test_on_a_gpu(rows, hidden, vocab, num_ids, dtype):
    """Logits at most 1.05 times as far from float64 as norm and a float32 head (float32: 3e-6). The same bits twice."""
    arguments = case(rows, hidden, vocab, num_ids, (0.7, 0.0, 1.0), dtype, "cuda")
    out = head_sample(*arguments)
    theirs = distance(reference(*arguments)[2], exact_logits(*arguments))
    check(arguments, out, 3e-6 if dtype == torch.float32 else 1.05 * theirs)
    assert all(torch.equal(a, b) for a, b in zip(out, head_sample(*arguments)))


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_on_a_gpu_follow_the_distribution(temperature):
    arguments, probs = drawn_often(100_000, "cuda", 16, 300, 256, (temperature,))
    assert_follows(head_sample(*arguments)[0].cpu(), probs.cpu())
