"""Pixels equal transformers' bit for bit. Every image is either converted by one rule or refused.

Both sides use the same pillow here. Another version of pillow gives other pixels to both.
"""

import io
import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from qwen3f.config import ModelConfig
from qwen3f.data.sources.image_file import frame_files, read_image
from qwen3f.errors import UserError
from qwen3f.limits import PIXELS
from qwen3f.vision.preprocess import MAX_PIXELS, MIN_PIXELS, fit_size, image_grid, image_patches, merged_tokens
from qwen3f.vision.rgb import to_rgb

CFG = ModelConfig(vision_enabled=True, vocab_size=151936)
# small limits, so that hundreds of sizes are quick; other tests use the limits of the released models
SMALL = (4 * 32 * 32, 40 * 32 * 32)
MODES = ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"]


def theirs(image, low=MIN_PIXELS, high=MAX_PIXELS):
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": low, "longest_edge": high}, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    out = processor(images=[image], return_tensors="np")
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


def noise(mode, width, height, seed):
    rand = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    if mode == "1":
        return Image.fromarray(rand.integers(0, 2, (height, width), dtype=np.uint8) * 255).convert("1")
    if mode == "P":
        rgb = Image.fromarray(rand.integers(0, 256, (height, width, 3), dtype=np.uint8))
        return rgb.quantize(17)
    values = rand.integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.merge(mode, [Image.fromarray(values[..., band]) for band in range(bands)])


