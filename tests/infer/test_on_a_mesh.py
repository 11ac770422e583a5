"""Generation on a mesh: every rank gets all of the weights, and answers its share of the questions."""

import json

import pytest
import torch

from qwen3f import params, presets
from qwen3f.errors import UserError
from qwen3f.eval.answers import AnswerOptions, answer, answer_on_ranks
from qwen3f.model import EAGER
from qwen3f.processes.world import open_world
from qwen3f.rl.rollout import RolloutOptions, Sampler
from sharding.layout import Layout
from sharding.mesh import parse_mesh
from sharding.pipeline.cut import Pipeline
from sharding.state import as_dtensors, cut_params, whole_params
from tests.sharding.worlds import run_processes
from tests.stages.toy_chats import SMALL, small_tokenizer

PROMPTS = ["a", "what is this", "b" * 40, "c", "no " * 9]
OPTIONS = AnswerOptions(6, temperature=1.0, seed=2)
MESHES = {"dp2": Pipeline(), "tp2": Pipeline(), "pp2": Pipeline("interleaved", 2)}


def on_ranks(rank, folder):
    cfg, whole = model()
    tokenizer = small_tokenizer(folder / str(rank))
    for mesh, pipeline in MESHES.items():
        world = open_world(parse_mesh(mesh), "cpu", rank)
        layout = Layout(world.axes, pipeline=pipeline)
        placed = as_dtensors(cut_params(cfg, whole, layout), cfg, layout, world.mesh)
        got = whole_params(cfg, placed, layout, torch.float64)
        assert all(torch.equal(got[path], whole[path]) for path in whole)
        given = answer_on_ranks(world, cfg, got, tokenizer, PROMPTS, True, OPTIONS)
        sampler = Sampler(cfg, tokenizer, EAGER, world, RolloutOptions(2, 4, 1.0, 8, 0))
        sampler.update(got)
        assert [len(group) for group in sampler([[5, 6], [7], [8, 9]], [0, 1, 2])] == [2, 2, 2]
        with pytest.raises(UserError, match="a prompt is empty"):  # one rank's error is raised on all
            sampler([[5, 6], []], [3, 4])
        (folder / f"{mesh}-{rank}.json").write_text(json.dumps([one.text for one in given]))


def model():
    cfg = presets.get("nano").replace(**{**SMALL, "num_hidden_layers": 7})
    return cfg, params.init_params(cfg, 3, dtype=torch.float64)


@pytest.mark.timeout(300)
def test_weights_are_whole_on_every_rank_and_answers_those_of_one_device(tmp_path):
    (tmp_path / "alone").mkdir()
    expected = [one.text for one in answer(*model(), small_tokenizer(tmp_path / "alone"), PROMPTS, True, OPTIONS)]
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    run_processes(on_ranks, 2, tmp_path)
    for mesh in MESHES:
        for rank in range(2):
            assert json.loads((tmp_path / f"{mesh}-{rank}.json").read_text()) == expected
    assert len(set(expected)) > 1
