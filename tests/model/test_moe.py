"""The mixture of experts against a loop over tokens, written from the formula in float64; and in the whole model."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3f import model, params
from qwen3f.errors import UserError
from qwen3f.model import block
from qwen3f.model.moe import SparseMLP
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train import losses, state
from qwen3f.train.objective import MicroBatch
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.transforms import grad_and_value
from sharding.axes import ONE
from tests.batches import random_batch
from tests.model.hf_params import small_config

MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
PRECISIONS = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
SCHEDULE = Schedule("cosine", 1e-3, 100, 5)


def layer(cfg, dtype=torch.float64):
    """Random weights of one sparse MLP and an input of 2 rows of 9 tokens."""
    g = torch.Generator().manual_seed(0)
    shapes = {path: spec.shape[1:] for path, spec in params.abstract_params(cfg).items() if ".mlp." in path}
    weights = {
        path.split(".mlp.")[1]: torch.randn(shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5
        for path, shape in shapes.items()
    }
    x = torch.randn(2, 9, cfg.hidden_size, generator=g, dtype=torch.float64)
    return {k: v.to(dtype) for k, v in weights.items()}, x.to(dtype)


def mlp(cfg, form="grouped"):
    with torch.device("meta"):
        skeleton = SparseMLP(cfg, form)
    return lambda weights, x: torch.func.functional_call(skeleton, weights, (x,), strict=True)[0]


def by_tokens(cfg, weights, x):
    act = {"silu": F.silu, "gelu": F.gelu}[cfg.hidden_act]
    out = []
    for token in x.flatten(0, 1):
        probs = (weights["gate.weight"] @ token).exp()
        probs = probs / probs.sum()
        chosen = probs.argsort(descending=True)[: cfg.num_experts_per_tok].tolist()
        divisor = sum(probs[e] for e in chosen) if cfg.norm_topk_prob else 1.0
        total = 0.0
        for e in chosen:
            gate, up, down = (weights[f"experts.{name}_proj.weight"][e] for name in ("gate", "up", "down"))
            total = total + probs[e] / divisor * (down @ (act(gate @ token) * (up @ token)))
        out.append(total)
    return torch.stack(out).view_as(x)


def value_and_gradients(fn, weights, x):
    """fn's output, and the gradients in x and every weight of a scalar made from it."""

    def scalar(inputs):
        y = fn({k: v for k, v in inputs.items() if k != "x"}, inputs["x"])
        return y.sin().sum(), y

    gradients, (_, y) = grad_and_value(scalar, has_aux=True)({"x": x, **weights})
    return y, gradients


def assert_close(got, expected, tolerance):
    for path in expected:
        assert (got[path] - expected[path]).norm() <= tolerance * expected[path].norm(), path


@pytest.mark.parametrize("form", ["grouped", "reference"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"num_experts_per_tok": 5},
        {"hidden_act": "gelu"},
    ],
    ids=["normalised", "raw", "top 1", "every expert", "gelu"],
)
def test_formula(changes, form):
    cfg = small_config(**{**MOE, **changes})
    weights, x = layer(cfg)
    got, expected = (value_and_gradients(fn, weights, x) for fn in (mlp(cfg, form), lambda w, x: by_tokens(cfg, w, x)))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-13)
    assert_close(got[1], expected[1], 1e-12)


