"""Rows of liuhaotian/LLaVA-Instruct-150K as chats about an image in a local folder.

Columns (of llava_instruct_150k.json, one JSON list): `image`, a path relative to the folder, e.g. "000000033471.jpg" of
COCO's train2017; `conversations`, a list of {from: human | gpt, value} whose first turn holds the placeholder
"<image>". The placeholder stays in the text, for the vision encoder to replace.

Images are not on the Hub: the folder is always local. A file is opened only when its image is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwen3f.data.sources.adapters.rows import Row, RowFault, text_of
from qwen3f.data.sources.adapters.sft import Chat, turns
from qwen3f.data.sources.image_file import image_size, read_image
from qwen3f.errors import UserError

PLACEHOLDER = "<image>"
DEFAULT = "llava-instruct-150k"

_NAME = 80  # characters of a file's name that an error shows
_SPEAKERS = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class ImageFile:
    """An image that has not been read yet: its path, and the row that names it."""

    path: Path
    row: str

    def size(self) -> tuple[int, int]:
        """(height, width), from the file's header. Raises UserError naming the row."""
        try:
            return image_size(self.path)
        except UserError as error:
            raise UserError(f"{self.row}: {error}") from error

    def open(self) -> Image.Image:
        """The image in RGB. Raises UserError naming the row; see `read_image`."""
        try:
            return read_image(self.path)
        except UserError as error:
            raise UserError(f"{self.row}: {error}") from error


@dataclass(frozen=True)
class ImageChat:
    """A chat whose user turns hold one "<image>", and that image."""

    messages: tuple[dict[str, str], ...]
    image: ImageFile


def llava(row: Row, image_root: Path) -> ImageChat:
    """The chat of a row and its image below `image_root`. Raises RowFault, LeftOut."""
    image = image_inside(image_root, text_of(row, "image"), row.name)
    messages: Chat = turns(row, "conversations", "from", "value", _SPEAKERS)
    found = [message["content"].count(PLACEHOLDER) for message in messages if message["role"] == "user"]
    if sum(found) != 1:
        raise RowFault(
            "invalid_rows", f"{row.name} holds {sum(found)} of {PLACEHOLDER} in its questions: write it once."
        )
    return ImageChat(tuple(messages), image)


def image_inside(image_root: Path, relative: str, where: str) -> ImageFile:
    """An image below the folder. Raises RowFault for one elsewhere, or that is not there."""
    path = path_inside(image_root, relative, where, "image")
    if not path.is_file():
        raise _not_there(image_root, relative, where, "image")
    return ImageFile(path, where)


def path_inside(root: Path, relative: str, where: str, kind: str) -> Path:
    """The path of `relative` below the folder `root`, links resolved. kind: what errors call it, such as "image".
    Raises RowFault as image_inside."""
    folder = root.resolve()
    try:
        path = (folder / relative).resolve()
        inside, there = path.is_relative_to(folder), path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have: data URIs, NUL
        raise RowFault(
            "invalid_rows",
            f"{where} names the {kind} {_short(relative)}, which is no path ({error.args[-1]}): write a file's path.",
        ) from None
    if not inside:
        raise RowFault("invalid_rows", f"{where} names the {kind} {_short(relative)}, outside the folder {root}.")
    if not there:
        raise _not_there(root, relative, where, kind)
    return path


def _not_there(root: Path, relative: str, where: str, kind: str) -> RowFault:
    return RowFault(
        "invalid_rows", f"{where} names the {kind} {_short(relative)}, which is not in {root}: copy it there."
    )


def _short(name: str) -> str:
    return repr(name if len(name) <= _NAME else name[:_NAME] + "…")


ADAPTERS: dict[str, Callable[[Row, Path], ImageChat]] = {"llava-instruct-150k": llava}
