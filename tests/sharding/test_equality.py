"""A training step on a mesh computes what it computes on one device.

Compared after each of two AdamW steps, on every rank: loss, gradient norm and all other metrics, parameters, and both
moments. After the first step the moments show the gradients. float64 to 1e-10: only the order of sums differs.
"""

import pytest
import torch

from qwen3f import tree
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train.hyper import AdamW, Muon
from qwen3f.train.state import init_state
from tests.sharding.steps import MOE, SCHEDULE, batches, config, expected_on, on_local_world, on_one_device

# name: (changes of the config, micro-batches, FSDP, meshes, meshes of the nightly run)
CASES = {
    "dense": (
        {}, 1, True,
        ["dp2", "cp2", "tp2", "dp2,tp2", "dp2,ep2,cp2,tp2"],
        ["ep2", "dp4", "cp4", "tp4", "dp2,ep2", "dp2,cp2", "dp2,tp4", "cp2,tp2", "dp2,ep2,tp2"],
    ),
    "replicated": ({}, 1, False, ["dp2,tp2"], ["dp2"]),
    "tied, accumulation": ({"tie_word_embeddings": True}, 2, True, ["cp2,tp2"], ["dp2", "tp2", "dp2,tp4"]),
    "tied, replicated": ({"tie_word_embeddings": True}, 1, False, ["dp2,tp2"], []),
    "bias, recomputed": ({"attention_bias": True, "gradient_checkpointing": "full"}, 1, True, ["dp2,cp2"], ["dp2,tp4"]),
    "selective": ({"gradient_checkpointing": "selective"}, 1, True, ["cp2,tp2"], ["dp2,tp2"]),
    "odd width": ({"hidden_size": 22}, 1, True, ["dp4"], []),  # 22 doesn't divide by 4: some leaves stay whole
    "l2 norm, three layers": ({"qk_norm": "l2", "num_hidden_layers": 3}, 1, True, ["dp2,tp2"], []),
    "moe": (
        MOE, 1, True,
        ["ep4", "ep2,cp2", "dp2,ep2,tp2"],
        ["dp2", "ep2", "cp2", "tp2", "dp2,ep2", "dp2,tp2", "ep2,tp2"],
    ),
    "moe, replicated": (MOE, 1, False, ["dp2,ep2"], []),
    "moe, recomputed": (MOE | {"gradient_checkpointing": "selective"}, 2, True, ["dp2,ep2"], []),
    "moe and dense layers": (MOE | {"mlp_only_layers": (0,)}, 1, True, ["dp2,ep2"], []),
    "moe, global": (MOE | {"router_balance": "global"}, 2, True, ["dp2,tp2"], []),
    "moe, global_exact": (MOE | {"router_balance": "global_exact"}, 2, True, ["ep2"], []),
    "moe, hf": (MOE | {"router_balance": "hf"}, 1, True, ["dp2"], []),
    "moe, micro": (MOE | {"router_balance": "micro"}, 1, True, ["ep2,tp2"], []),
}  # fmt: skip
PAIRS = [(name, mesh) for name, case in CASES.items() for mesh in case[3]]
AT_NIGHT = [pytest.param(name, mesh, marks=pytest.mark.nightly) for name, case in CASES.items() for mesh in case[4]]


def compare(got, expected, tolerance=1e-10):
    """Leaf by leaf, rank by rank."""
    wanted, found = tree.named_leaves(expected), tree.named_leaves(got)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name, mesh", PAIRS + AT_NIGHT)
def test_a_mesh_equals_one_device(name, mesh):
    changes, microbatches, fsdp, *_ = CASES[name]
    cfg, run = config(**changes), {"microbatches": microbatches, "steps": 2}
    _, *expected = on_one_device(cfg, **run)
    got = on_local_world(cfg, mesh, fsdp=fsdp, **run)
    for (whole, metrics), (shards, on_ranks) in zip(expected, got, strict=True):
        assert on_ranks.keys() == metrics.keys()
        for key, value in metrics.items():
            for rank_value in on_ranks[key]:
                torch.testing.assert_close(rank_value, value, rtol=0, atol=1e-10 if value.is_floating_point() else 0)
        compare(shards, expected_on(whole, cfg, mesh, fsdp))


@pytest.mark.parametrize(
    "changes, mesh, fsdp",
    [
        ({}, "dp2", True),
        ({}, "dp2,tp2", True),
        ({"num_hidden_layers": 3, "tie_word_embeddings": True}, "cp2,tp2", True),  # 3 layers over 2 ranks
        ({"num_hidden_layers": 1}, "dp4", True),  # three ranks have no layer to work on
        ({}, "dr2,tp2", False),
        (MOE, "ep2,tp2", True),
        (MOE | {"mlp_only_layers": (0,)}, "dp2,ep2", True),
        pytest.param({"hidden_size": 22}, "dp4", True, marks=pytest.mark.nightly),
        pytest.param({"num_hidden_layers": 3}, "dp2,cp2,tp2", True, marks=pytest.mark.nightly),
        pytest.param(MOE, "dp2,ep2,tp2", True, marks=pytest.mark.nightly),
        pytest.param(MOE, "tp4", True, marks=pytest.mark.nightly),
    ],
)
def test_muon_on_a_mesh_equals_one_device(changes, mesh, fsdp):
    cfg, hyper = config(**changes), Muon(weight_decay=0.3)
    _, *expected = on_one_device(cfg, hyper=hyper, steps=2)
    got = on_local_world(cfg, mesh, fsdp=fsdp, hyper=hyper, steps=2)
    for (whole, metrics), (shards, on_ranks) in zip(expected, got, strict=True):
        torch.testing.assert_close(on_ranks["loss"][0], metrics["loss"], rtol=0, atol=1e-10)
        compare(shards, expected_on(whole, cfg, mesh, fsdp))


@pytest.mark.parametrize("mesh", ["dp4", "tp4", "dp2,tp2"])
def test_float32_gradients_by_norm(mesh):
    cfg = config()
    _, (whole, metrics) = on_one_device(cfg, dtype=torch.float32, steps=1)
    ((shards, on_ranks),) = on_local_world(cfg, mesh, dtype=torch.float32, steps=1)
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(on_ranks[key][0], metrics[key], rtol=5e-6, atol=0)
    for path, expected in expected_on(whole, cfg, mesh).opt.m.items():
        for got, value in zip(shards.opt.m[path], expected):
            assert (got - value).norm() <= 5e-6 * value.norm(), path


@pytest.mark.parametrize("gather_dtype", [None, torch.float32])
def test_mixed_precision_by_norm(gather_dtype):
    """Master weights in float64, computation in float32. Gradients are summed over ranks in float32, or in float64."""
    cfg, options = config(), {"compute_dtype": torch.float32}
    start = init_state(cfg, 0, dtype=torch.float64)
    whole, metrics = make_train_step(cfg, AdamW(), SCHEDULE, **options)(start, batches(1)[0])
    ((shards, on_ranks),) = on_local_world(cfg, "dp2,tp2", steps=1, gather_dtype=gather_dtype, **options)
    torch.testing.assert_close(on_ranks["grad_norm"][0], metrics["grad_norm"], rtol=5e-6, atol=0, check_dtype=False)
    for path, expected in expected_on(whole, cfg, "dp2,tp2").opt.m.items():
        for got, value in zip(shards.opt.m[path], expected):
            assert (got - value).norm() <= 5e-6 * value.norm(), path
