"""The stage generate with images and video: ids as Qwen3-VL's processor writes them, and answers of the model."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.generate import get_config
from qwen3f import model, params, presets
from qwen3f.data.sources.image_file import read_image
from qwen3f.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError
from qwen3f.infer import prompts as infer_prompts
from qwen3f.infer.pictures import vision_ids
from qwen3f.infer.prompts import encode_shown, pictures_of, read_images, read_video
from qwen3f.infer.run import run
from qwen3f.vision import gif
from qwen3f.vision.gif import gif_frames
from qwen3f.vision.preprocess import MAX_PIXELS, MIN_PIXELS

LIMITS = (32 * 32, 96 * 96)
WIDE = (MIN_PIXELS, MAX_PIXELS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(a Hugging Face directory of a smaller nano_vl, its config, its parameters, its tokenizer)."""
    from qwen3f.interop import hf

    place = tmp_path_factory.mktemp("generate")
    texts = [f"What is in picture {i}? A red circle, {i} times.\n" for i in range(60)]
    tokenizer = train_sentencepiece(texts, 340, place / "t.model")
    cfg = presets.get("nano_vl").replace(vocab_size=340, num_hidden_layers=2, vision_num_hidden_layers=2)
    p = params.init_params(cfg, 1)
    hf.save_pretrained(place / "hf", cfg, p, tokenizer)
    return str(place / "hf"), cfg, p, tokenizer


def picture(place, size, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(place)
    return str(place)


def texts(shown):
    return [one.text for one in shown]


def configure(source, **changes):
    config = get_config()
    config.update(init_from=source[0], prompt="What is it?", max_new_tokens=5, device="cpu", thinking=False)
    config.update(temperature=0.0, top_k=0, top_p=1.0, presence_penalty=0.0, min_pixels=LIMITS[0], max_pixels=LIMITS[1])
    config.update(changes)
    return config


@torch.no_grad()
def test_an_answer_is_the_models(source, tmp_path, capsys):
    _, cfg, p, tokenizer = source
    images = ",".join(picture(tmp_path / f"{i}.png", size, i) for i, size in enumerate([(64, 48), (32, 80)]))
    run(configure(source, images=images), tmp_path)
    got = capsys.readouterr().out
    shown = read_images(images, cfg, *LIMITS)
    ids = encode_shown(tokenizer, [{"role": "user", "content": "What is it?"}], texts(shown), thinking=False)
    seen = pictures_of(shown)
    prompt = len(ids)
    for _ in range(5):
        batch = {"tokens": torch.tensor([ids]), "pixel_values": seen.pixels[None], "grids": seen.grids[None]}
        logits = model.apply(cfg, p, batch).logits[0, -1, : tokenizer.vocab_size]
        logits[list(vision_ids(cfg))] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] in tokenizer.stop_ids:
            break
    assert got == tokenizer.decode([i for i in ids[prompt:] if i not in tokenizer.stop_ids]) + "\n"


def test_ids_are_those_of_the_template(source, tmp_path):
    """The user's turn begins with <|vision_start|>, the image's <|image_pad|> ids and <|vision_end|>. Names of special
    tokens that a user types stay plain text."""
    _, cfg, _, tokenizer = source
    shown = read_images(picture(tmp_path / "a.png", (64, 48)), cfg, *LIMITS)
    asked = [{"role": "user", "content": "<|image_pad|>?"}]
    ids = encode_shown(tokenizer, asked, texts(shown), thinking=True)
    markup = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 12 + "<|vision_end|>"
    start = tokenizer.encode(markup, allow_special=True)
    assert ids[: len(start)] == start
    assert ids.count(cfg.image_token_id) == 12
    with pytest.raises(UserError, match=r"U\+FFFC"):
        encode_shown(tokenizer, [{"role": "user", "content": "\ufffc"}], texts(shown), thinking=True)
    told = {"type": "function", "function": {"name": "f", "description": "\ufffc", "parameters": {}}}
    with pytest.raises(UserError, match=r"tools hold U\+FFFC"):
        encode_shown(tokenizer, asked, texts(shown), tools=[told], thinking=True)


def test_ids_are_of_the_models_kind_of_chats(source, tmp_path):
    directory, cfg, _, _ = source
    tokenizer = load_tokenizer(directory, "instruct-2507")
    shown = read_images(picture(tmp_path / "a.png", (64, 48)), cfg, *LIMITS)
    asked = [{"role": "user", "content": "x"}]
    ids = encode_shown(tokenizer, asked, texts(shown), thinking=False)
    end = tokenizer.encode("<|im_start|>assistant\n", allow_special=True)
    assert ids[-len(end) :] == end  # no thinking block
    with pytest.raises(UserError, match="never thinks"):
        encode_shown(tokenizer, asked, texts(shown), thinking=True)


