"""Converts pictures of any kind to RGB, by the same rules for files and for pillow's objects.

EXIF rotation is applied; transparent pictures are put on white; 16-bit levels are scaled to 8 bits. transformers
applies EXIF only to files, puts only objects on white, and lets 16-bit levels saturate.
"""

import numpy as np
from PIL import Image, ImageOps

from qwen3f.errors import UserError
from qwen3f.limits import PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are read; the content of a file decides, not its name. Others are refused: pillow would, for example,
start Ghostscript for EPS."""

_KNOWN = (*FORMATS, "MPO")  # MPO: a JPEG with more pictures after the first, as phones write it; the first is taken
_WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_WHITE = (255, 255, 255, 255)
# A PNG names its transparent colour in its own levels, but pillow's pixels have 8 bits.
_KEYS_IN_8_BITS = {
    "L;2": lambda key: 85 * key,
    "L;4": lambda key: 17 * key,
    "RGB;16B": lambda key: tuple(level >> 8 for level in key),
}


def check_size(image: Image.Image, name: str) -> None:
    """Raises UserError for an image with more pixels than limits.PIXELS, or with none; decodes nothing."""
    width, height = image.size
    if width * height > PIXELS.value():
        raise UserError(f"{name} has {width:,} × {height:,} pixels, {PIXELS.exceeded('pixels')}, or scale it down")
    if width * height == 0:
        raise UserError(f"{name} has {width} × {height} pixels: there is nothing to see; leave it out")


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """The picture upright, on white, in RGB; for an animation its current frame.

    16-bit greyscale (modes I;16 and I, values up to 65,535) is scaled to 8 bits: 257 levels become one. A PNG with 2 or
    4 bits, or with three times 16 bits, names its transparent colour in its own levels. These are known only of an
    image that is not loaded yet; for such an image, image.info gets the colour in 8 bits.

    Raises UserError, with `name` for the image: too many pixels or none, a format that is not in FORMATS, values
    without a known range (mode F, or I beyond 16 bits), damaged data.
    """
    if image.format is not None and image.format not in _KNOWN:
        raise UserError(f"{name} is a {image.format}; only {', '.join(FORMATS)} are decoded: convert it")
    check_size(image, name)
    if image.mode == "F":
        raise UserError(f"{name} has floating-point pixels (mode F) of an unknown range: convert it to 8 or 16 bits")
    levels_of_file = image.tile[0][3] if getattr(image, "tile", None) else ""
    try:
        image.load()
        if levels_of_file in _KEYS_IN_8_BITS and "transparency" in image.info:  # only once: a loaded image has no tile
            image.info["transparency"] = _KEYS_IN_8_BITS[levels_of_file](image.info["transparency"])
        image = ImageOps.exif_transpose(image)
        if image.mode not in _WIDE_MODES:
            return _on_white(image)
    except Exception as error:  # a decoder may raise anything for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot be read ({reason}): copy it again.") from error
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
        raise UserError(f"{name} has values from {values.min()} to {values.max()} (mode I): convert it to 8 or 16 bits")
    levels = np.where(values == image.info.get("transparency"), 255, (values.astype(np.uint32) + 128) // 257)
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if {"A", "a"} & {*image.getbands()} or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
