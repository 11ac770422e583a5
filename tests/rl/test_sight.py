"""Reinforcement learning on questions about images: packed rows, log-probabilities, runs of a small model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.grpo import get_config
from qwen3f import cli, model, params, presets
from qwen3f.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from qwen3f.errors import UserError
from qwen3f.infer.pictures import Pictures
from qwen3f.interop import hf
from qwen3f.rl import packing
from qwen3f.rl.packing import Document, pack_updates
from qwen3f.rl.questions import encode
from qwen3f.rl.sight import Sight, with_pixels
from qwen3f.tasks.task import Question
from qwen3f.tasks.visual import VisualTask
from qwen3f.train.outputs import make_outputs

LIMITS = (32 * 32, 64 * 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(a Hugging Face directory of a smaller nano_vl, its config, its parameters, its tokenizer)."""
    place = tmp_path_factory.mktemp("sight")
    words = [f"{question.prompt} {question.gold}\n" for question, _ in zip(VisualTask().questions("train"), range(80))]
    tokenizer = train_sentencepiece(words, 350, place / "t.model")
    cfg = presets.get("nano_vl").replace(vocab_size=350, num_hidden_layers=2, vision_num_hidden_layers=2)
    p = params.init_params(cfg.replace(initializer_range=0.2), 1)
    hf.save_pretrained(place / "hf", cfg, p, tokenizer)
    return str(place / "hf"), cfg, p, tokenizer


def image(size, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_a_rows_numbers_are_those_of_each_document_alone(source):
    """Log-probabilities of answers in packed rows against the model on one prompt and its own images. 1e-5, since in
    fp32 the same products round differently in other shapes."""
    _, cfg, p, tokenizer = source
    sight = Sight(cfg, *LIMITS)
    questions = [
        Question("What is it?", "x", images=(image((64, 48), 0),)),
        Question("And of both?", "x", images=(image((32, 80), 1), image((40, 40), 2))),
        Question("How are you?", "x"),
    ]
    groups = []
    for number, question in enumerate(questions):
        ids, seen = encode(tokenizer, question, False, sight), sight.look(question.images)
        groups.append([Document(ids, [20 + number, 30, 40 + i], [0.0] * 3, 1.0, True, seen) for i in range(2)])
    packed = pack_updates(groups, 2, 256, 1, tokenizer.pad_id, cfg)
    assert {key: values.shape[1:] for key, values in packed[0].items()} == {
        key: values.shape[1:] for key, values in packed[1].items()
    }
    outputs, found = make_outputs(cfg), []
    for rows in packed:
        batch = {key: torch.from_numpy(values) for key, values in rows.items() if key != "sampler_logprobs"}
        logs = outputs(p, batch)
        found += [
            (batch["targets"][r][mine].tolist(), logs[r][mine])
            for r in range(len(logs))
            for segment in range(1, int(batch["segments"][r].max()) + 1)
            for mine in [(batch["segments"][r] == segment) & (batch["loss_weights"][r] != 0)]
        ]
    assert len(found) == 6
    for documents in groups:
        for document in documents:
            tokens = torch.tensor([[*document.prompt, *document.ids]])
            alone = {"tokens": tokens}
            if document.pictures is not None:
                alone |= {"pixel_values": document.pictures.pixels[None], "grids": document.pictures.grids[None]}
            logs = model.apply(cfg, p, alone).logits[0].log_softmax(-1)
            expected = logs[len(document.prompt) - 1 : -1].gather(-1, torch.tensor(document.ids)[:, None])[:, 0]
            got = next(values for ids, values in found if ids == list(document.ids))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def configure(source, **changes):
    config = get_config("nano")
    parts = {
        "init_from": source[0], "device": "cpu", "tasks": "visual", "steps": 2, "batch_size": 2, "rollout.samples": 3,
        "rollout.draws": 1, "rollout.max_new_tokens": 4, "rollout.microbatch_rows": 1, "rollout.thinking": False,
        "rewards": "correct=1", "data.max_samples": 8, "data.min_pixels": LIMITS[0],
        "data.max_pixels": LIMITS[1], "data.picture_kinds": "shapes", "eval.questions": 3, "eval.every": 2,
        "eval.max_new_tokens": 4, "model.vision_enabled": True, "judge.processes": 1, "grpo.kl_coef": 0.01,
    }  # fmt: skip
    with config.ignore_type():
        config.update_from_flattened_dict({**parts, **changes})
    return config


def gaps(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["sampler_gap"] for line in lines if "sampler_gap" in line}


def test_a_run_learns_from_what_it_sees(source, tmp_path, monkeypatch):
    """Sampler and trainer see the same images, so their log-probabilities differ little. A small difference remains:
    the sampler never draws the 4 ids of images, of 350 ids, to which this untrained model gives some probability. If
    the trainer gets black images instead, the difference is far larger."""
    cli.run_stage(configure(source), tmp_path / "W", False, ["model.vision_enabled"])
    seen = gaps(tmp_path / "W")
    assert [*seen] == [1, 2]
    assert max(seen.values()) < 0.1
    assert '"val_accuracy"' in (tmp_path / "W" / "metrics.jsonl").read_text()
    samples = (tmp_path / "W" / "samples" / "step-00000001.jsonl").read_text().splitlines()
    assert {json.loads(sample)["task"] for sample in samples} == {"visual"}

    def others(rows, shown, cfg):
        dark = [[Pictures(torch.zeros_like(one.pixels), one.grids) for one in row] for row in shown]
        return with_pixels(rows, dark, cfg)

    monkeypatch.setattr(packing, "with_pixels", others)
    cli.run_stage(configure(source), tmp_path / "dark", False, ["model.vision_enabled"])
    assert min(gaps(tmp_path / "dark").values()) > 3 * max(seen.values())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model.vision_enabled": False}, "the run's model has no vision tower; write --config.model.vision_enabled"),
        ({"mesh": "dp2"}, r"leave --config\.mesh out"),
        ({"attention": "invariant"}, r"leave --config\.attention out"),
        ({"data.picture_kinds": "shape"}, "picture_kinds='shape'"),
        ({"data.min_side": 3}, "min_side"),
        ({"data.min_pixels": 10**6}, "min_pixels"),
    ],
)
def test_what_cannot_run_is_said_before(source, tmp_path, changes, words):
    config = configure(source, **changes)
    with pytest.raises(UserError, match=words):
        cli.run_stage(config, tmp_path, False, ["model.vision_enabled"])
