"""The pure pretraining step: accumulation, recomputation and compilation change nothing.

Tolerances: float64 1e-12 and fp32 1e-6, both by norm and relative: rounding of another order of summation.
"""

import functools

import pytest
import torch

from qwen3f import model, params, presets
from qwen3f.errors import UserError
from qwen3f.model import block
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train import losses, state
from qwen3f.train.objective import batch_weight
from qwen3f.train.optimizer import AdamW
from qwen3f.train.outputs import make_eval_step
from qwen3f.train.schedule import Schedule
from qwen3f.transforms import grad_and_value
from tests.batches import random_batch

SCHEDULE = Schedule("cosine", 1e-3, 100, 5)
PRECISIONS = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])


def tiny(**changes):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 61}
    return presets.get("nano").replace(**{**sizes, **changes})


def assert_close(got, expected, tolerance):
    for path in expected:
        assert (got[path] - expected[path]).norm() <= tolerance * expected[path].norm(), path


def gradients(cfg, p, batch, execution=model.EAGER, **kw):
    return grad_and_value(losses.make_loss(cfg, execution, **kw))(p, batch, batch_weight(batch))


@PRECISIONS
@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_changes_nothing(dtype, tolerance, parts):
    """Token counts differ wildly between rows, one row predicts nothing: means of means would be far off."""
    cfg = tiny()
    batch = random_batch(8, 16, cfg.vocab_size)
    batch["targets"][3] = -100
    batch["loss_weights"][5, 2:] = 0
    # eps large against rounding: AdamW divides the gradient by its own size, so tiny ones would amplify rounding
    hyper = AdamW(eps=1e-3)
    start = state.init_state(cfg, 0, dtype=dtype)
    whole, m_1 = make_train_step(cfg, hyper, SCHEDULE)(start, batch)
    cut, m_2 = make_train_step(cfg, hyper, SCHEDULE, microbatches=parts)(start, batch)
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(m_1[name], m_2[name], rtol=tolerance, atol=0)
    assert m_1["tokens"] == m_2["tokens"]
    assert_close(cut.opt.m, whole.opt.m, tolerance)
    assert_close(cut.params, whole.params, tolerance)


@PRECISIONS
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputation_changes_nothing(dtype, tolerance, policy):
    cfg = tiny(attention_dropout=0.2)
    p = params.init_params(cfg, 0, dtype=dtype)
    batch = random_batch(3, 16, cfg.vocab_size)
    stream = torch.tensor(11)

    def grads(cfg):
        loss = losses.make_loss(cfg, dropout=True)
        return grad_and_value(loss)(p, batch, 7.0, stream)

    (expected, value), (got, value_2) = grads(cfg), grads(cfg.replace(gradient_checkpointing=policy))
    assert value == value_2
    assert_close(got, expected, tolerance)