@pytest.mark.parametrize("form", ["grouped", "reference"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_crowded_and_empty_experts(top_k, form):
    """Every token goes to the last experts, so all others get none: their gradients are zeros, not garbage."""
    cfg = small_config(**{**MOE, "num_experts_per_tok": top_k})
    weights, x = layer(cfg)
    x = x.abs()
    weights["gate.weight"] = weights["gate.weight"] * 0.01
    weights["gate.weight"][-top_k:] += 1.0
    got, expected = (value_and_gradients(fn, weights, x) for fn in (mlp(cfg, form), lambda w, x: by_tokens(cfg, w, x)))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-13)
    for name in ("gate", "up", "down"):
        gradient = got[1][f"experts.{name}_proj.weight"]
        assert torch.equal(gradient[:-top_k], torch.zeros_like(gradient[:-top_k]))
        assert_close({name: gradient}, {name: expected[1][f"experts.{name}_proj.weight"]}, 1e-12)


@PRECISIONS
def test_compiled_layer_equals_eager(dtype, tolerance):
    cfg = small_config(**MOE)
    weights, x = layer(cfg, dtype)
    eager = mlp(cfg)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    got, expected = (value_and_gradients(fn, weights, x) for fn in (compiled, eager))
    assert (got[0] - expected[0]).norm() <= tolerance * expected[0].norm()
    assert_close(got[1], expected[1], tolerance)


def mixed(**changes):
    """Layers dense and sparse in turn, for training."""
    plan = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "router_aux_loss_coef": 0.2, "router_z_loss_coef": 0.1}
    return small_config(**{**MOE, **plan, **changes})


def gradients(cfg, p, batch, execution=model.EAGER, transform=grad_and_value):
    both = losses.make_differentiated(cfg, execution=execution)
    return transform(both, has_aux=True)(p, {}, MicroBatch(batch, batch), losses.sum_totals(cfg, batch, ONE))


@PRECISIONS
@pytest.mark.parametrize("changes", [{}, {"moe_drop_tokens": True, "moe_capacity_factor": 0.8}], ids=["all", "drop"])
def test_every_way_to_run_gives_the_same_gradients(dtype, tolerance, changes):
    """With recomputation, by the reference formula, and by that under torch.func (fp32: another order of sums, 5e-6).

    The routers' losses are included. A layer that is recomputed must count its choices once, not twice.
    """
    cfg = mixed(**changes)
    batch = random_batch(3, 16, cfg.vocab_size)
    batch["segments"][1, 11:] = 0
    p = params.init_params(cfg.replace(initializer_range=0.2), 0, dtype=dtype)
    expected, (value, terms) = gradients(cfg, p, batch)
    assert all(g.norm() > 0 for g in expected.values())
    others = [gradients(cfg.replace(gradient_checkpointing=policy), p, batch) for policy in ("full", "selective")]
    others.append(gradients(cfg, p, batch, model.REFERENCE))
    others.append(gradients(cfg, p, batch, model.REFERENCE, torch.func.grad_and_value))
    for (got, (value_2, terms_2)), factor in zip(others, (1, 1, 5, 5), strict=True):
        assert_close(got, expected, factor * tolerance)
        torch.testing.assert_close((value_2, *terms_2[:3]), (value, *terms[:3]), rtol=factor * tolerance, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(terms_2.load, terms.load, strict=True))


def test_selective_recomputation_keeps_the_experts_products():
    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = Counter()

        def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
            self.calls[fn] += 1
            return fn(*args, **(kwargs or {}))

    def count(policy):
        cfg = mixed(gradient_checkpointing=policy)
        with Count() as counter:
            gradients(cfg, params.init_params(cfg, 0), random_batch(2, 8, cfg.vocab_size))
        ops = torch.ops.qwen3f
        return tuple(counter.calls[op.default] for op in (ops.moe_plan, ops.experts_mlp, ops.experts_mlp_backward))

    # 2 sparse layers; "full" makes their forward passes twice
    assert count("none") == count("selective") == (2, 2, 2)
    assert count("full") == (4, 4, 2)


