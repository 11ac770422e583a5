"""Linear cross-entropy against torch's own in float64: values and gradients, formula and Triton kernels.

Unmarked tests run on a CPU, the kernels in Triton's interpreter there.
"""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend, cross_entropy, softmax_gradient
from kernels.bench import timing
from kernels.cross_entropy import IGNORE, linear_cross_entropy, lse_and_target, merge_shards, token_log_probs
from tests.kernels.gpu_cases import in_dtypes

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
RUNS = [
    pytest.param(contextlib.nullcontext, id="formula"),
    pytest.param(backend.interpreted, id="triton", marks=interpreted),
]


def case(n=37, d=8, v=53, dtype=torch.float64, device="cpu", seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, v, (n,), generator=g)
    targets[4::5] = IGNORE
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) * scale
    return (
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        targets.to(device),
        torch.rand(n, generator=g).to(device),
    )


def by_torch(h, w, t, weights, z_loss=0.0):
    logits = h @ w.t()
    nll = F.cross_entropy(logits, t, reduction="none", ignore_index=IGNORE)
    counted = torch.where(t == IGNORE, 0, weights)
    return ((nll + z_loss * logits.logsumexp(-1).square()) * counted).sum()


def log_probs_by_torch(h, w, t):
    return -F.cross_entropy(h @ w.t(), t, reduction="none", ignore_index=IGNORE)


def wide(*tensors):
    """The same values in float64, as new leaves for autograd."""
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS_CPU", 1)
    monkeypatch.setattr(cross_entropy, "_MIN_CHUNK", 16)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("fn", [linear_cross_entropy, cross_entropy.reference])
