"""A pipeline computes what one device computes, for every schedule: loss and every gradient in float64 to 1e-10, and
the loss alone in an evaluation.

Only the order of sums differs. All cases run in the same four gloo processes. Where a pipeline has two ranks, the other
two run a copy of it, or belong to the second axis of the mesh.
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from qwen3f import params as P
from qwen3f import tree
from qwen3f.errors import UserError
from qwen3f.model import Execution
from qwen3f.model.transformer import layer_stacks
from qwen3f.train import losses
from qwen3f.train.objective import NEXT_TOKEN, make_head
from qwen3f.train.pipelined import make_pipelined_gradients, make_pipelined_outputs
from qwen3f.train.step import cut_batch
from qwen3f.transforms import grad_and_value
from sharding.axes import ONE, Axis, axes_of, make_mesh
from sharding.fsdp import cut, sum_over, sum_replicated
from sharding.layout import Layout
from sharding.mesh import parse_mesh
from sharding.pipeline.cut import Pipeline, make_slices, pipeline_traffic, store
from sharding.pipeline.schedule import check
from tests.sharding.steps import MOE, batches, config, share
from tests.sharding.worlds import run_processes

WORLD, ROWS, LENGTH = 4, 8, 16
ONE_STAGE = Pipeline()


@dataclasses.dataclass(frozen=True)
class Case:
    mesh: str
    pipeline: Pipeline = ONE_STAGE
    changes: dict = dataclasses.field(default_factory=dict)
    microbatches: int = 4
    compile: str = "off"
    gather_dtype: torch.dtype | None = None

    @property
    def cfg(self):
        return config(**{"num_hidden_layers": 3} | self.changes)


TIED = {"tie_word_embeddings": True}
SEVEN = {"num_hidden_layers": 7}
ALTERNATING = {"decoder_sparse_step": 2, "num_hidden_layers": 8}
INTERLEAVED, ZERO, ZERO2, ZBV = (
    Pipeline("interleaved", 2),
    Pipeline("zero_bubble"),
    Pipeline("zero_bubble", 2),
    Pipeline("zbv", 2),
)
CASES = {
    "1f1b": Case("pp2"),
    "1f1b, tied": Case("pp2", changes=TIED),
    "1f1b, recomputed": Case("pp2", changes={"gradient_checkpointing": "full"}),
    "1f1b, four ranks": Case("pp4", changes=SEVEN),
    "1f1b, four ranks, tied": Case("pp4", changes=SEVEN | TIED, microbatches=8),
    "1f1b, a short last stage": Case("pp2", Pipeline(layers=6), changes=SEVEN | TIED),
    "interleaved": Case("pp2", INTERLEAVED, changes=SEVEN | TIED),
    "interleaved, a short last stage": Case("pp2", Pipeline("interleaved", 2, 5), changes={"num_hidden_layers": 16}),
    "zero bubble": Case("pp2", ZERO),
    "zero bubble, tied, recomputed": Case("pp2", ZERO, changes=TIED | {"gradient_checkpointing": "full"}),
    "zero bubble, four ranks": Case("pp4", ZERO, changes=SEVEN),
    "zero bubble, two stages": Case("pp2", ZERO2, changes=SEVEN),
    "zbv": Case("pp2", ZBV, changes=SEVEN),
    "zbv, tied": Case("pp2", ZBV, changes=SEVEN | TIED),
    "zbv, four ranks": Case("pp4", ZBV, changes={"num_hidden_layers": 15}),
    "moe": Case("pp2", changes=MOE),
    "moe, zero bubble, recomputed": Case("pp4", ZERO, changes=MOE | SEVEN | {"gradient_checkpointing": "full"}),
    "moe and dense layers, zbv": Case("pp2", ZBV, changes=MOE | ALTERNATING | {"router_balance": "micro"}),
    "moe and dense layers, padding": Case("pp2", changes=MOE | ALTERNATING | SEVEN),
    "moe, none in a short last stage": Case("pp2", Pipeline(layers=6), changes=MOE | ALTERNATING | SEVEN),
    "data": Case("pp2,dp2", INTERLEAVED, changes=SEVEN | TIED | {"gradient_checkpointing": "selective"}),
    "experts": Case("pp2,ep2", ZERO, changes=MOE),
    "context": Case("pp2,cp2", ZERO2, changes=SEVEN),
    "gathered in the compute dtype": Case("pp2,dp2", ZERO, changes=TIED, gather_dtype=torch.float64),
    "tensor": Case("pp2,tp2", changes=TIED),
    "tensor, zero bubble": Case("pp2,tp2", ZBV, changes=MOE | SEVEN),
}


def inputs():
    return batches(1, rows=ROWS)[0]


def shape_of(mesh):
    """(the mesh of the case, the mesh of all processes). Processes that the case does not need run copies, along dp."""
    shape = parse_mesh(mesh)
    return shape, dataclasses.replace(shape, dp=shape.dp * WORLD // shape.size)


class Sends:
    """Records the bytes of each message that torch's pipeline stages send."""

    def __enter__(self):
        self.seen, self.made = [], dist.P2POp
        dist.P2POp = self
        return self

    def __call__(self, op, x, *args, **kwargs):
        if op is dist.isend:
            self.seen.append(x.nbytes)
        return self.made(op, x, *args, **kwargs)

    def __exit__(self, *_):
        dist.P2POp = self.made