def same(image, *limits):
    got, grid = image_patches(image, CFG, *limits)
    expected, expected_grid = theirs(image, *limits)
    assert grid == expected_grid == image_grid(image.height, image.width, CFG, *(limits or (MIN_PIXELS, MAX_PIXELS)))
    assert got.dtype == expected.dtype == np.float32
    assert np.array_equal(got.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("mode", MODES)
def test_bit_for_bit_on_many_sizes(mode):
    """32 sizes for each mode, 320 in all, some of them narrow."""
    rand = random.Random(mode)
    for number in range(32):
        wide, high = (round(2 ** rand.uniform(0, 8.5)) for _ in range(2))
        if number % 4 == 0:
            high = max(1, wide // rand.choice([1, 30, 200]))
        if max(wide, high) > 200 * min(wide, high):
            high = wide
        same(noise(mode, wide, high, number), *SMALL)


@pytest.mark.parametrize("size", [(1, 1), (80, 48), (1999, 10), (33, 100), (600, 300)])
def test_bit_for_bit_with_the_released_limits(size):
    same(noise("RGB", *size, 0))


def test_transparent_palettes_and_greys():
    palette = noise("P", 40, 30, 1)
    palette.info["transparency"] = 3
    same(palette, *SMALL)
    grey = noise("L", 40, 30, 1)
    grey.info["transparency"] = 7
    same(grey, *SMALL)


def test_patches_are_blocks_of_channels_frames_and_pixels():
    """Against the definition: patches are in the order of merged blocks, and each is image[:, y:y+p, x:x+p], once for
    each of two frames."""
    image = noise("RGB", 96, 64, 5)
    patches, grid = image_patches(image, CFG, 1, MAX_PIXELS)
    assert grid == (1, 4, 6)
    scaled = np.asarray(image).transpose(2, 0, 1) / 127.5 - 1
    place = [(2 * r + i, 2 * c + j) for r in range(2) for c in range(3) for i in range(2) for j in range(2)]
    for patch, (y, x) in zip(patches, place, strict=True):
        for frame in patch.reshape(3, 2, 16, 16).transpose(1, 0, 2, 3):
            assert np.abs(frame - scaled[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]).max() < 1e-6


@given(
    st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([28, 32]), st.integers(1, 10**6), st.integers(0, 10**7)
)
def test_sizes_lie_between_the_limits(height, width, factor, low, more):
    high = max(low + more, factor**2)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(UserError, match="narrower than 1 : 200"):
            fit_size(height, width, factor, low, high)
        return
    tall, wide = fit_size(height, width, factor, low, high)
    assert tall % factor == wide % factor == 0 < min(tall, wide)
    grown = round(height / factor) * round(width / factor) * factor**2 < low  # enlarged: rounding up may pass `high`
    assert tall * wide <= high or min(tall, wide) == factor or grown
    expected = smart_resize(height, width, factor, low, high)
    if 2 * min(height, width) > factor or height * width < low:
        assert (tall, wide) == expected


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_sizes_with_the_released_limits_are_transformers(height, width):
    if max(height, width) <= 200 * min(height, width):
        assert fit_size(height, width, 32, MIN_PIXELS, MAX_PIXELS) == smart_resize(
            height, width, 32, MIN_PIXELS, MAX_PIXELS
        )
        grid = image_grid(height, width, CFG, MIN_PIXELS, MAX_PIXELS)
        assert merged_tokens(grid, CFG) == grid[1] * grid[2] // 4


def test_the_released_limits():
    """As in preprocessor_config.json of Qwen3-VL."""
    assert (MIN_PIXELS, MAX_PIXELS) == (65_536, 16_777_216)


def test_a_thin_image_below_the_released_limits_keeps_its_length():
    assert smart_resize(10, 300, 32, 1, 10**6) == (32, 32)
    assert fit_size(10, 300, 32, 1, 10**6) == (32, 288)
    assert fit_size(31, 639, 32, 1, 10**6) == (32, 640)


def test_a_size_that_is_a_limit_is_taken():
    """A side of 70 is rounded to 64; an image of exactly the most or the fewest pixels is not scaled again."""
    for height, low, high in ((70, 1, 64 * 64), (58, 64 * 64, 10**6)):
        assert fit_size(height, 64, 32, low, high) == smart_resize(height, 64, 32, low, high) == (64, 64)
    assert fit_size(64, 64, 32, PIXELS.default, PIXELS.default) == (8192, 8192)


def test_limits_that_leave_no_size():
    for low, high in ((0, 5000), (5000, 4000), (1, 1023)):
        with pytest.raises(UserError, match=f"min_pixels={low} and max_pixels={high}"):
            fit_size(50, 50, 32, low, high)
    with pytest.raises(UserError, match="min_pixels=100000000000 would scale every image to more than 67,108,864"):
        fit_size(50, 50, 32, 10**11, 10**12)


def test_a_patch_of_14_and_one_frame():
    cfg = CFG.replace(vision_patch_size=14, vision_image_size=336, vision_temporal_patch_size=1)
    patches, grid = image_patches(noise("RGB", 100, 60, 0), cfg, 1, MAX_PIXELS)
    assert (patches.shape, grid) == ((4 * 8, 588), (1, 4, 8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_by_path_and_by_object(orientation, tmp_path):
    upright = noise("RGB", 48, 32, 2).resize((96, 64), Image.Resampling.NEAREST)
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    turns |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose[turns[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        assert to_rgb(image).tobytes() == upright.tobytes()
    assert read_image(tmp_path / "x.png").tobytes() == upright.tobytes()


def test_transparency_is_white_by_path_and_by_object(tmp_path):
    clear = Image.new("RGBA", (5, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "x.png")
    for image in (clear, read_image(tmp_path / "x.png")):
        assert to_rgb(image).getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I", "I;16B"])
def test_a_ramp_of_16_bits_keeps_its_levels(mode, tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 257, (4, 1))
    image = Image.fromarray(ramp.astype({"I;16": np.uint16, "I": np.int32, "I;16B": ">u2"}[mode]))
    assert np.array_equal(np.asarray(to_rgb(image))[0, :, 0], np.arange(256))
    if mode == "I;16":
        image.save(tmp_path / "x.png")
        assert np.array_equal(np.asarray(read_image(tmp_path / "x.png"))[0, :, 1], np.arange(256))


def test_values_of_unknown_range_are_refused():
    for image, word in ((Image.new("F", (4, 4)), "mode F"), (Image.new("I", (4, 4), 70_000), "mode I")):
        with pytest.raises(UserError, match=word):
            image_patches(image, CFG)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif").getpixel((3, 3)) == (255, 0, 0)


def test_a_pipe_is_never_opened(tmp_path):
    """Opening it would wait for ever for a writer."""
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UserError, match="x.png is no regular file"):
        read_image(tmp_path / "x.png")


def test_hidden_files_and_folders_are_no_frames(tmp_path):
    for name in ("1.png", "._1.png", "0.png"):
        noise("RGB", 8, 8, 0).save(tmp_path / name, "PNG")
    (tmp_path / "2.png").mkdir()
    assert [file.name for file in frame_files(tmp_path)] == ["0.png", "1.png"]


def test_bad_pictures_are_one_error(monkeypatch):
    content = io.BytesIO()
    noise("RGB", 64, 64, 0).save(content, "PNG")
    cut = Image.open(io.BytesIO(content.getvalue()[:3000]))
    with pytest.raises(UserError, match="the image cannot be read"):
        image_patches(cut, CFG)
    with pytest.raises(UserError, match="narrower than 1 : 200"):
        image_patches(noise("RGB", 201, 1, 0), CFG)
    with pytest.raises(UserError, match="model.vision_num_channels=1: images are read as RGB; write 3"):
        image_patches(noise("RGB", 64, 64, 0), CFG.replace(vision_num_channels=1))
    eps = Image.new("RGB", (4, 4))
    eps.format = "EPS"
    with pytest.raises(UserError, match="is a EPS; only JPEG"):
        image_patches(eps, CFG)
    with pytest.raises(UserError, match="nothing to see"):
        image_patches(Image.new("RGB", (0, 5)), CFG)
    monkeypatch.setenv("QWEN3F_MAX_PIXELS", "99")
    with pytest.raises(UserError, match="10 × 10 pixels, over the limit of 99"):
        image_patches(noise("RGB", 10, 10, 0), CFG)
