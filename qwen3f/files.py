"""Atomic and durable writes of files; reading whole files up to a size; paths from users."""

import os
import stat
import uuid
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from qwen3f.errors import UserError
from qwen3f.limits import FILE_BYTES, Limit


def write_atomically(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file under a temporary name, sync it to disk and rename it. Creates the directory if needed.

    content: the whole content, or its pieces, for a file that is too large for memory.
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
    """A file's content. Raises UserError before reading if the file is too large, or is no regular file but a pipe or a
    device such as /dev/zero (links are followed); OSError if it cannot be read."""
    there = path.stat()
    if not stat.S_ISREG(there.st_mode) and not stat.S_ISDIR(there.st_mode):  # a directory fails below
        raise UserError(f"{path} is no file but a pipe or a device; put a file there")
    if there.st_size > most.value():
        raise UserError(f"{path} has {there.st_size:,} bytes, {most.exceeded('bytes')}")
    return path.read_bytes()


def user_path(place: str | Path, where: str) -> Path:
    """`place`, where the home directory replaces ~ or ~USER. where: the key or flag that named it, for the error.

    Raises UserError if the user or the home directory does not exist.
    """
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        user = Path(place).parts[0]
        raise UserError(f"{where}: there is no home directory for {user}; write the whole path") from error


def is_file(path: str | Path) -> bool:
    """Whether the path is a file. False for a name that is too long, and if there is no permission to look."""
    return _looked_at(Path.is_file, path)


def exists(path: str | Path) -> bool:
    """Whether the path exists; as is_file otherwise."""
    return _looked_at(Path.exists, path)


def is_directory(path: str | Path) -> bool:
    """Whether the path is a directory; as is_file otherwise."""
    return _looked_at(Path.is_dir, path)


def decode_text(content: bytes) -> str:
    """A text file's content: UTF-8 without a signature (BOM), CR LF as LF. Raises UnicodeDecodeError."""
    return content.decode("utf-8-sig").replace("\r\n", "\n")


def sync(path: Path) -> None:
    """Waits until the content of a file, or the entries of a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path, synced: Collection[Path] = ()) -> None:
    """`sync` for `directory` and everything below it, except the files in `synced`."""
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
