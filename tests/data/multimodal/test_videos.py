"""Rows of chats with videos equal what transformers' processor and model make of the frames; bad videos are refused."""

import json
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from transformers.image_processing_backends import TorchvisionBackend
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from qwen3f import presets
from qwen3f.data.multimodal.dataset import VisualDataConfig, open_source, prepare_visual
from qwen3f.data.multimodal.samples import PICTURE
from qwen3f.data.sources import image_file
from qwen3f.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from qwen3f.errors import UserError
from qwen3f.vision import gif
from qwen3f.vision.preprocess import image_patches

CFG = presets.get("nano_vl").replace(vision_patch_size=16, vision_temporal_patch_size=2)
SEQ_LEN = 1024
RELEASED = {"shortest_edge": 4096, "longest_edge": 25_165_824}  # for videos; images have VisualDataConfig's limits


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"What happens in video {i} at <{i / 8:.1f} seconds>? yes, {i} times.\n" for i in range(90)]
    return train_sentencepiece(texts, 340, tmp_path_factory.mktemp("tokenizer") / "t.model")


class TheirVideos(Qwen3VLVideoProcessor):
    """transformers' processor with a `normalize` that needs no torchvision, which is not installed."""

    def normalize(self, image, mean, std, inplace=False, **_):
        return (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def resize_with_pillow(self, image, size, resample=None, **_):
    frames = image.flatten(0, 1).permute(0, 2, 3, 1).numpy()
    wanted = (size.width, size.height)
    resized = [np.asarray(Image.fromarray(frame).resize(wanted, Image.Resampling.BICUBIC)) for frame in frames]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).view(*image.shape[:3], *wanted[::-1])


def theirs(frames, fps, size=RELEASED):
    """(patches, grid, text) that transformers' processor makes of all frames of a video."""
    processor = TheirVideos(patch_size=16, size=size, return_metadata=True, cap_pixels_per_frame=False)
    whole = torch.from_numpy(np.stack([np.asarray(frame.convert("RGB")) for frame in frames])).permute(0, 3, 1, 2)
    metadata = {"total_num_frames": len(frames), "fps": fps}
    made = processor([whole], video_metadata=[metadata], do_convert_rgb=False, input_data_format="channels_first")
    asked = SimpleNamespace(
        video_processor=processor,
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        _calculate_timestamps=lambda *args: Qwen3VLProcessor._calculate_timestamps(None, *args),
    )
    text = Qwen3VLProcessor.replace_video_token(asked, made, 0)
    return made["pixel_values_videos"].numpy(), tuple(made["video_grid_thw"][0].tolist()), text


