"""Answers in a run are those of a plain decoding loop, whatever rank writes them; errors reach all ranks."""

from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from qwen3f import params
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import TrainingError, UserError
from qwen3f.infer.generate import generate
from qwen3f.interop import source
from qwen3f.preference.sampling import Sampler, SamplerOptions
from qwen3f.processes.world import ALONE, open_world
from qwen3f.train.setup import make_setup
from qwen3f.train.stage import Run
from qwen3f.train.state import init_state
from sharding.mesh import parse_mesh
from tests.sharding.worlds import run_processes
from tests.stages import toy_pairs

PROMPTS = [[5, 6, 7], [9] * 30, [1, 2]]
OPTIONS = SamplerOptions(max_new_tokens=12, cache_tokens=512)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("sampling")
    toy_pairs.write_data(place)
    return place


def opened(root, world=ALONE, mesh="", options=OPTIONS):
    setup = make_setup(ConfigDict(toy_pairs.online_config(root, mesh=mesh)), world.size).on(world.axes)
    run = Run(setup, root, world, False, lambda: False)
    state = init_state(
        setup.model, 3, dtype=torch.float64, **({"layout": setup.layout, "mesh": world.mesh} if mesh else {})
    )
    tokenizer = load_tokenizer(source.tokenizer_path(str(root / "dense")))
    return Sampler(run, setup.model, tokenizer, options), state.params, tokenizer


def test_greedy_answers_are_those_of_generate(root):
    sampler, weights, tokenizer = opened(root)
    for prompt, (answer,) in zip(PROMPTS, sampler.answers(weights, PROMPTS, 1, 0.0, "x"), strict=True):
        options = {"max_new_tokens": 12, "stop_ids": tokenizer.stop_ids, "num_ids": tokenizer.vocab_size}
        cfg = make_setup(toy_pairs.online_config(root)).model
        expected = generate(cfg, weights, torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert list(answer.ids) == expected[: len(answer.ids)]
        assert answer.ended == (answer.ids[-1] in tokenizer.stop_ids)
        assert answer.ended or len(answer.ids) == 12
        assert answer.text == tokenizer.decode(answer.ids[: len(answer.ids) - answer.ended])


def test_answers_depend_on_key_prompt_and_number_alone(root):
    sampler, weights, _ = opened(root)
    first = sampler.answers(weights, PROMPTS, 3, 1.0, 7, "step", 1)
    assert sampler.answers(weights, PROMPTS, 3, 1.0, 7, "step", 1) == first
    assert opened(root)[0].answers(weights, PROMPTS, 3, 1.0, 7, "step", 1) == first
    assert sampler.answers(weights, PROMPTS, 3, 1.0, 7, "step", 2) != first
    assert len({answer.ids for answer in first[0]}) == 3
    other = {path: leaf * 1.5 for path, leaf in weights.items()}
    assert sampler.answers(other, PROMPTS, 3, 1.0, 7, "step", 1) != first
    assert sampler.answers(weights, [], 3, 1.0, 7) == []


def test_weights_that_are_not_finite_are_an_error(root):
    sampler, weights, _ = opened(root)
    bad = dict(weights)
    bad[params.FINAL_NORM] = torch.full_like(weights[params.FINAL_NORM], float("nan"))
    with pytest.raises(TrainingError, match="an answer could not be written: error: the model's logits"):
        sampler.answers(bad, PROMPTS, 1, 1.0, "x")


def test_a_cache_that_is_too_small_is_named_by_its_key(root):
    sampler, weights, _ = opened(root, options=SamplerOptions(60, 64, "config.eval.cache_tokens"))
    with pytest.raises(UserError, match="does not fit the cache of 64; raise config.eval.cache_tokens or shorten it"):
        sampler.answers(weights, PROMPTS, 1, 0.0, "x")


def on_ranks(rank, mesh, root):
    sampler, weights, _ = opened(Path(root), open_world(parse_mesh(mesh), "cpu", rank), mesh)
    answers = sampler.answers(weights, PROMPTS[:1], 1, 1.0, "x")  # one prompt: only one rank has work
    prompts = [PROMPTS[0], [7] * 600]
    try:  # the second rank's prompt does not fit the model
        sampler.answers(weights, prompts, 1, 1.0, "x")
    except UserError as error:
        return [tuple(answer) for answer in answers[0]], str(error)
    return None


def test_ranks_write_the_same_answers_and_fail_together(root):
    sampler, weights, _ = opened(root)
    expected = [tuple(answer) for answer in sampler.answers(weights, PROMPTS[:1], 1, 1.0, "x")[0]]
    for found, words in run_processes(on_ranks, 2, "pp2", str(root)):
        assert found == expected
        assert "600 tokens" in words or "612 tokens" in words
