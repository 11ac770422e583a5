"""Numbers beside a token cache, such as one for each token: a .npy file that is there whole or not at all."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen3f.errors import UserError
from qwen3f.files import sync


@dataclass(frozen=True, eq=False)
class Column:
    """The numbers of a file, mapped into memory.

    length: how many there must be, such as the cache's tokens. Raises UserError for a damaged file or another length.
    """

    path: Path
    length: int
    values: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            values = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.path} cannot be read ({error}): delete it, to have it made again.") from error
        if values.shape != (self.length,) or values.dtype.kind != "f":
            raise UserError(
                f"{self.path} holds {values.shape} numbers of {values.dtype}, not {self.length} of a token cache: "
                "delete it, to have it made again."
            )
        object.__setattr__(self, "values", values)

    def __reduce__(self) -> tuple[Callable[[Path, int], "Column"], tuple[Path, int]]:
        return Column, (self.path, self.length)  # another process maps the file itself

    def read(self, start: int, stop: int) -> np.ndarray:
        """The numbers of tokens start … stop − 1 of the stream; a view."""
        return self.values[start:stop]


@contextmanager
def new_column(path: Path, length: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Zeros [length] to be filled; the file appears at `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        values = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=(length,))
        yield values
        values.flush()
        del values
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
