"""Plans by the configuration of FSDP: over how many ranks it shards, and in which dtype it sums. Counts of a real step
are in test_plan_counted.
"""

import io

import pytest
import torch
from PIL import Image

from qwen3f import cli, presets
from qwen3f.errors import UserError
from qwen3f.plan.case import Case
from qwen3f.plan.config import from_config
from qwen3f.plan.hardware import TABLE
from qwen3f.plan.make import by_policy, make
from qwen3f.plan.picture import mesh_png
from qwen3f.plan.text import render
from sharding.mesh import parse_mesh


def test_a_schedule_without_selective_recomputation_is_planned_without_it():
    config = cli.load_experiment("experiments/pretrain_s1.py:debug")
    config.mesh, config.batch_size, config.microbatches, config.seq_len = "pp2", 8, 8, 256
    config.pipeline.schedule, config.pipeline.stages, config.model.num_hidden_layers = "zbv", 2, 8
    assert [*by_policy(from_config(config))] == ["none", "full"]


def test_fewer_ranks_may_share_the_weights():
    """Gathers stay in a node. The price is one sum over replicas a step, whatever the number of micro-batches."""
    config = cli.load_experiment("experiments/pretrain_s1.py:debug")
    config.mesh, config.batch_size, config.microbatches, config.seq_len = "dp64", 256, 2, 256
    config.eval.batch_size = 64
    whole = make(from_config(config))
    config.fsdp.shard_size = 8
    plan = make(from_config(config))
    assert (plan.setup.mesh, plan.setup.rows) == (parse_mesh("dr8,dp8"), whole.setup.rows)
    elements = sum(leaf.elements for leaf in plan.leaves)
    assert elements == 8 * sum(leaf.elements for leaf in whole.leaves)
    for line in plan.collectives:
        assert ("dr" in line.axes) == (line.op == "all_reduce" and line.what != "squares of gradients"), line
    (summed,) = (line for line in plan.collectives if line.what == "gradients of replicated leaves")
    assert (summed.axes, summed.calls, summed.bytes) == (("dr",), 1, 4 * elements)
    assert not any(line.what == "gradients of replicated leaves" for line in whole.collectives)
    text = render(plan, by_policy(plan.setup))
    assert "plan: 64 × h100: dr 8 · dp 8\n" in text
    assert "not cut by fsdp" not in text
    assert plan.time.exposed < whole.time.exposed
    assert len(Image.open(io.BytesIO(mesh_png(plan))).convert("RGB").getcolors(1 << 24)) > 4


@pytest.mark.parametrize("policy", ["none", "full"])
def test_gradients_summed_in_float32_are_twice_as_many_bytes(policy):
    def plan(reduce, **options):
        cfg = presets.get("debug").replace(gradient_checkpointing=policy)
        return make(Case(cfg, parse_mesh("dp4"), 8, 256, TABLE["h100"], reduce=reduce, **options))

    def moved(at, op):
        return sum(line.bytes for line in at.collectives if line.op == op)

    narrow, wide = plan("compute"), plan("float32")
    assert moved(wide, "gather") == moved(narrow, "gather")
    assert moved(wide, "reduce_scatter") == 2 * moved(narrow, "reduce_scatter")
    # gradient shards are float32, not bfloat16; but masters are gathered, so there is no bfloat16 copy of weights
    assert (wide.memory[0].copy, narrow.memory[0].copy) == (0, narrow.memory[0].parameters // 2)
    assert wide.memory[0].gradients == 2 * narrow.memory[0].gradients == narrow.memory[0].parameters
    same = [plan(reduce, compute=torch.float32) for reduce in ("compute", "float32")]
    assert same[0].collectives == same[1].collectives
    assert same[0].memory == same[1].memory


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mesh": "dp-1,tp2"}, "dp-1 takes all remaining devices"),
        ({"mesh": "dp8", "fsdp.shard_size": 3}, "config.fsdp.shard_size=3 doesn't fit config.mesh with dp=8"),
        ({"mesh": "dp8", "fsdp.shard_size": 4, "fsdp.enabled": False}, "has no effect with config.fsdp.enabled=False"),
        ({"mesh": "dr2,dp3"}, "config.batch_size=64 doesn't divide by dr=2 · dp=3; make it a multiple of 6"),
        ({"fsdp.reduce": "fp32"}, "config.fsdp.reduce='fp32' is unknown; use one of compute"),
        ({"mesh": "dp2", "checkpoint.backend": "dcp"}, "config.checkpoint.backend=dcp saves one device's state"),
        (
            {"mesh": "dp2,tp2", "optimizer.rates": r"model\.embed_tokenz\..*=0"},
            "matches none of the model's parameters",
        ),
        ({"microbatches": 0, "optimizer.rates": ".*=0"}, "--config.optimizer.rates freezes every parameter"),
        ({"seq_len": 2**20, "init_from": "W"}, "config.seq_len=1048576 exceeds config.model.max_position_embeddings"),
        ({"mesh": "tp2", "attention": "invariant"}, "config.attention=invariant takes a model without experts"),
        ({"schedule.decay_shape": "cubic"}, "config.schedule.decay_shape='cubic' is unknown"),
    ],
)
def test_a_configuration_without_a_plan(changes, words):
    config = cli.load_experiment("experiments/pretrain_s1.py:debug")
    config.batch_size, config.microbatches = 64, 1
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as caught:
        from_config(config)
    assert words in str(caught.value)
