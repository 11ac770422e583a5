"""Plans of meshes, against real states and shards and against the model's FLOP count."""

import io
import math
import time

import pytest
import torch
from PIL import Image

from qwen3f import cli, presets
from qwen3f.errors import UserError
from qwen3f.model import Execution
from qwen3f.params import LAYERS, abstract_params
from qwen3f.plan import work
from qwen3f.plan.case import Case
from qwen3f.plan.config import from_config
from qwen3f.plan.hardware import TABLE, parse_hardware
from qwen3f.plan.make import by_policy, make
from qwen3f.plan.memory import leaves, state_bytes
from qwen3f.plan.picture import mesh_png, timeline_png
from qwen3f.plan.text import bytes_of, render
from qwen3f.plan.traffic import members
from qwen3f.train.hyper import make_hyper
from qwen3f.train.metrics import flops_per_token
from qwen3f.train.state import init_state
from sharding.mesh import parse_mesh
from sharding.pipeline.cut import Pipeline

H100 = TABLE["h100"]


def setup(preset="debug", mesh="", batch=8, length=256, model=None, **options):
    cfg = presets.get(preset).replace(**(model or {}))
    return Case(cfg, parse_mesh(mesh), batch, length, options.pop("hardware", H100), **options)


@pytest.mark.parametrize("preset, kind", [("debug", "adamw"), ("debug_moe", "adamw"), ("nano", "muon")])
def test_state_of_one_device_is_exact(preset, kind):
    hyper, small = make_hyper(kind), {"num_hidden_layers": 2, "vocab_size": 64}
    state = init_state(presets.get(preset).replace(**small), 0, hyper)
    there = [sum(x.nbytes for x in tree.values()) for tree in (state.params, state.opt.m, state.opt.v)]
    here = setup(preset, model=small, hyper=hyper)
    assert state_bytes(here, leaves(here)) == (there[0], there[1] + there[2])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("rates", ["", r"model\.layers\..*=0", r"model\.embed_tokens\..*=0,.*norm.*=0.1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_state_of_frozen_leaves_and_of_any_dtype_is_exact(kind, rates, dtype):
    hyper, small = make_hyper(kind, rates=rates), {"num_hidden_layers": 2, "vocab_size": 64}
    master = torch.promote_types(dtype, torch.float32)
    state = init_state(presets.get("debug").replace(**small), 0, hyper, dtype=master, device="meta")
    there = [sum(x.nbytes for x in tree.values()) for tree in (state.params, state.opt.m, state.opt.v)]
    here = setup(model=small, hyper=hyper, compute=dtype)
    memory = make(here).memory[0]
    assert (memory.parameters, memory.optimizer) == (there[0], there[1] + there[2])
    assert memory.copy == (sum(x.numel() * 2 for x in state.params.values()) if dtype is torch.bfloat16 else 0)
    assert memory.gradients == sum(x.numel() * dtype.itemsize for x in state.opt.m.values())
    summed = make(setup(model=small, hyper=hyper, compute=dtype, microbatches=2)).memory[0]
    assert summed.sums == sum(x.nbytes for x in state.opt.m.values()) + memory.gradients


def test_frozen_layers_leave_room():
    """Frozen layers have no moments and gradients, so the peak is lower by both, and the step is faster."""
    for mesh in ("", "dr2", "dp2", "pp2"):
        options = {"preset": "qwen3-0.6b", "mesh": mesh, "microbatches": 2, "model": {"gradient_checkpointing": "full"}}
        whole = make(setup(**options))
        frozen = make(setup(**options, hyper=make_hyper("adamw", rates=r"model\.layers\..*=0")))
        for a, b in zip(whole.memory, frozen.memory, strict=True):
            elements = sum(leaf.elements for leaf in whole.leaves if leaf.stack)
            assert a.optimizer - b.optimizer == 8 * elements
            assert a.peak - b.peak >= a.optimizer - b.optimizer + 4 * elements
        assert frozen.time.step < whole.time.step


def test_a_scalar_head_makes_no_logits():
    at = setup(model={"scalar_head": True})
    head, hidden = work.head(at), at.tokens * at.model.hidden_size
    assert [part.products for part in (head.forward, head.backward_input, head.backward_weight)] == [2.0 * hidden] * 3
    assert make(at).memory[0].loss == 2 * hidden * at.itemsize


def test_layers_of_each_kind_and_of_a_tower_are_gathered_as_often_as_there_are():
    """Without recomputation all gathered layers stay in memory, and two more of the language model beside them."""
    mixed = presets.get("debug_moe").replace(num_hidden_layers=5, mlp_only_layers=(0, 3))
    for cfg in (mixed, presets.get("debug_vl")):
        at = Case(cfg, parse_mesh("dp2"), 8, 256, H100)
        whole = sum(spec.numel for spec in abstract_params(cfg).values())
        beside = sum(leaf.gathered for leaf in leaves(at) if leaf.stack == LAYERS)
        assert make(at).memory[0].gathered == at.itemsize * (whole + 2 * beside)


# -- placements and work over a mesh -----------------------------------------------------------------------------------

MESHES = ("dp2", "dr2", "tp2", "cp2", "ep2", "pp2", "dp3,cp2", "dp2,tp2,pp2", "dp2,ep2,cp2,tp2,pp2", "pp3", "dp4,tp4")
MESHES += ("dr3,dp2,tp2", "dr3,dp2,ep2,pp2")
# five layers: the last of two or three stages is padded
MESHED = {"batch": 48, "length": 384, "microbatches": 4, "model": {"num_hidden_layers": 5}}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("preset", ["debug", "debug_moe"])
def test_shards_of_all_ranks_make_the_whole(preset, mesh):
    """A rank's elements of a leaf, times ranks, divided by copies: the leaf's size, with the pipeline's padding."""
    at = setup(preset, mesh, **MESHED)
    size = at.mesh.size
    for leaf in leaves(at):
        copies = math.prod(getattr(at.mesh, axis) for axis in leaf.replicated)
        padded = list(leaf.shape)
        if leaf.stack:
            padded[0] = at.cut.height * at.mesh.pp
        assert leaf.elements * size == math.prod(padded) * copies, leaf.path
        whole = math.prod(leaf.local_shape) // (leaf.local_shape[0] if leaf.stack else 1)
        assert leaf.gathered == whole * math.prod(getattr(at.mesh, axis) for axis in leaf.fsdp)


@pytest.mark.parametrize("mesh", ["", *MESHES])
@pytest.mark.parametrize("preset", ["debug", "debug_moe"])
def test_products_of_all_ranks_are_the_models(preset, mesh):
    """Forward and backward products of a step, all ranks: 6 FLOPs a parameter and token, as flops_per_token counts.

    Key/value heads that tp replicates and logits that a cut vocabulary computes twice come on top, exactly.
    """
    at = setup(preset, mesh, **MESHED)
    cfg, mesh = at.model, at.mesh
    layers = [work.layer(at, cfg.is_sparse(layer)) for layer in range(cfg.num_hidden_layers)]
    passes = [*layers, work.head(at)]
    done = [w for p in passes for w in (p.forward, p.backward_input, p.backward_weight)]
    ranks = mesh.size // mesh.pp  # a layer is on one pipeline rank
    products = ranks * at.microbatches * sum(w.products + w.grouped for w in done)
    tokens = at.batch_size * at.seq_len
    wanted = 6.0 * cfg.matmul_params() * tokens
    if mesh.tp > 1:
        wanted += 2.0 * cfg.vocab_size * cfg.hidden_size * tokens
    copies = at.kv_heads * mesh.tp - cfg.num_key_value_heads
    wanted += 6.0 * cfg.num_hidden_layers * 2 * copies * cfg.head_dim * cfg.hidden_size * tokens
    if cfg.num_experts:  # every rank of tp routes all tokens
        wanted += 6.0 * (mesh.tp - 1) * len(cfg.sparse_layers) * cfg.num_experts * cfg.hidden_size * tokens
    assert products == pytest.approx(wanted, rel=1e-12)
    scores = ranks * at.microbatches * sum(w.attention_forward for w in done)
    counted = tokens * (flops_per_token(cfg, at.seq_len) - 6.0 * cfg.matmul_params())
    assert scores * 3 == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize(
    "experiment, with_it, without",
    [
        ("dpo", {"dpo.reference_log_probs": "live"}, {"dpo.reference_log_probs": "cached"}),
        ("grpo", {"grpo.kl_coef": 0.1}, {"grpo.kl_coef": 0.0}),
        ("dpo_online", {}, None),
    ],
)
def test_a_reference_in_memory_is_counted(experiment, with_it, without):
    def planned(changes):
        config = cli.load_experiment(f"experiments/{experiment}.py:debug")
        config.update_from_flattened_dict({"mesh": "dp2,tp2", "microbatches": 1, **changes})
        return make(from_config(config))

    plan = planned(with_it)
    (rank,) = plan.memory
    assert rank.reference == rank.parameters // 2 > 0  # bfloat16 beside float32
    assert "\nparameters of the reference  " in render(plan, by_policy(plan.setup))
    if without is not None:
        assert planned(without).memory[0].reference == 0
        assert plan.peak - planned(without).peak == rank.reference


@pytest.mark.parametrize("mesh, parts", [("", 64), ("dp2", 32), ("dp2,pp2", 32), ("dp3", 24)])
def test_micro_batches_of_answers_are_those_of_the_run(mesh, parts):
    """A micro-batch has config.rollout.microbatch_rows rows, however many prompts. Memory depends on these rows."""
    config = cli.load_experiment("experiments/grpo.py:debug")
    config.mesh, config.microbatches, config.batch_size, config.updates, config.eval.batch_size = mesh, 4, 24, 3, 24
    config.rollout.update(samples=16, microbatch_rows=2)
    case = from_config(config)
    assert (case.rows, case.microbatches) == (2, parts)
    assert "a row for every answer, the largest possible" in render(make(case), {}, None)


@pytest.mark.parametrize(
    "experiment, changes, words",
    [
        ("dpo", {"dpo.beta": -1.0}, "--config.dpo.beta=-1.0: write a positive number"),
        ("grpo", {"rollout.max_new_tokens": 10**5}, "--config.rollout.max_new_tokens=100000 leaves no room"),
        ("pretrain_s1", {"eval.benchmarks": "poems"}, "--config.eval.benchmarks"),
    ],
)
def test_what_a_stage_refuses_its_plan_refuses(experiment, changes, words):
    config = cli.load_experiment(f"experiments/{experiment}.py:nano")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        from_config(config)


# -- nodes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mesh, axes, wanted",
    [
        ("dp8", ("dp",), (8, 8)),
        ("dp16", ("dp",), (16, 8)),
        ("dp8,tp2", ("dp",), (8, 4)),
        ("dp8,tp2", ("tp",), (2, 2)),
        ("dp8,tp8", ("dp",), (8, 1)),
        ("dr2,dp8", ("dp",), (8, 8)),
        ("dr2,dp8", ("dr",), (2, 1)),
        ("dr2,dp2,tp2", ("dr", "dp"), (4, 4)),
        ("pp4,dp2,tp2", ("pp",), (4, 2)),
        ("pp4,dp8", ("pp",), (4, 1)),
        ("dp4,cp2,tp2", ("dp", "cp"), (8, 4)),
        ("tp3,dp4", ("tp",), (3, 1)),  # some of these groups lie on two nodes
        ("tp3,dp2", ("tp",), (3, 3)),
    ],
)
def test_who_shares_a_node(mesh, axes, wanted):
    assert members(parse_mesh(mesh), H100, axes) == wanted


# -- the whole plan ----------------------------------------------------------------------------------------------------

LARGE = {"batch": 1024, "length": 4096, "microbatches": 16, "model": {"gradient_checkpointing": "full"}}


@pytest.mark.parametrize("mesh", ["dp8,tp2,pp4", "dp64,tp2,pp4", "dp8,ep8,tp2,pp4"])
def test_large_plans_in_seconds(mesh):
    at, began = setup("large", mesh, **LARGE), time.perf_counter()
    policies = by_policy(at)
    text = render(plan := policies["full"], policies)
    assert time.perf_counter() - began < 5.0
    assert [len(at.cut.layers_of(i)) for i in range(4)] == [24, 24, 24, 22]
    assert "94 layers in 4 stages of 24 (2 of them padding)" in text
    assert all(leaf.local_shape[0] == 24 for leaf in plan.leaves if leaf.stack)
    assert {line.op for line in plan.collectives} >= {"gather", "reduce_scatter", "all_reduce", "send"}
    kept = {policy: sum(size for _, size in p.memory[0].activations) for policy, p in policies.items()}
    assert kept["full"] < min(kept["selective"], kept["none"])
    assert kept["selective"] < kept["none"] or at.mesh.ep > 1  # results of experts on other ranks are kept twice
    assert 0 < plan.time.mfu < 0.75
    parts = plan.time.compute + plan.time.exposed + plan.time.waiting + plan.time.update
    assert parts == pytest.approx(plan.time.step)


def test_the_first_stage_of_large_resolves_on_its_mesh():
    config = cli.load_experiment("experiments/pretrain_s1.py:large")
    config.mesh = "dp8,tp2,pp4"
    plan = make(from_config(config))
    assert plan.setup.mesh.size == 64
    assert [len(slots) for slots in plan.timeline.ranks] == [16] * 4


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"mesh": "tp3", "length": 384, "model": {"vocab_size": 300}},
            "q_proj.weight: dim 1 (8 heads) doesn't divide by tp=3",
        ),
        ({"mesh": "dp3"}, "config.batch_size=8 doesn't divide by dp=3"),
        ({"mesh": "cp3"}, "cannot be cut over cp=3"),
        ({"preset": "debug_moe", "mesh": "ep3", "batch": 9}, "(8 experts) doesn't divide by ep=3"),
        ({"mesh": "pp4", "microbatches": 8, "model": {"num_hidden_layers": 5}}, "leaves a stage empty"),
        (
            {"preset": "debug_moe", "mesh": "pp2", "microbatches": 2, "model": {"decoder_sparse_step": 2}},
            "every stage needs the same number of each",
        ),
        ({"mesh": "pp2"}, "config.microbatches=1 leaves ranks of pp2 without work; write at least 2"),
        ({"mesh": "pp2", "microbatches": 3, "pipeline": Pipeline("interleaved", 2)}, "makes 4 stages of"),
        ({"mesh": "dp2", "model": {"attention_dropout": 0.1}}, "set it to 0"),
        ({"preset": "debug_moe", "mesh": "ep2", "execution": Execution("step")}, "write compile=block"),
    ],
)
def test_what_does_not_divide_is_an_error_of_one_line(options, words):
    with pytest.raises(UserError) as caught:
        make(setup(**options))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("h10", "did you mean 'h100'?"),
        ("h100,nodes=4", "unknown key 'nodes'; did you mean 'node'?"),
        ("h100,node=2.5", "node='2.5' is not a whole number"),
        ("h100,link=-1", "link='-1' is not a positive number"),
        ("h100,link", "link='' is not a positive number"),
    ],
)
def test_hardware_in_words(text, words):
    with pytest.raises(UserError) as caught:
        parse_hardware(text)
    assert words in str(caught.value)