def on_rank(rank):
    """What a rank computes in every case."""
    meshes, out = {}, {}
    for name, case in CASES.items():
        shape, whole_shape = shape_of(case.mesh)
        if whole_shape not in meshes:
            meshes[whole_shape] = axes_of(make_mesh(whole_shape, "cpu"))
        axes = meshes[whole_shape]
        if shape != whole_shape:
            axes = dataclasses.replace(axes, dp=Axis("dp"), joint=())
        out[name] = one_case(case, axes, rank if shape == whole_shape else axes.pp.index)
    out["mixed precision"] = mixed_precision(meshes[parse_mesh("pp2,dp2")], rank)
    return out


def make_gradients(cfg, execution, layout):
    """A function (params, micro-batches, totals) -> (gradients, Terms). No parameter is frozen."""
    summed = make_pipelined_gradients(cfg, NEXT_TOKEN, execution, layout)
    return lambda params, parts, totals: summed(params, {}, params, parts, totals, None)


def make_loss(cfg, execution, layout):
    """A function (params, micro-batches) -> this rank's share of the summed nats."""
    head = make_head(cfg, execution, layout)
    outputs = make_pipelined_outputs(cfg, execution, layout, lambda *args: head(*args)[0])
    return lambda params, parts: sum(outputs(params, parts, 1.0), torch.zeros((), dtype=torch.float64))


def mixed_precision(axes, rank):
    """Gradients of float32 weights that FSDP gathers in bfloat16: (with pp, without pp but in its layer order)."""
    cfg, pipeline = config(num_hidden_layers=3), ZERO
    flat = dataclasses.replace(axes, pp=Axis("pp"))
    batch = share(inputs(), axes.shape, rank, 4)
    totals, parts = losses.sum_totals(cfg, batch, axes), cut_batch(batch, 4)

    def start(params, layout):
        placed = layout.place(cfg)
        shards = cut(params, placed, layout.axes)
        return placed, {path: x if placed[path].fsdp else x.to(torch.bfloat16) for path, x in shards.items()}

    stages = make_slices(cfg, pipeline, axes.pp.size)
    layout = Layout(axes, pipeline=pipeline, gather_dtype=torch.bfloat16)
    placed, params = start(store(cfg, P.init_params(cfg, 0), stages), layout)
    grads, _ = make_gradients(cfg, Execution(), layout)(params, parts, totals)
    grads = sum_replicated(grads, placed, axes)

    layout = Layout(flat, gather_dtype=torch.bfloat16)
    placed, params = start(P.init_params(cfg, 0), layout)
    differentiate = grad_and_value(losses.make_differentiated(cfg, layout=layout), has_aux=True)
    each = [differentiate(params, {}, part, totals)[0] for part in parts]
    flat_grads = sum_replicated({path: sum(g[path].float() for g in each) for path in params}, placed, flat)
    flat_grads = store(cfg, flat_grads, stages)
    stacks = layer_stacks(cfg)
    return grads, {p: x.chunk(axes.pp.size)[axes.pp.index] if p in stacks else x for p, x in flat_grads.items()}


def one_case(case, axes, rank):
    cfg, layout = case.cfg, Layout(axes, pipeline=case.pipeline, gather_dtype=case.gather_dtype)
    stages, placed = make_slices(cfg, case.pipeline, axes.pp.size), layout.place(cfg)
    params = cut(store(cfg, P.init_params(cfg, 0, dtype=torch.float64), stages), placed, axes)
    for path, kind in layer_stacks(cfg).items():
        padding = [i for i, layer in enumerate(stages.layer_order_of(axes.pp.index, kind)) if layer is None]
        params[path][padding] = float("nan")  # the result would be NaN if padding were computed
    batch = share(inputs(), axes.shape, rank, case.microbatches)
    totals = losses.sum_totals(cfg, batch, axes)
    gradients = make_gradients(cfg, Execution(compile=case.compile), layout)
    parts = cut_batch(batch, case.microbatches, layout)
    evaluate = make_loss(cfg, Execution(compile=case.compile), layout)
    once, terms = gradients(params, parts, totals)
    nats = [evaluate(params, cut_batch(batch, n, layout)) for n in (1, case.microbatches)]
    assert not any(x.requires_grad for x in nats)
    with Sends() as sends:
        again, _ = gradients(params, parts, totals)
    return {
        "nats": [sum_over(x, axes) for x in nats],
        "sends": (len(sends.seen), sum(sends.seen)),
        "own": once,
        "grads": sum_replicated(once, placed, axes),
        "again": sum_replicated(again, placed, axes),
        "terms": losses.sum_ranks(terms, axes)._asdict(),
        "axes": axes,
    }


@pytest.fixture(scope="module")
def on_ranks():
    return run_processes(on_rank, WORLD)