def test_answers_to_other_pictures_or_in_another_kind_of_chats_need_another_file(source, tmp_path):
    one, two = (picture(tmp_path / f"{i}.png", (64, 48), i) for i in range(2))
    options = {"images": one, "out": str(tmp_path / "out.jsonl")}
    run(configure(source, **options), tmp_path)
    assert run(configure(source, **options), tmp_path).done == 1
    for changes in ({"images": two}, {"images": ""}, {"chat_template": "coder"}, {"min_pixels": 32 * 64}):
        with pytest.raises(UserError, match="has an answer to row 0 that does not belong"):
            run(configure(source, **{**options, **changes}), tmp_path)


def test_a_video_of_frames_or_a_gif(source, tmp_path):
    cfg = source[1]
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(5):
        picture(folder / f"{i:03d}.png", (32, 48), i)
    shown = read_video(str(folder), 2.0, cfg, *WIDE)
    assert shown.grid == (5, 6, 4)
    words = "".join(part.text for part in shown.text)
    assert words.startswith("<0.0 seconds><|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|><0.5 seconds>")
    small = read_video(str(folder), 2.0, cfg, 1, 64 * 64)
    assert (
        math.prod(small.grid) * cfg.vision_patch_size**2
        <= 64 * 64 * 3 / 2
        < math.prod(shown.grid) * cfg.vision_patch_size**2
    )
    frames = [Image.open(file) for file in sorted(folder.iterdir())]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=500)
    gif = read_video(str(tmp_path / "x.gif"), None, cfg, *WIDE)
    assert gif.grid == shown.grid
    assert [part.text for part in gif.text] == [part.text for part in shown.text]
    for place in (str(folder), str(tmp_path / "x.gif")):
        run(configure(source, video=place, video_fps=2.0), tmp_path)


def test_a_gifs_frames_stand_at_their_own_times(source, tmp_path):
    frames = [Image.new("RGB", (32, 48), (60 * i, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=[500, 500, 500, 2500])
    seen = Image.open(tmp_path / "x.gif")
    held, fps = gif_frames(seen, "x")
    assert (len(held), fps) == (8, 2.0)
    assert [round(held[tick].getpixel((1, 1))[0] / 60) for tick in range(8)] == [0, 1, 2, 3, 3, 3, 3, 3]
    text = read_video(str(tmp_path / "x.gif"), None, source[1], *WIDE).text
    assert [part.text for part in text][::2] == [f"<{second / 2:.1f} seconds>" for second in range(8)]
    assert len(gif_frames(seen, "x", fps=3.0)[0]) == 4


def test_of_a_long_gif_only_what_is_looked_at_is_decoded(source, tmp_path, monkeypatch):
    frames = [Image.new("RGB", (32, 48), (i, 0, 0)) for i in range(100)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=20)
    decoded = []
    monkeypatch.setattr(gif, "to_rgb", lambda image, name: decoded.append(1) or image.convert("RGB"))
    read_video(str(tmp_path / "x.gif"), None, source[1], *WIDE)
    assert len(decoded) == 4


def test_of_many_frames_in_files_only_what_is_looked_at_is_decoded(source, tmp_path, monkeypatch):
    for i in range(60):
        picture(tmp_path / f"{i:03d}.png", (32, 48), i)
    decoded = []
    monkeypatch.setattr(infer_prompts, "read_image", lambda path: decoded.append(path.name) or read_image(path))
    assert read_video(str(tmp_path), 24.0, source[1], *WIDE).grid[0] == 5
    assert decoded == ["000.png", "015.png", "030.png", "044.png", "059.png"]


def test_what_cannot_be_shown(source, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}')
    one, thin = picture(tmp_path / "a.png", (64, 48)), picture(tmp_path / "thin.png", (900, 3))
    for changes, words in (
        ({"images": str(tmp_path / "none.png")}, "none.png cannot be read"),
        (
            {"images": one, "min_pixels": 10**30, "max_pixels": 10**31},
            "--config.min_pixels=1000.* would scale every image",
        ),
        ({"images": " , "}, "config.images=' , ' names no file"),
        ({"images": f"{one},{thin}"}, r"thin.png: an image of 900 × 3 pixels is narrower"),
        ({"images": one, "video_fps": 2.0}, "config.video_fps=2.0 goes with config.video"),
        ({"video_fps": 2.0}, "config.video_fps=2.0 goes with config.video"),
        ({"video": one, "video_fps": 0.0}, "config.video_fps=0.0: write frames a second, 1e-06 to 1e.06"),
        ({"video": one, "video_fps": math.nan}, "config.video_fps=nan: write frames"),
        ({"images": one, "max_pixels": 10}, r"--config.min_pixels=\d+ and --config.max_pixels=10 leave no size"),
        ({"images": one, "chat": False}, "config.chat=True"),
        (
            {"images": one, "prompt": "", "input": str(tmp_path / "rows.jsonl")},
            "config.images .* not with config.input",
        ),
        ({"video": str(tmp_path / "empty"), "video_fps": 2.0}, "holds no frame"),
        ({"video": one}, "has no frame rate"),
    ):
        with pytest.raises(UserError, match=words):
            run(configure(source, **changes), tmp_path)