def their_image(image):
    patches, grid = image_patches(image, CFG)  # equal to theirs bit for bit, see tests/vision/test_preprocess.py
    return patches, grid, "<|vision_start|>" + "<|image_pad|>" * (grid[1] * grid[2] // 4) + "<|vision_end|>"


def their_positions(ids, parts):
    kinds = torch.where(ids == CFG.image_token_id, 1, 0) + torch.where(ids == CFG.video_token_id, 2, 0)
    images, films = (
        torch.tensor([grid for _, grid, text in parts if (mark in text)]) for mark in ("<|image", "<|video")
    )
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2), image_token_id=CFG.image_token_id)
    config.video_token_id, config.vision_start_token_id = CFG.video_token_id, CFG.vision_start_token_id
    model = Qwen3VLModel.__new__(Qwen3VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    found, _ = model.get_rope_index(ids[None], kinds[None], *(g if len(g) else None for g in (images, films)))
    return found[:, 0]


def frames_of(seed, count, size=(96, 64)):
    """Random frames of at most 200 colours: a GIF stores them without loss."""
    draw = np.random.default_rng(seed)
    palette = draw.integers(0, 256, (200, 3), dtype=np.uint8)
    return [Image.fromarray(palette[draw.integers(0, 200, size[::-1])]) for _ in range(count)]


def directory(place, frames):
    place.mkdir()
    for number, frame in enumerate(frames):
        frame.save(place / f"{number:03d}.png")


def animation(place, frames, **options):
    frames[0].save(place, save_all=True, append_images=frames[1:], **options)


def write(folder, rows):
    (folder / "x.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return f"chats@{folder}"


def chat(*parts, answer="yes"):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def video(place, **options):
    return {"type": "video", "video": place, **options}


def settings(name, **changes):
    return VisualDataConfig(mixture=name, **{"patches": 4096, "images": 6, **changes})


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """(name of a source of chats, for each chat the list of what transformers makes of its images and videos)."""
    monkeypatch.setattr(TorchvisionBackend, "resize", resize_with_pillow)
    film, long, held, two = frames_of(0, 9), frames_of(1, 30, (70, 50)), frames_of(2, 4, (64, 64)), frames_of(3, 2)
    directory(tmp_path / "film", film)
    directory(tmp_path / "two", two)
    animation(tmp_path / "long.gif", long, duration=100)
    animation(tmp_path / "held.webp", held, duration=[500, 1000, 500, 1500], lossless=True)
    animation(tmp_path / "held.png", held, duration=[500, 1000, 500, 1500])
    film[2].save(tmp_path / "a.png")
    names = [f"film/{number:03d}.png" for number in (4, 2, 0)]
    ticks = [held[0], held[1], held[1], held[2], *[held[3]] * 3]
    image = {"type": "image", "image": "a.png"}
    rows = [
        (["Look: ", video("film", fps=3), " and ", image, "?"], [theirs(film, 3), their_image(film[2])]),
        ([image, video("long.gif"), "what?"], [their_image(film[2]), theirs(long, 10)]),
        ([video("held.webp"), video("held.png"), "which?"], [theirs(ticks, 2)] * 2),
        ([video(names, fps=0.5)], [theirs([film[4], film[2], film[0]], 0.5)]),
        (["words only"], []),
        (["two frames", video("two", fps=24)], [theirs(two, 24)]),
    ] * 3
    rows = [([*parts, f" {number}"], made) for number, (parts, made) in enumerate(rows)]
    return write(tmp_path, [chat(*parts) for parts, _ in rows]), [made for _, made in rows]


def test_a_packed_chat_is_what_transformers_makes_of_it(seen, tokenizer):
    """Tokens, grids and positions are equal, pixels within 1e-6; several chats a row, limits of the released models."""
    name, made = seen
    corpus = prepare_visual(settings(name), SEQ_LEN, tokenizer, CFG)
    samples = [s for split in ("train", "heldout") for s in open_source(name, settings(name)).samples(split, Counter())]
    expected = {}
    for sample in samples:
        number = int(sample.chat.messages[0]["content"].split()[-1])
        first, *rest = sample.chat.text.split(PICTURE)
        text = first + "".join(part[2] + after for part, after in zip(made[number], rest, strict=True))
        ids = tokenizer.encode(text.removesuffix("\n"), allow_special=True)
        expected[tuple(ids)] = made[number]
    found, most = 0, 0
    for dataset in (corpus.train, *corpus.heldout.values()):
        for i in range(len(dataset)):
            row, members, done, count = dataset[i], dataset.members(i), 0, 0
            for segment, document in enumerate(members, 1):
                parts = expected[tuple(document.ids.tolist())]
                mine = row["segments"] == segment
                tokens = row["tokens"][mine]
                assert tokens.tolist() == document.ids[:-1].tolist()
                for patches, grid, _ in parts:
                    assert tuple(row["grids"][count]) == grid
                    np.testing.assert_allclose(row["pixel_values"][done : done + len(patches)], patches, atol=1e-6)
                    done, count = done + len(patches), count + 1
                positions = their_positions(torch.from_numpy(tokens).long(), parts)
                assert np.array_equal(row["positions"][:, mine], positions.numpy())
            assert not row["grids"][count:].any()
            assert not row["pixel_values"][done:].any()
            found, most = found + len(members), max(most, len(members))
    assert (found, most > 1) == (len(made), True)


@pytest.mark.parametrize("low, high, grid", [(4096, 32_768, (3, 4, 6)), (1024**2, 2048**2, (3, 6, 8))])
def test_limits_are_of_a_whole_video_in_the_released_proportion(low, high, grid, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(TorchvisionBackend, "resize", resize_with_pillow)
    frames = frames_of(0, 6, (192, 128) if high == 32_768 else (48, 32))
    directory(tmp_path / "film", frames)
    name = write(tmp_path, [chat(video("film", fps=2), f"{number}") for number in range(20)])
    corpus = prepare_visual(settings(name, min_pixels=low, max_pixels=high), SEQ_LEN, tokenizer, CFG)
    patches, found, _ = theirs(frames, 2, {"shortest_edge": low // 16, "longest_edge": high * 3 // 2})
    assert found == grid
    assert {document.grids for document in corpus.train.documents} == {(grid,)}
    np.testing.assert_allclose(corpus.train[0]["pixel_values"][: len(patches)], patches, atol=1e-6)


def test_pixels_are_decoded_when_a_row_is_made(tokenizer, tmp_path, monkeypatch):
    directory(tmp_path / "film", frames_of(0, 48))
    animation(tmp_path / "a.gif", frames_of(1, 20), duration=500)
    name = write(tmp_path, [chat(video("film", fps=24), video("a.gif"), f"{number}") for number in range(20)])
    decoded = []
    for module in (image_file, gif):
        monkeypatch.setattr(module, "to_rgb", lambda image, name: decoded.append(name) or image.convert("RGB"))
    monkeypatch.setattr(GifImageFile, "load", lambda image: decoded.append("load"))
    corpus = prepare_visual(settings(name), SEQ_LEN, tokenizer, CFG)
    assert not decoded
    monkeypatch.undo()
    assert corpus.train[0]["grids"][:2].tolist() == [[2, 4, 6], [10, 4, 6]]


def test_videos_are_left_out_by_the_room_of_a_row(tokenizer, tmp_path):
    directory(tmp_path / "film", frames_of(0, 8))
    rows = [chat(video("film", fps=2), f"{number}") for number in range(30)]
    name = write(tmp_path, [*rows, chat(video("film", fps=2), video("film", fps=2), "both")])
    for changes in ({"patches": 96}, {"images": 1}):  # a video has 4 groups of 24 patches and counts as one picture
        corpus = prepare_visual(settings(name, **changes), SEQ_LEN, tokenizer, CFG)
        assert corpus.train.left_out["too_long"] == 1
        assert all(len(row) == 1 for row in corpus.train.rows)


@pytest.mark.parametrize(
    "part, words",
    [
        (video("v.mp4"), r"x.jsonl:41 names the video 'v.mp4', which is not in"),
        (video("../v.gif"), "names the video '../v.gif', outside the folder"),
        (video("words.mp4"), "x.jsonl:41: the video .*words.mp4 cannot be read: it is no whole file of JPEG"),
        (video("film"), "x.jsonl:41 has a video of 'film' without a rate: write \"fps\": FRAMES_A_SECOND"),
        (video(["film/000.png"]), 'a video of 1 files without a rate: write "fps"'),
        (video("film", fps=0), "has fps=0: write frames a second, 1e-06 to 1e.06"),
        (video("film", fps="2"), "has fps='2': write frames"),
        (video("film", fps=True), "has fps=True: write frames"),
        (video("film", fps=float("nan")), "has fps=nan: write frames"),
        (video("film", fps=5e-324), "has fps=5e-324: write frames"),
        (video("pipe.gif"), "names the video 'pipe.gif', which is neither a file nor a directory"),
        (video("views.jpg"), 'views.jpg does not say how fast it is: write "fps"'),
        (video("film", fps=2, nframes=8), 'has \'nframes\' in the part of a video: "video" and "fps"'),
        (video("a.gif", fps=2), 'a.gif says itself how fast it is: leave "fps" out'),
        (video("still.gif"), 'still.gif does not say how fast it is: write "fps"'),
        (video("empty", fps=2), "names the video 'empty', which holds no frame: .png"),
        (video([], fps=2), r"has the video \[\]: write \"video\": PATH"),
        (video(["film/000.png", 3], fps=2), r"has the video .*: write \"video\": PATH"),
        (video(None, fps=2), r"has the video None: write \"video\": PATH"),
        ({"type": "video", "fps": 2}, r"has the video None: write \"video\": PATH"),
        (video(["film/000.png", "gone.png"], fps=2), "names the image 'gone.png', which is not in"),
        (video("broken", fps=2), "x.jsonl:41: the image .*broken/001.png cannot be read"),
        (video("cut.gif"), "cut.gif cannot be read"),
        (video("cut.png"), "cut.png cannot be read .it has . of its 9 frames"),
        (video("thin", fps=2), "narrower than 1 : 200"),
    ],
)
def test_bad_videos_are_named_or_counted(part, words, tokenizer, tmp_path):
    directory(tmp_path / "film", frames_of(0, 3))
    directory(tmp_path / "broken", frames_of(0, 3))
    directory(tmp_path / "thin", [Image.new("RGB", (20_000, 40))])
    (tmp_path / "broken" / "001.png").write_bytes(b"\x89PNG words")
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.mp4").write_text("words")
    os.mkfifo(tmp_path / "pipe.gif")
    views = [frame.convert("RGB") for frame in frames_of(0, 2)]
    views[0].save(tmp_path / "views.jpg", format="MPO", save_all=True, append_images=views[1:])
    frames_of(0, 1)[0].save(tmp_path / "still.gif")
    for name in ("a.gif", "cut.gif", "cut.png"):
        animation(tmp_path / name, frames_of(2, 9, (64, 64)), duration=100)
        if name != "a.gif":
            whole = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    good = [chat(f"q {number}", *[video("film", fps=2)] * (number == 0)) for number in range(40)]
    name = write(tmp_path, [*good, chat("a", part)])
    # The header of cut.gif is valid. Only on_bad_row=skip decodes all frames beforehand and finds the fault.
    if part.get("video") != "cut.gif":
        with pytest.raises(UserError, match=words) as raised:
            prepare_visual(settings(name), SEQ_LEN, tokenizer, CFG)
        assert "\n" not in str(raised.value)
    corpus = prepare_visual(settings(name, on_bad_row="skip"), SEQ_LEN, tokenizer, CFG)
    assert sum(corpus.train.left_out.values()) == 1


def test_a_video_that_changes_while_a_run_goes_on_is_named(tokenizer, tmp_path):
    directory(tmp_path / "film", frames_of(0, 4))
    animation(tmp_path / "a.gif", frames_of(1, 4), duration=500)
    name = write(tmp_path, [chat(video("film", fps=2), video("a.gif"), f"{number}") for number in range(20)])
    corpus = prepare_visual(settings(name), SEQ_LEN, tokenizer, CFG)
    animation(tmp_path / "a.gif", frames_of(1, 8), duration=500)
    with pytest.raises(UserError, match="the video .*a.gif has another size or length than when the run began"):
        corpus.train[0]
    (tmp_path / "film" / "003.png").unlink()
    with pytest.raises(UserError, match=r"x.jsonl:\d+: the image .*film/003.png cannot be read"):
        corpus.train[0]