def test_recomputation_recomputes(monkeypatch):
    """full keeps no product of the block, selective keeps all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.products = self.elementwise = 0

        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            self.products += fn is torch.ops.aten.mm.default
            self.elementwise += fn is torch.ops.aten.silu.default
            return fn(*args, **(kwargs or {}))

    def count(policy):
        cfg = tiny(gradient_checkpointing=policy)
        p, batch = params.init_params(cfg, 0), random_batch(2, 8, cfg.vocab_size)
        with Count() as counter:
            gradients(cfg, p, batch)
        return counter.products, counter.elementwise

    none, full, selective = count("none"), count("full"), count("selective")
    assert full[1] == selective[1] == 2 * none[1] == 4
    assert selective[0] == none[0]
    assert full[0] >= none[0] + 2 * 6  # down_proj's output is not needed again


@pytest.mark.parametrize(
    "mode, backend, layers, microbatches, dtype, tolerance",
    [
        ("block", "aot_eager", 2, 2, torch.float64, 1e-12),
        ("step", "aot_eager", 1, 2, torch.float32, 1e-6),
        pytest.param("step", "aot_eager", 2, 2, torch.float32, 1e-6, marks=pytest.mark.nightly),
        pytest.param("block", "inductor", 2, 2, torch.float32, 1e-6, marks=pytest.mark.nightly),
        pytest.param("step", "inductor", 1, 1, torch.float64, 1e-12, marks=pytest.mark.nightly),
    ],
)
def test_compiled_equals_eager(mode, backend, layers, microbatches, dtype, tolerance, monkeypatch):
    """Block mode with the compiled update, and the whole step as one graph, both with donation and accumulation.

    A push uses eager kernels, which is enough to test what is put into the graphs. The nightly run also uses kernels of
    inductor, which take a minute to build: in the other precision, and with one layer and micro-batch where the graph
    repeats them. On a push, other tests let inductor build a layer of experts, decoding and a donated function.
    """
    cfg = tiny(num_hidden_layers=layers)
    batch = random_batch(4, 16, cfg.vocab_size)
    hyper = AdamW(eps=1e-3)
    start = state.init_state(cfg, 0, dtype=dtype)
    expected, metrics = make_train_step(cfg, hyper, SCHEDULE, microbatches=microbatches)(start, batch)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    block.block_fn.cache_clear()
    execution = model.Execution(compile=mode)
    step = make_train_step(cfg, hyper, SCHEDULE, microbatches=microbatches, execution=execution, donate=True)
    mine = state.init_state(cfg, 0, dtype=dtype)
    place = mine.params[params.EMBED].data_ptr()
    got, got_metrics = step(mine, batch)
    block.block_fn.cache_clear()
    assert got.params[params.EMBED].data_ptr() == place
    for name in ("loss", "grad_norm", "lr"):
        torch.testing.assert_close(got_metrics[name], metrics[name], rtol=tolerance, atol=0)
    assert_close(got.opt.m, expected.opt.m, tolerance)
    assert_close(got.params, expected.params, tolerance)
    assert (got.step, got.position, got.tokens_seen) == (1, 4, expected.tokens_seen)


def test_a_28_layer_model_compiles_its_block_at_most_twice():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    cfg = tiny(num_hidden_layers=28, hidden_size=16, intermediate_size=16)
    p, batch = params.init_params(cfg, 0), random_batch(2, 8, cfg.vocab_size)
    original = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda fn, **kw: original(fn, backend=counter, **kw))
        block.block_fn.cache_clear()
        execution = model.Execution(compile="block", loss="reference")
        for _ in range(2):
            grads, _ = gradients(cfg, p, batch, execution)
        block.block_fn.cache_clear()
    assert 1 <= counter.frame_count <= 2
    assert_close(grads, gradients(cfg, p, batch)[0], 1e-5)


def test_step_is_pure_and_repeatable():
    cfg = tiny(attention_dropout=0.3)
    batch = random_batch(4, 16, cfg.vocab_size)
    start = state.init_state(cfg, 0)
    before = {k: v.clone() for k, v in start.params.items()}
    step = make_train_step(cfg, AdamW(), SCHEDULE)
    (a, m_a), (b, m_b) = step(start, batch), step(start, batch)
    assert m_a["loss"] == m_b["loss"]
    for k in before:
        assert torch.equal(start.params[k], before[k])
        assert torch.equal(a.params[k], b.params[k])
    _other, m_c = step(start._replace(seed=start.seed + 1), batch)
    assert m_c["loss"] != m_a["loss"]  # dropout follows the state's seed


def test_bad_numbers_are_withheld_and_flagged():
    cfg = tiny()
    start = state.init_state(cfg, 0)
    start.params[params.FINAL_NORM][0] = float("nan")
    new, metrics = make_train_step(cfg, AdamW(), SCHEDULE)(start, random_batch(2, 8, cfg.vocab_size))
    assert not metrics["finite"]
    for k in start.params:
        assert torch.equal(new.params[k], start.params[k]) or k == params.FINAL_NORM
        assert (new.opt.m[k] == 0).all()


def test_a_batch_that_predicts_nothing_gives_zero():
    cfg = tiny()
    batch = random_batch(2, 8, cfg.vocab_size)
    batch["targets"] = torch.full_like(batch["targets"], -100)
    _new, metrics = make_train_step(cfg, AdamW(weight_decay=0.0), SCHEDULE)(state.init_state(cfg, 0), batch)
    assert metrics["finite"]
    assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens"] == 0


def test_bf16_compute_over_fp32_master_weights():
    """bf16 has 8 bits of mantissa: gradients agree to a few parts in a hundred, weights stay fp32."""
    cfg = tiny()
    batch = random_batch(4, 16, cfg.vocab_size)
    start = state.init_state(cfg, 0)
    wide, _ = make_train_step(cfg, AdamW(), SCHEDULE)(start, batch)
    narrow, _ = make_train_step(cfg, AdamW(), SCHEDULE, compute_dtype=torch.bfloat16)(start, batch)
    assert {v.dtype for v in (*narrow.params.values(), *narrow.opt.m.values())} == {torch.float32}
    for k in wide.opt.m:
        error = (narrow.opt.m[k] - wide.opt.m[k]).norm() / wide.opt.m[k].norm()
        assert 0 < error < 0.05, k


def test_crossing_documents_is_a_choice():
    cfg = tiny()
    batch = random_batch(2, 32, cfg.vocab_size)
    nats = [make_eval_step(cfg, cross_documents=c)(params.init_params(cfg, 0), batch)[0] for c in (False, True)]
    assert nats[0] != nats[1]


def test_batches_that_do_not_divide_are_refused():
    cfg = tiny()
    with pytest.raises(UserError, match="6 rows cannot be cut into 4"):
        make_train_step(cfg, AdamW(), SCHEDULE, microbatches=4)(state.init_state(cfg, 0), random_batch(6, 8, 61))