@pytest.mark.parametrize("mode", [pytest.param("block", marks=pytest.mark.nightly), "step"])
def test_compiled_models_equal_eager(mode, monkeypatch):
    """The whole model as full graphs with eager kernels, to save time. Inductor: test_compiled_layer_equals_eager."""
    counter = CompileCounterWithBackend("aot_eager")
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **kw: original(fn, backend=counter, **kw))
    # torch 2.13 fails to recompute several regions of one whole-step graph
    cfg = mixed(gradient_checkpointing="selective") if mode == "block" else mixed(num_hidden_layers=2)
    cfg = cfg.replace(router_balance="global_exact")
    batch, hyper = random_batch(4, 16, cfg.vocab_size), AdamW(eps=1e-3)
    start = state.init_state(cfg, 0, dtype=torch.float64)
    parts = 2 if mode == "block" else 1
    expected, metrics = make_train_step(cfg, hyper, SCHEDULE, microbatches=parts)(start, batch)
    block.block_fn.cache_clear()
    execution = model.Execution(compile=mode, loss="reference")
    if mode == "block":
        gradients(cfg, start.params, {k: x.chunk(parts)[0] for k, x in batch.items()}, execution)
        assert 1 <= counter.frame_count <= 4  # two for each kind of layer
    got, got_metrics = make_train_step(cfg, hyper, SCHEDULE, microbatches=parts, execution=execution)(start, batch)
    block.block_fn.cache_clear()
    for name in ("loss", "grad_norm", "aux_loss", "router_z_loss"):
        torch.testing.assert_close(got_metrics[name], metrics[name], rtol=1e-12, atol=0)
    assert torch.equal(got_metrics["expert_load"], metrics["expert_load"])
    assert_close(got.opt.m, expected.opt.m, 1e-12)
    assert_close(got.params, expected.params, 1e-12)


def test_per_example_gradients_by_vmap():
    cfg = mixed()
    p = params.init_params(cfg.replace(initializer_range=0.2), 0, dtype=torch.float64)
    batch = random_batch(3, 12, cfg.vocab_size)
    loss = losses.make_loss(cfg, model.REFERENCE)

    def one(p, row):
        return loss(p, {k: v[None] for k, v in row.items()}, 3.0)

    together = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(p, batch)
    for i in range(3):
        row = {k: v[i : i + 1] for k, v in batch.items()}
        alone, _ = grad_and_value(losses.make_loss(cfg))(p, row, 3.0)
        assert_close({k: v[i] for k, v in together.items()}, alone, 1e-11)


def test_a_sparse_model_learns_through_the_pretraining_step():
    cfg = mixed()
    hyper, batch = AdamW(), random_batch(4, 16, cfg.vocab_size)
    step = make_train_step(cfg, hyper, Schedule("constant", 1e-2, 30, 0), microbatches=2)
    now, history = state.init_state(cfg, 0), []
    for _ in range(20):
        now, metrics = step(now, batch)
        history.append(metrics["loss"].item())
        assert metrics["aux_loss"] > 1
        assert metrics["finite"]
    assert history[0] == pytest.approx(math.log(cfg.vocab_size), rel=0.02)
    assert history[-1] < 0.5 * history[0]


def test_what_cannot_run_is_refused():
    with pytest.raises(UserError, match="experts 'dense' is unknown"):
        model.Execution(experts="dense")
    for name, value, words in (
        ("router_balance", "switch", "one of global, global_exact, micro, hf, got 'switch'"),
        ("router_aux_loss_coef", -0.1, "router_aux_loss_coef must be finite and at least 0, got -0.1"),
        ("router_z_loss_coef", math.nan, "router_z_loss_coef must be finite and at least 0, got nan"),
    ):
        with pytest.raises(UserError, match=words):
            mixed(**{name: value})
    for factor in (0, math.inf, 10**400):
        with pytest.raises(UserError, match="moe_capacity_factor must be positive and finite, got"):
            mixed(moe_drop_tokens=True, moe_capacity_factor=factor)


def test_stacks_of_another_model_are_refused():
    cfg = mixed()
    p, batch = params.init_params(cfg, 0), {"tokens": torch.zeros(1, 4, dtype=torch.int64)}
    path = "model.layers.mlp.gate.weight"
    with pytest.raises(KeyError, match="q_proj.bias"):
        model.apply(cfg, {**p, "model.layers.self_attn.q_proj.bias": torch.zeros(4, 64)}, batch)
    with pytest.raises(ValueError, match="shorter"):
        model.apply(cfg, {**p, path: p[path][:1]}, batch)
    with pytest.raises(KeyError, match="mlp.gate.weight"):
        model.apply(cfg, {k: v for k, v in p.items() if k != path}, batch)
