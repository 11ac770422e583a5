"""The picture that a vision benchmark's question is about, in whatever form a data set has it."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qwen3f.data.sources.adapters.multimodal import image_inside
from qwen3f.data.sources.adapters.rows import RowFault
from qwen3f.data.sources.image_file import opened
from qwen3f.files import user_path
from qwen3f.vision.rgb import to_rgb

_DIGITS = 16  # of a digest


@dataclass(frozen=True)
class Picture:
    """A picture, not decoded yet. source: a file's bytes, its path, or pillow's image. row: "file:row" that has it."""

    source: bytes | Path | Image.Image
    row: str

    def open(self) -> Image.Image:
        """The image in RGB, upright. Raises UserError naming the row; see vision.rgb."""
        name = f"the image of {self.row}"
        if isinstance(self.source, Image.Image):
            return to_rgb(self.source, name)
        file = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        return opened(file, to_rgb, name)

    def shared(self, known: dict[bytes, bytes]) -> "Picture":
        """The same picture. Its bytes are those of an equal file in `known`, if there is one; else they are added to
        it."""
        return Picture(known.setdefault(self.source, self.source), self.row) if isinstance(self.source, bytes) else self

    def digest(self) -> str:
        """Tells one picture from another."""
        if isinstance(self.source, Image.Image):
            data = repr((self.source.size, self.source.mode)).encode() + self.source.tobytes()
        else:
            data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha256(data).hexdigest()[:_DIGITS]


def picture_of(value: Any, row: str, place: str) -> Picture:
    """The picture of a row's `image`: {"bytes", "path"} as parquet has it, bytes, pillow's, or a path.

    place: the local copy, below which paths lie; "" on the Hub. Raises RowFault for anything else, and for a file that
    is not there.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if (isinstance(value, bytes) and value) or isinstance(value, Image.Image):
        return Picture(value, row)
    if isinstance(value, str) and value and place:
        return Picture(image_inside(user_path(place, "config.benchmarks"), value, row).path, row)
    raise RowFault(
        "bad_images", f"{row} has no picture under 'image': write its bytes, or its path below the directory."
    )
