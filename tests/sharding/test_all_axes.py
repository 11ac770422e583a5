"""A pipeline with the other axes, up to all five at once, equals one device: the step in float64 to 1e-10.

torch's schedules need processes, so pp2,dp2,ep2,cp2,tp2 is 32 of them. Rows are packed documents, the mixture of
experts has an odd number of layers, and the embedding is tied.
"""

import pytest
import torch

from qwen3f.stages.pretrain import make_train_step
from qwen3f.train.optimizer import AdamW
from qwen3f.train.outputs import make_eval_step
from qwen3f.train.state import init_state
from sharding.axes import axes_of, make_mesh
from sharding.fsdp import cut
from sharding.layout import Layout
from sharding.mesh import parse_mesh
from sharding.pipeline.cut import Pipeline, make_slices, store
from sharding.state import local_shards
from tests.sharding.steps import MOE, SCHEDULE, batches, config, on_one_device, share
from tests.sharding.worlds import run_processes

STEPS, MICROBATCHES = 2, 2
CFG = config(**MOE | {"num_hidden_layers": 3, "tie_word_embeddings": True})
CASES = {
    8: {"pp2,dp2,tp2": Pipeline(), "pp2,ep2,cp2": Pipeline("zero_bubble"), "pp2,dp2,cp2": Pipeline()},
    32: {"pp2,dp2,ep2,cp2,tp2": Pipeline()},
}


def on_rank(rank, cases):
    out = {}
    for mesh, pipeline in cases.items():
        shape = parse_mesh(mesh)
        device_mesh = make_mesh(shape, "cpu")
        layout = Layout(axes_of(device_mesh), pipeline=pipeline)
        current = init_state(CFG, 0, dtype=torch.float64, layout=layout, mesh=device_mesh)
        step = make_train_step(CFG, AdamW(), SCHEDULE, microbatches=MICROBATCHES, layout=layout)
        for batch in batches(STEPS):
            mine = share(batch, shape, rank, MICROBATCHES)
            current, metrics = step(current, mine)
        sums = make_eval_step(CFG, microbatches=MICROBATCHES, layout=layout)(current.params, mine)
        out[mesh] = layout, local_shards(current.params), metrics, sums
    return out


@pytest.mark.parametrize("world", [8, pytest.param(32, marks=pytest.mark.nightly)])
def test_a_pipeline_with_other_axes_equals_one_device(world):
    got = run_processes(on_rank, world, CASES[world])
    state, metrics = on_one_device(CFG, steps=STEPS, microbatches=MICROBATCHES)[-1]
    validation = make_eval_step(CFG)(state.params, batches(STEPS)[-1])
    for rank in got:
        for layout, params, found, sums in rank.values():
            stages = make_slices(CFG, layout.pipeline, layout.axes.pp.size)
            expected = cut(store(CFG, state.params, stages), layout.place(CFG), layout.axes)
            torch.testing.assert_close(params, expected, rtol=0, atol=1e-10)
            torch.testing.assert_close(found, metrics, rtol=0, atol=1e-10)
            torch.testing.assert_close(sums, validation, rtol=0, atol=1e-10)