def on_one_device(cfg, microbatches):
    """Gradients and Terms, in the model's order."""
    params, batch = P.init_params(cfg, 0, dtype=torch.float64), inputs()
    totals = losses.sum_totals(cfg, batch, ONE)
    differentiate = grad_and_value(losses.make_differentiated(cfg), has_aux=True)
    grads, terms = None, None
    for part in cut_batch(batch, microbatches):
        part_grads, (_, part_terms) = differentiate(params, {}, part, totals, None if terms is None else terms.load)
        grads = part_grads if grads is None else tree.map(torch.add, grads, part_grads)
        terms = losses.add_terms(terms, part_terms)
    return grads, terms


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_equals_one_device(name, on_ranks):
    """Gradients are computed twice, with an evaluation between: the second call must keep nothing of the first."""
    case = CASES[name]
    cfg = case.cfg
    grads, terms = on_one_device(cfg, case.microbatches)
    for rank in on_ranks:
        got = rank[name]
        axes = got["axes"]
        placed = Layout(axes).place(cfg)
        stages = make_slices(cfg, case.pipeline, axes.pp.size)
        expected = cut(store(cfg, grads, stages), placed, axes)
        assert got["grads"].keys() == expected.keys()
        for path, value in expected.items():
            for key in ("grads", "again"):
                torch.testing.assert_close(
                    got[key][path], value, rtol=0, atol=1e-10, msg=lambda m, path=path: f"{path}: {m}"
                )
        for field in ("loss", "aux_loss", "z_loss"):
            torch.testing.assert_close(got["terms"][field], getattr(terms, field), rtol=0, atol=1e-10)
        if terms.load is not None:
            for x, y in zip(got["terms"]["load"], terms.load, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_equals_one_device(name, on_ranks):
    """With one micro-batch, which is fewer than the ranks, and with as many as in training."""
    cfg = CASES[name].cfg
    with torch.no_grad():
        expected = losses.make_loss(cfg)(P.init_params(cfg, 0, dtype=torch.float64), inputs(), 1.0)
    for rank in on_ranks:
        for nats in rank[name]["nats"]:
            torch.testing.assert_close(nats, expected, rtol=1e-12, atol=0)


def test_gathered_in_bfloat16_a_pipeline_changes_no_rounding(on_ranks):
    """Against the same mesh without pp, by norm to 1e-6.

    Both multiply the same bfloat16 numbers. Only the order of float32 sums over micro-batches differs.
    """
    for rank in on_ranks:
        grads, flat = rank["mixed precision"]
        for path, x in grads.items():
            assert x.dtype == torch.float32
            assert (x - flat[path]).norm() <= 1e-6 * flat[path].norm(), path


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cfg.tie_word_embeddings])
def test_a_tied_embedding_needs_its_sum_over_pp(name, on_ranks):
    """A missing sum over pp would be seen: no rank's own gradient is the whole sum.

    Except with zbv, where one rank has both the first and the last stage.
    """
    case = CASES[name]
    parts = [rank[name]["own"][P.EMBED] for rank in on_ranks]
    whole = [rank[name]["grads"][P.EMBED] for rank in on_ranks]
    if case.pipeline.schedule == "zbv":
        assert any(torch.equal(part, total) for part, total in zip(parts, whole))
    else:
        assert all((part - total).norm() > 0.1 * total.norm() for part, total in zip(parts, whole))


@pytest.mark.parametrize("name", CASES)
def test_messages_are_those_of_the_formula(name, on_ranks):
    """They are counted in a second call, because in the first one torch also tests the connections."""
    case = CASES[name]
    for rank in on_ranks:
        axes = rank[name]["axes"]
        shape = axes.shape
        tokens = ROWS * LENGTH // (case.microbatches * shape.dp * shape.ep * shape.cp * shape.tp)
        stages = make_slices(case.cfg, case.pipeline, shape.pp)
        sizes = (case.microbatches, tokens, case.cfg.hidden_size, torch.float64)
        there, back = pipeline_traffic(stages, axes.pp.index, *sizes)
        assert rank[name]["sends"] == (there.messages + back.messages, there.bytes + back.bytes)


@pytest.mark.parametrize(
    "changes, pipeline, execution, microbatches, words",
    [
        ({}, ONE_STAGE, Execution(compile="step"), 4, "write config.compile=block"),
        ({"gradient_checkpointing": "selective"}, ZBV, Execution(), 4, "write none or full"),
        (MOE | {"router_balance": "hf"}, ONE_STAGE, Execution(), 4, "router_balance=global or micro"),
        (MOE | {"router_balance": "global_exact"}, ONE_STAGE, Execution(), 4, "router_balance=global or micro"),
        ({}, ONE_STAGE, Execution(), 1, "write at least 2"),
        ({}, ZERO, Execution(), 5, "write 4 or 6"),
        ({"num_hidden_layers": 5}, INTERLEAVED, Execution(), 4, "leaves a stage empty"),
    ],
)
def test_what_a_pipeline_cannot_run_is_an_error(changes, pipeline, execution, microbatches, words):
    with pytest.raises(UserError, match=words):
        check(config(**{"num_hidden_layers": 4} | changes), pipeline, execution.compile, 2, microbatches)
