"""The multimodal stage from its configuration: it trains and measures, frozen parts stay, a stopped run resumes."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from qwen3f import params as P
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.corpus import cache_directory
from qwen3f.data.multimodal.tokenizer import trained_tokenizer
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError
from qwen3f.interop import hf
from qwen3f.interop.source import read_model_config, read_params
from qwen3f.stages import multimodal
from qwen3f.stages.configs import multimodal_config
from qwen3f.stages.multimodal import ALIGNER, TOWER
from qwen3f.train import loop
from qwen3f.train.setup import make_setup
from tests.train.runs import metrics


@pytest.fixture
def make(tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"

    def config(**changes):
        c = multimodal_config("nano_vl")
        c.device = "cpu"
        c.data.cache = str(cache)
        c.data.update(
            pictures=300, min_pixels=64 * 64, max_pixels=64 * 64, patches=256, images=4, picture_kinds="shapes"
        )
        c.model.update(num_hidden_layers=2, hidden_size=32, intermediate_size=48, head_dim=16, vocab_size=384)
        c.model.update(mrope_section=(4, 2, 2), vision_hidden_size=32, vision_num_attention_heads=2)
        c.model.update(vision_num_hidden_layers=2, vision_intermediate_size=48, vision_deepstack_layers=(0,))
        c.update(steps=6, batch_size=4, seq_len=128, log_every=3)
        c.schedule.update(peak_lr=1e-2, warmup=0.1)
        c.eval.update(every=0, batch_size=4, max_rows=8)
        c.checkpoint.update(every=3, keep=0)
        c.update_from_flattened_dict(changes)
        return c

    return config


def at(config, workdir, step):
    cfg = read_model_config(str(workdir))
    return read_params(f"{workdir}/checkpoints/{step}", cfg, "cpu", torch.float32)


def test_it_learns_and_measures_answers(make, tmp_path, capsys):
    loop.run(make(steps=12), tmp_path / "w", progress=False)
    said = capsys.readouterr().out
    assert "held-out loss" in said
    assert "exact" in said
    assert "blind" in said
    assert "pictures in" in said
    losses = [line["loss"] for line in metrics(tmp_path / "w")]
    assert losses[-1] < 0.9 * losses[0]


def test_a_tokenizer_of_its_own_has_the_chat_template_that_is_asked_for(make, tmp_path):
    loop.run(make(steps=1, chat_template="instruct-2507"), tmp_path, progress=False)
    assert kind_of(load_tokenizer(tmp_path / "tokenizer")).name == "instruct-2507"


def test_what_is_frozen_keeps_its_bits(make, tmp_path):
    """Only the mergers are trained, as in the first stage of Qwen3-VL."""
    loop.run(make(**{"optimizer.rates": f"{ALIGNER}=1,.*=0"}), tmp_path / "w", progress=False)
    config = make()
    before = P.init_params(make_setup(config).model, config.seed)
    after = at(config, tmp_path / "w", 6)
    moved = {path for path, leaf in after.items() if not torch.equal(leaf, before[path])}
    assert moved
    assert all(path.startswith((P.MERGER, P.TAP_MERGERS)) for path in moved)
    meta = Checkpointer(tmp_path / "w" / "checkpoints", every=0, keep=0)
    assert meta.latest() == 6


def test_patterns_name_all_of_the_tower():
    from qwen3f import presets

    for name in ("nano_vl", "seed_vl"):
        for path in P.abstract_params(presets.get(name)):
            parts = [pattern for pattern in (TOWER, ALIGNER) if re.fullmatch(pattern, path)]
            assert len(parts) == path.startswith(P.VISUAL), path


def test_a_run_goes_on_where_it_stopped(make, tmp_path):
    loop.run(make(), tmp_path / "whole", progress=False)
    loop.run(make(), tmp_path / "parts", progress=False)
    loop.run(make(resume=3), tmp_path / "parts", progress=False)
    whole, parts = (at(make(), tmp_path / name, 6) for name in ("whole", "parts"))
    assert all(torch.equal(leaf, parts[path]) for path, leaf in whole.items())


def test_it_learns_from_videos_beside_images_and_goes_on_where_it_stopped(make, tmp_path, capsys):
    """Two steps on small GIFs and a directory of frames, next to generated pictures."""
    (tmp_path / "chats" / "film").mkdir(parents=True)
    rows = []
    for number in range(80):
        frames = [Image.new("RGB", (32, 32), (3 * number, 60 * i, 0)) for i in range(4)]
        frames[0].save(tmp_path / "chats" / f"{number}.gif", save_all=True, append_images=frames[1:], duration=500)
        frames[0].save(tmp_path / "chats" / "film" / f"{number}.png")
        part = (
            {"type": "video", "video": f"{number}.gif"} if number % 2 else {"type": "video", "video": "film", "fps": 24}
        )
        content = [{"type": "text", "text": f"{number}: "}, part]
        rows.append([{"role": "user", "content": content}, {"role": "assistant", "content": "red"}])
    (tmp_path / "chats" / "x.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    setup = make_setup(make())
    place = tmp_path / "t"
    trained_tokenizer(multimodal._data_config(setup), setup.model.vocab_size, place)
    mixture = f"images=0.5,chats@{tmp_path / 'chats'}=0.5"
    options = {"steps": 2, "checkpoint.every": 1, "data.mixture": mixture, "data.tokenizer": str(*place.iterdir())}
    loop.run(make(**options), tmp_path / "whole", progress=False)
    said = capsys.readouterr().out
    assert re.search(r"data: chats@.* \(50% of rows\), (\d+) chats with \1 pictures in .* [1-9]\d* held out", said)
    assert "left out" not in said
    loop.run(make(**options), tmp_path / "parts", progress=False)
    loop.run(make(**options, resume=1), tmp_path / "parts", progress=False)
    whole, parts = (at(make(), tmp_path / name, 2) for name in ("whole", "parts"))
    assert all(torch.equal(leaf, parts[path]) for path, leaf in whole.items())


def test_a_tower_is_put_on_a_language_model(make, tmp_path, capsys):
    config = make(steps=1)
    setup = make_setup(config)
    data = multimodal._data_config(setup)
    tokenizer = trained_tokenizer(data, setup.model.vocab_size, cache_directory(config.data.cache))
    text = setup.model.replace(vision_enabled=False)
    hf.save_pretrained(tmp_path / "text", text, P.init_params(text, 5), tokenizer)
    loop.run(make(steps=1, init_from=str(tmp_path / "text")), tmp_path / "w", progress=False)
    assert "has no model.visual.patch_embed.proj.weight" in capsys.readouterr().out
    after = at(config, tmp_path / "w", 1)
    assert (after[P.EMBED] - P.init_params(text, 5)[P.EMBED]).abs().max() < 0.05  # only one training step away
    assert any(path.startswith(P.VISUAL) for path in after)


def test_what_cannot_run_is_said_before(make):
    with pytest.raises(UserError, match="vision_enabled=True"):
        multimodal.check(make_setup(make(**{"model.vision_enabled": False})))
    with pytest.raises(UserError, match="data.patches=3"):
        multimodal.check(make_setup(make(**{"data.patches": 3})))
    with pytest.raises(UserError, match="chat_template"):
        multimodal.check(make_setup(make(chat_template="instruct")))
    with pytest.raises(UserError, match="config.attention=invariant is for text"):
        multimodal.check(make_setup(make(attention="invariant")))


def test_blind_runs_see_other_pictures_in_the_same_places():
    batch = {"pixel_values": torch.arange(24.0).view(2, 6, 2), "grids": torch.tensor([[[1, 2, 2]], [[1, 1, 2]]])}
    got = multimodal._with_other_pictures(batch)["pixel_values"]
    assert sorted(got.flatten().tolist()) == list(range(24))
    assert torch.equal(got[0, 4:], batch["pixel_values"][0, 4:])
    assert not np.array_equal(got[0, :4], batch["pixel_values"][0, :4])
