"""Files that are either wholly there or not at all, and stay; files that are read whole, up to a size; users' paths."""

import os
import uuid
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from qwen3f.errors import UserError
from qwen3f.limits import FILE_BYTES, Limit


def write_atomically(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file under a temporary name and rename it into place, on disk; makes the directory if there is none.

    content: whole, or in pieces, of a file that is too long to be in memory beside what it is made of.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_bounded(path: Path, most: Limit = FILE_BYTES) -> bytes:
    """A file's content. Raises UserError, before reading, for one that is too large; OSError if it cannot be read."""
    size = path.stat().st_size
    if size > most.value():
        raise UserError(f"{path} has {size:,} bytes, {most.exceeded('bytes')}")
    return path.read_bytes()


def user_path(place: str | Path, where: str) -> Path:
    """`place` with the home directory in place of ~ or ~USER. where: the key or flag that named it, for the error.

    Raises UserError if there is no such user, or no home of this one.
    """
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        user = Path(place).parts[0]
        raise UserError(f"{where}: there is no home directory for {user}; write the whole path") from error


def is_file(path: str | Path) -> bool:
    """Whether there is such a file. A name that is too long is none, nor is what may not be looked at."""
    return _looked_at(Path.is_file, path)


def exists(path: str | Path) -> bool:
    """Likewise, of anything there."""
    return _looked_at(Path.exists, path)


def is_directory(path: str | Path) -> bool:
    """Likewise, of a directory."""
    return _looked_at(Path.is_dir, path)


def decode_text(content: bytes) -> str:
    """A text file's content: UTF-8 without a signature (BOM), CR LF as LF. Raises UnicodeDecodeError."""
    return content.decode("utf-8-sig").replace("\r\n", "\n")


def sync(path: Path) -> None:
    """Returns when a file's content, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path, synced: Collection[Path] = ()) -> None:
    """`sync` of everything below `directory` and of itself, but for the files `synced`."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            if (path := Path(folder, name)) not in synced:
                sync(path)
        sync(Path(folder))


def _looked_at(look: Callable[[Path], bool], path: str | Path) -> bool:
    try:
        return look(Path(path))
    except (OSError, ValueError):
        return False
