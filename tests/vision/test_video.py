"""Frames, times and sizes of videos against functions from transformers' source, since its class needs torchvision."""

import ast
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.vision.frame_times import frame_times
from qwen3f.vision.gif import gif_frames
from qwen3f.vision.preprocess import image_patches
from qwen3f.vision.video import MAX_PIXELS, MIN_PIXELS, fit_size, frame_text, sample_frames, timestamps, video_patches

CFG = ModelConfig(vision_enabled=True, vocab_size=151936)
FOLDER = Path(importlib.util.find_spec("transformers").origin).parent / "models" / "qwen3_vl"


def their_function(file, name):
    """A function of transformers' source, without importing its module."""
    for node in ast.walk(ast.parse((FOLDER / file).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            scope = {"math": math, "np": np}
            for argument in [*node.args.args, node]:
                argument.annotation = argument.returns = None
            exec(compile(ast.Module([node], []), file, "exec"), scope)
            return scope[name]
    raise AssertionError(name)


SIZES = their_function("video_processing_qwen3_vl.py", "smart_resize")
TIMES = their_function("processing_qwen3_vl.py", "_calculate_timestamps")
FRAMES = their_function("video_processing_qwen3_vl.py", "sample_frames")


class Meta:
    min_frames, max_frames, fps = 4, 768, 2

    def __init__(self, count, fps):
        self.total_num_frames, self.fps = count, fps


@given(st.integers(1, 5000), st.floats(0.5, 120), st.floats(0.1, 30))
def test_frames_and_times_are_transformers(count, source_fps, fps):
    got = sample_frames(count, source_fps, fps)
    assert got == FRAMES(Meta(0, 0), Meta(count, source_fps), fps=fps).tolist()
    assert timestamps(got, source_fps, 2) == TIMES(None, list(got), source_fps, 2)


@given(st.integers(2, 768), st.integers(1, 3000), st.integers(1, 3000))
def test_sizes_are_transformers(frames, height, width):
    if height < 32 or width < 32:
        scale = max(32 / height, 32 / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) <= 200 * min(height, width):
        limits = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
        assert fit_size(frames, height, width, 32, 2, **limits) == SIZES(frames, height, width, 2, 32, **limits)


def test_a_frame_is_the_image_it_is_and_an_odd_count_repeats_the_last():
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 96, 3), dtype=np.uint8)) for i in range(5)]
    patches, grid, times = video_patches(frames, 2.0, CFG)
    assert (grid, times) == ((3, 4, 6), [0.25, 1.25, 2.0])
    each = [image_patches(frame, CFG, 1)[0].reshape(24, 3, 2, 256)[:, :, 0] for frame in frames]
    each.append(each[-1])
    got = patches.reshape(3, 24, 3, 2, 256)
    for number, expected in enumerate(each):
        assert np.array_equal(got[number // 2, :, :, number % 2], expected)


def test_time_in_words_is_cut_as_python_cuts_it():
    assert [frame_text(t) for t in (0.25, 0.75, 11.0)] == ["<0.2 seconds>", "<0.8 seconds>", "<11.0 seconds>"]


def test_bad_videos():
    with pytest.raises(UserError, match="without frames"):
        video_patches([], 24, CFG)
    for rate in (0, -1, 1e-320, 1e7, float("inf"), float("nan")):
        with pytest.raises(UserError, match="frames a second; give a number"):
            sample_frames(5, rate)
    assert len(sample_frames(1000, 1e-6)) == 768
    with pytest.raises(UserError, match="narrower"):
        video_patches([Image.new("RGB", (20_000, 90))], 1.0, CFG)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
@pytest.mark.parametrize("times", [[100, 250, 500, 40, 90], 40, None])
def test_times_of_an_animation_are_pillows(suffix, times, tmp_path):
    place = tmp_path / f"x.{suffix}"
    frames = [Image.new("RGB", (8, 8), (40 * i, i, 9)) for i in range(5)]
    frames[0].save(place, save_all=True, append_images=frames[1:], **({"duration": times} if times else {}))
    with Image.open(place) as image:
        theirs = []
        for number in range(5):
            image.seek(number)
            image.load()  # WebP gives the duration only after this
            theirs.append(round(image.info.get("duration", 0)))
    assert frame_times(place.read_bytes()) == theirs
    for end in range(0, place.stat().st_size, 7):
        assert len(frame_times(place.read_bytes()[:end])) <= 5


def test_a_picture_beside_an_apng_is_not_shown(tmp_path):
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(4)]
    place = tmp_path / "x.png"
    frames[0].save(place, save_all=True, append_images=frames[1:], duration=[500, 500, 1000], default_image=True)
    shown, fps = gif_frames(Image.open(place), "x")
    assert (fps, [shown[tick].getpixel((1, 1))[0] for tick in range(len(shown))]) == (2.0, [40, 80, 120, 120])


@pytest.mark.parametrize("disposal, blend", [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)])
def test_an_apngs_frames_do_not_depend_on_those_read_before(disposal, blend, tmp_path):
    """pillow's buffer for frames that are undone is overwritten when a frame is loaded."""
    dots = []
    for at in range(6):
        dots.append(Image.new("RGBA", (8, 8)))
        dots[-1].putpixel((at, at), (255, 0, 0, 255))
    place = tmp_path / "a.png"
    dots[0].save(place, save_all=True, append_images=dots[1:], duration=500, disposal=disposal, blend=blend)

    def frames():
        return gif_frames(Image.open(place), "x")[0]

    alone = [np.asarray(frames()[at]) for at in range(6)]
    for order in (range(6), (0, 0, 2, 2, 5), (3, 1, 4)):
        shown = frames()
        for at in order:
            np.testing.assert_array_equal(np.asarray(shown[at]), alone[at])
    if disposal == 2:
        assert [int((x[..., 1] < 100).sum()) for x in alone] == [1] * 6


def test_another_view_of_a_jpeg_is_no_frame(tmp_path):
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    frames, fps = gif_frames(Image.open(tmp_path / "a.jpg"), "x")
    assert (len(frames), fps) == (1, None)
    assert len(gif_frames(Image.open(tmp_path / "a.jpg"), "x", 2.0)[0]) == 1


def test_an_animation_that_ends_early_is_named(tmp_path):
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(4)]
    place = tmp_path / "x.png"
    frames[0].save(place, save_all=True, append_images=frames[1:], duration=500)
    place.write_bytes(place.read_bytes()[: place.stat().st_size // 2])
    with pytest.raises(UserError, match="the video x cannot be read .it has . of its 4 frames"):
        gif_frames(Image.open(place), "the video x")