def test_float64_equals_torch(small_chunks, fn, z_loss):
    h, w, t, weights = case()
    expected = by_torch(h, w, t, weights, z_loss)
    got = fn(h, w, t, weights, z_loss=z_loss)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    # an upstream gradient that is not 1
    for a, b in zip(torch.autograd.grad(3 * got, (h, w)), torch.autograd.grad(3 * expected, (h, w))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(fn(h, w, t, weights, z_loss=z_loss), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("factor", [1 / 3, 2.0**17])
def test_an_upstream_gradient_is_not_rounded_itself(run, factor):
    """In float16 2¹⁷, which scales of losses reach, would be infinite; 1/3 would make all gradients a little small."""
    h, w, t, weights = case(dtype=torch.float16)
    weights = weights / len(h)
    with run():
        plain = torch.autograd.grad(linear_cross_entropy(h, w, t, weights), (h, w))
        scaled = torch.autograd.grad(linear_cross_entropy(h, w, t, weights) * factor, (h, w))
    assert all(torch.equal(a, (b.float() * factor).half()) for a, b in zip(scaled, plain))


# The interpreter truncates bfloat16 instead of rounding it, so half precision is float16 there.
@interpreted
@pytest.mark.parametrize("n, v", [(37, 53), (1, 300), (5, 2), (18, 700)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_equal_float64(small_chunks, monkeypatch, dtype, n, v):
    """Several chunks and blocks, of which the last are partial. fp32: within the rounding of its sums, 2e-6.

    float16: at most 1.5 times as far off as torch. The 1.5 is for the weight's gradient: each of three chunks rounds
    it, and torch rounds it once.
    """
    monkeypatch.setattr(softmax_gradient, "launch_for", lambda *_: softmax_gradient.Launch(256, 1, 2))
    h, w, t, weights = case(n, 8, v, dtype)
    exact = wide(h, w, t, weights)
    upstream = torch.linspace(-1, 1, n)

    def run(loss_fn, log_probs_fn, args):
        loss = loss_fn(*args, z_loss=1e-3)
        log_probs = log_probs_fn(*args[:3])
        grads = (
            torch.autograd.grad(loss / 4, args[:2]),
            torch.autograd.grad(log_probs, args[:2], upstream.to(log_probs)),
        )
        with torch.no_grad():
            return [loss, loss_fn(*args, z_loss=1e-3), log_probs, *grads[0], *grads[1]]

    expected = run(by_torch, log_probs_by_torch, exact)
    with backend.interpreted():
        got = run(linear_cross_entropy, token_log_probs, (h, w, t, weights))
    framework = run(by_torch, log_probs_by_torch, (h, w, t, weights))
    for a, b, c in zip(got, expected, framework):
        if dtype == torch.float32:
            assert distance(a, b) < 2e-6
        else:
            assert distance(a, b) < max(1.5 * distance(c, b), torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("run", RUNS)
def test_every_row_is_a_row_alone(run):
    """Columns of one row never reach another: the gradient in hidden is that of each token by itself."""
    h, w, t, weights = case(6, 8, 40, torch.float32)
    with run():
        together = torch.autograd.grad(linear_cross_entropy(h, w, t, weights), h)[0]
        alone = [
            torch.autograd.grad(linear_cross_entropy(h[i : i + 1], w, t[i : i + 1], weights[i : i + 1]), h)[0][i]
            for i in range(6)
        ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_huge_logits(run):
    h, w, t, weights = case(dtype=torch.float32, scale=1e5)
    expected = by_torch(*wide(h, w, t, weights))
    with run():
        loss = linear_cross_entropy(h, w, t, weights)
        assert distance(loss, expected) < 1e-6
        assert distance(token_log_probs(h, w, t), log_probs_by_torch(*wide(h, w, t))) < 1e-6
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (h, w)))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("n", [7, 0])
def test_nothing_predicted(run, n):
    h, w, t, weights = case(n, dtype=torch.float32)
    t = torch.full_like(t, IGNORE)
    with run():
        loss, log_probs = linear_cross_entropy(h, w, t, weights, z_loss=1.0), token_log_probs(h, w, t)
        grads = *torch.autograd.grad(loss, (h, w)), *torch.autograd.grad(log_probs.sum(), (h, w))
        with torch.no_grad():
            assert linear_cross_entropy(h, w, t, weights) == 0
    assert loss == 0
    assert (log_probs == 0).all()
    assert log_probs.shape == (n,)
    assert all((g == 0).all() for g in grads)
    assert [g.shape for g in grads[:2]] == [h.shape, w.shape]


@interpreted
def test_an_ignored_row_is_never_read():
    """It may hold anything: its loss and its gradient in hidden are exactly 0."""
    h, w, t, weights = case(4, dtype=torch.float32)
    t[1], weights[2] = IGNORE, 0.0
    with torch.no_grad():
        h[1:3] = torch.tensor([[float("nan")], [float("inf")]])
    with backend.interpreted():
        loss = linear_cross_entropy(h, w, t, weights)
        d_hidden = torch.autograd.grad(loss, h)[0]
    assert loss.isfinite()
    assert (d_hidden[1:3] == 0).all()
    assert (d_hidden[3] != 0).any()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("target", [53, -1])
def test_a_target_outside_of_the_vocabulary_shows(run, target):
    h, w, t, weights = case(dtype=torch.float32)
    t[3] = target
    with run():
        with torch.no_grad():
            assert linear_cross_entropy(h, w, t, weights).isnan()
            assert token_log_probs(h, w, t).isnan().nonzero().flatten().tolist() == [3]
        if run is backend.interpreted:
            assert linear_cross_entropy(h, w, t, weights).isnan()
        else:
            with pytest.raises(RuntimeError, match="out of bounds"):
                linear_cross_entropy(h, w, t, weights)


def test_token_log_probs_has_a_true_backward(small_chunks):
    h, w, t, _ = case(19, 3, 7)
    assert torch.autograd.gradcheck(lambda h, w: token_log_probs(h, w, t), (h, w))
    assert torch.autograd.gradcheck(lambda h, w: lse_and_target(h, w, t, 2), (h, w))


@pytest.mark.parametrize("run", RUNS)
@settings(max_examples=4, deadline=None, database=None)
@given(cuts=st.sets(st.integers(1, 52), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_three_shards_of_the_vocabulary_equal_the_whole(run, cuts, seed):
    """In float32, to its rounding. The gradient passes through both the log-probability and lse."""
    h, w, t, weights = case(11, dtype=torch.float32, seed=seed)
    exact = wide(h, w, t, weights)
    expected = by_torch(*exact, z_loss=0.01)
    starts = [0, *sorted(cuts)]
    with run():
        shards = [lse_and_target(h, part, t, start) for part, start in zip(w.tensor_split(sorted(cuts)), starts)]
        lse, target = merge_shards(*(torch.stack(x) for x in zip(*shards)))
        got = (torch.where(t == IGNORE, 0, weights) * (lse - target + 0.01 * lse.square())).sum()
        grads = torch.autograd.grad(got, (h, w))
    assert distance(got, expected) < 2e-6
    for a, b in zip(grads, torch.autograd.grad(expected, exact[:2])):
        assert distance(a, b) < 2e-6


@interpreted
def test_triton_walks_any_row_stride():
    """The kernels take a view of a wider matrix, and leave what lies beside it alone."""
    wide_logits = torch.randn(5, 400)
    before, logits = wide_logits.clone(), wide_logits[:, 30:330]
    targets, ones = torch.tensor([0, 299, IGNORE, 7, 8]), torch.ones(5)
    softmax_gradient.loss_and_gradient_(logits, targets, ones, 0.0)
    expected = before[:, 30:330].double().softmax(-1) - F.one_hot(targets.clamp(min=0), 300)
    expected[2] = 0
    assert distance(logits, expected) < 1e-6
    assert torch.equal(wide_logits[:, :30], before[:, :30])
    assert torch.equal(wide_logits[:, 330:], before[:, 330:])


@pytest.mark.parametrize("run", RUNS)
def test_a_second_backward_raises(run):
    h, w, t, weights = case(dtype=torch.float32)
    with run():
        loss = linear_cross_entropy(h, w, t, weights)
        torch.autograd.grad(loss, h, retain_graph=True)
        with pytest.raises(RuntimeError, match="inplace"):
            torch.autograd.grad(loss, h)


@pytest.mark.parametrize("run", RUNS)
def test_operators_pass_opcheck(run):
    h, w, t, weights = case(5, 4, 9, torch.float32)
    row = torch.ones(5)
    with run():
        torch.library.opcheck(cross_entropy._loss_and_gradients_op, (h, w, t, weights, 0.1, False))
        torch.library.opcheck(cross_entropy._lse_and_target_op, (h, w, t, 2))
        torch.library.opcheck(cross_entropy._lse_and_target_backward_op, (h.detach(), w.detach(), t, 2, row, row, row))


@pytest.mark.parametrize("run", RUNS)
def test_compiles_as_one_graph(run):
    """The whole step, backward pass included, in one graph; and forward and backward as two."""
    h, w, t, weights = case(9, 4, 30, torch.float32)

    def loss(h, w):
        return 0.7 * linear_cross_entropy(h, w, t, weights, z_loss=0.1) + token_log_probs(h, w, t).square().sum()

    def step(h, w):
        return torch.autograd.grad(loss(h, w), (h, w))

    with run(), torch._dynamo.config.patch(trace_autograd_ops=True):
        expected = step(h, w)
        one = torch.compile(step, fullgraph=True, backend="aot_eager")(h, w)
        two = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(h, w), (h, w))
    for a, b, c in zip(one, two, expected):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize(
    "change, message",
    [
        ({1: lambda w: w[:, :3]}, "weight"),
        ({1: lambda w: w[:0]}, "weight"),
        ({0: lambda h: h[None]}, "hidden must be"),
        ({2: lambda t: t[:3]}, "targets must be"),
        ({2: lambda t: t.int()}, "int64"),
        ({3: lambda x: x[:3]}, "weights must be"),
        ({3: lambda x: x.long()}, "weights must be floating"),
        ({0: lambda h: h.float()}, "weight is torch.float64"),
        ({0: lambda h: h.long(), 1: lambda w: w.long()}, "hidden must be bfloat16"),
        ({2: lambda t: t.to("meta")}, "targets is on meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    args = [change.get(i, lambda x: x)(x) for i, x in enumerate(case())]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*args)
    if 3 not in change:
        with pytest.raises(ValueError, match=message):
            token_log_probs(*args[:3])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "n, d, v, dtype", in_dtypes([(3000, 512, 32_001), (4096, 1024, 151_936), (700, 256, 4096)]), ids=str
)
def test_on_the_gpu(dtype, n, d, v):
    """At most 1.1 times as far from float64 as torch with all logits in memory, or 2e-6. Two runs give the same bits.

    Free memory is filled with NaN first. The weight's gradient of token_log_probs may be 1.5 times as far off, because
    every chunk of 2,048 tokens rounds it. The loss is told to sum its own in float32.
    """
    h, w, t, weights = case(n, d, v, dtype, "cuda", seed=n, scale=d**-0.5)
    weights = weights / 7
    upstream = torch.randn(n, device="cuda")

    def run(loss_fn, log_probs_fn, args):
        loss, log_probs = loss_fn(*args, z_loss=1e-4), log_probs_fn(*args[:3])
        grads = (
            torch.autograd.grad(loss / 4, args[:2]),
            torch.autograd.grad(log_probs, args[:2], upstream.to(log_probs)),
        )
        return [x.detach() for x in (loss, log_probs, *grads[0], *grads[1])]

    def ours():
        poison = [torch.full((1 << 28,), float("nan"), device="cuda") for _ in range(2)]
        del poison
        return run(functools.partial(linear_cross_entropy, float32_sum=True), token_log_probs, (h, w, t, weights))

    got, again = ours(), ours()
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    expected = run(by_torch, log_probs_by_torch, wide(h, w, t, weights))
    framework = run(by_torch, log_probs_by_torch, (h, w, t, weights))
    for i, (a, b, c) in enumerate(zip(got, expected, framework)):
        bound = 1.5 if i == 5 else 1.1
        assert distance(a, b) < max(bound * distance(c, b), 2e-6), i


@pytest.mark.gpu
def test_the_rounded_sum_on_the_gpu():
    """By default every chunk rounds the weight's gradient: it is at most 1.5 times as far off as torch's."""
    h, w, t, weights = case(16384, 256, 32_768, torch.bfloat16, "cuda", scale=0.06)
    got, expected, framework = (
        torch.autograd.grad(fn(*args), args[1])[0]
        for fn, args in (
            (linear_cross_entropy, (h, w, t, weights)),
            (by_torch, wide(h, w, t, weights)),
            (by_torch, (h, w, t, weights)),
        )
    )
    assert distance(got, expected) < 1.5 * distance(framework, expected)


@pytest.mark.gpu
def test_memory_on_the_gpu():
    """Beyond the gradients, one chunk of logits: 640 MiB at most."""
    h, w, t, weights = case(8192, 1024, 151_936, torch.bfloat16, "cuda", scale=0.03)

    def step():
        return torch.autograd.grad(linear_cross_entropy(h, w, t, weights) / 3, (h, w))

    gradients = h.numel() * h.itemsize + w.numel() * w.itemsize
    assert timing.peak_extra_bytes(step) - gradients < 640 << 20
