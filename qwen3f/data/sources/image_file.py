"""Image files from strangers, opened so that nothing but named decoders of pillow's sees them."""

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from qwen3f.errors import UserError
from qwen3f.limits import PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""By content, whatever the file is called. Others are not tried: pillow opens EPS by starting Ghostscript."""


def read_image(path: Path) -> Image.Image:
    """The image in RGB, of an animation the first frame.

    Raises:
        UserError: the file cannot be read, is of another format, has more pixels than `limits.PIXELS` (known before it
            is decoded; above 178,956,970 pillow itself refuses), or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours decides
            image = Image.open(path, formats=FORMATS)
        with image:
            width, height = image.size
            if width * height > PIXELS.value():
                raise _too_large(path, f"{width:,} × {height:,}")
            return image.convert("RGB")
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"the image {path} cannot be read: it is no whole file of {', '.join(FORMATS)}; convert or copy it again."
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, "more than pillow's") from error
    except Exception as error:  # a decoder may meet anything in a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the image {path} cannot be read ({reason}): copy it again.") from error


def _too_large(path: Path, pixels: str) -> UserError:
    return UserError(f"the image {path} has {pixels} pixels, {PIXELS.exceeded('pixels')}, or scale the image down")
