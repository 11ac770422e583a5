"""Untrusted image files, opened by a few named decoders of pillow only."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image, UnidentifiedImageError

from qwen3f.errors import UserError
from qwen3f.limits import PIXELS
from qwen3f.vision.rgb import FORMATS, check_size, to_rgb

Result = TypeVar("Result")

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Suffixes of the frames in a video's directory."""

_ORIENTATION = 0x0112  # EXIF's tag for the orientation
_ON_ITS_SIDE = (5, 6, 7, 8)  # orientations in which height and width are swapped; in all others they are not


def read_image(path: Path) -> Image.Image:
    """The image in RGB, upright and on white (qwen3f.vision.rgb); of an animation, the first frame.

    Raises:
        UserError: the file cannot be read, is of another format than rgb.FORMATS, has more pixels than `limits.PIXELS`
            (known before it is decoded; above 178,956,970 pillow itself refuses), or is damaged.
    """
    return opened(path, to_rgb)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of what read_image gives, from the file's header alone. Raises UserError as read_image."""

    return opened(path, upright_size)


def upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    """(height, width) of the image after to_rgb, from its header. Raises UserError as check_size, calling it `name`."""
    check_size(image, name)
    turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    return image.size if turned else image.size[::-1]


def frame_files(directory: Path) -> list[Path]:
    """A video's frames: the images of a directory in the order of their names, without hidden files. Raises UserError
    where it cannot be listed."""
    try:
        files = [file for file in directory.iterdir() if file.suffix.lower() in FRAME_SUFFIXES]
        return sorted(file for file in files if file.is_file() and not file.name.startswith("."))
    except OSError as error:
        raise UserError(f"the directory {directory} cannot be read ({error.strerror}): mend it") from error


class FramesAsked(Sequence[Image.Image]):
    """The `count` frames of a video; each is read, by its number, only when it is used."""

    def __init__(self, count: int, read: Callable[[int], Image.Image]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Image.Image:
        return self._read(number)


def opened(file: Path | BinaryIO, use: Callable[[Image.Image, str], Result], name: str = "") -> Result:
    """use(the image, its header read; its name for errors, by default the path). Raises UserError as read_image."""
    name = name or f"the image {file}"
    if isinstance(file, Path) and file.exists() and not file.is_file():  # opening a pipe would wait for a writer
        raise UserError(f"{name} is no regular file: name a file of {', '.join(FORMATS)}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size decides
            image = Image.open(file, formats=FORMATS)
        with image:
            return use(image, name)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name} cannot be read: it is no whole file of {', '.join(FORMATS)}; convert or copy it again."
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{name} has more than pillow's pixels, {PIXELS.exceeded('pixels')}, or scale the image down"
        ) from error
    except Exception as error:  # a decoder may raise anything for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot be read ({reason}): copy it again.") from error
