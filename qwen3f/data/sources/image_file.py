"""Image files from strangers, opened so that nothing but named decoders of pillow's sees them."""

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from qwen3f.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""By content, whatever the file is called. Others are not tried: pillow opens EPS by starting Ghostscript."""

MAX_PIXELS = 2**26
"""8,192 × 8,192, which take 192 MiB. A picture of one colour takes a thousandth of that on disk."""


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in RGB, of an animation the first frame.

    Args:
        max_pixels: a larger image is refused before it is decoded. Above 178,956,970 pillow refuses by itself.

    Raises:
        UserError: the file cannot be read, is of another format, has too many pixels, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            image = Image.open(path, formats=FORMATS)
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise _too_large(path, f"{width:,} × {height:,} pixels", max_pixels)
            return image.convert("RGB")
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"the image {path} is no whole file of {', '.join(FORMATS)}: convert it, or copy it again."
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, "more pixels than pillow opens", max_pixels) from error
    except Exception as error:  # a decoder may meet anything in a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the image {path} cannot be read ({reason}): copy it again.") from error


def _too_large(path: Path, what: str, max_pixels: int) -> UserError:
    return UserError(
        f"the image {path} has {what}, over the {max_pixels:,} of max_pixels: scale it down, or raise that."
    )
