"""Files that are either wholly there or not at all, and stay."""

import os
import uuid
from collections.abc import Collection
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it into place, on disk; makes the directory if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