def test_hardware_can_be_changed():
    assert parse_hardware("h200") == TABLE["h200"]
    got = parse_hardware("h100, node=4, products=6e14")
    assert (got.node, got.products, got.copy) == (4, 6e14, H100.copy)
    slow, fast = (make(setup(mesh="tp2", hardware=parse_hardware(f"h100,link={rate}"))) for rate in ("1e9", "1e12"))
    assert slow.time.exposed > 10 * fast.time.exposed


def test_bytes_in_words():
    assert [bytes_of(x) for x in (0, 1023, 1536, 2**30, 5e15)] == ["0 B", "1023 B", "1.5 KiB", "1 GiB", "4.441 PiB"]


def test_command_prints_and_draws(tmp_path, capsys):
    """Run the plan as launch.py does."""
    config = cli.load_experiment("experiments/pretrain_s1.py:debug_moe")
    config.mesh, config.plan, config.microbatches, config.seq_len = "dp2,ep2,tp2,pp2", True, 4, 256
    cli.run_stage(config, tmp_path, False)
    out = capsys.readouterr().out
    for words in ("plan: 16 × h100", "rows of experts, forward", "[6, 8, 688, 256]", "bubble", "MFU", "timeline.png"):
        assert words in out
    plan = make(from_config(config))
    for name, drawn in (("mesh.png", mesh_png(plan)), ("timeline.png", timeline_png(plan))):
        with Image.open(tmp_path / "plan" / name) as image:
            assert image.size == Image.open(io.BytesIO(drawn)).size
            assert len(image.convert("RGB").getcolors(1 << 24)) > 4  # not a blank page


def test_without_devices_nothing_is_allocated():
    """A plan of 235B parameters makes no tensor at all."""

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            Counter.calls += isinstance(out, torch.Tensor)
            return out

    with Counter():
        make(setup("large", "dp8,tp2,pp4", **LARGE))
    assert Counter.calls == 0
