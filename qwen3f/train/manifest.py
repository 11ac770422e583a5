"""A checkpoint's manifest: the size and sha256 of every file, so that damage is found before it is trained on.

`manifest.json` in the checkpoint's directory: {"files": {"state/…": {"bytes": …, "sha256": …}, …}, "metrics": {…}}.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from qwen3f.errors import UserError
from qwen3f.files import write_atomically
from qwen3f.strict_json import read_object

NAME = "manifest.json"
THREADS = 4
CHUNK = 2**24  # bytes; reading and hashing so many at once leaves the interpreter's lock to the training loop


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not the ones that were written."""


def write(directory: Path, metrics: Mapping[str, float]) -> None:
    """Describe all files below `directory` as they are; reads each once. metrics: finite. OSError if the disk fails."""
    there = _files(directory)
    files = {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(there.items(), _digests(list(there.values())))
    }
    write_atomically(
        directory / NAME, (json.dumps({"files": files, "metrics": dict(metrics)}, indent=1) + "\n").encode()
    )


def verify(directory: Path, needed: Callable[[str], bool] = lambda name: True) -> int:
    """The number of files whose content is as the manifest says: those whose name is `needed`.

    The sizes of all files are compared before any is read; the content of the others isn't read. Names in the manifest
    are compared with what lies in the directory and never opened.

    Raises DamagedCheckpoint naming the first file that is missing, unknown, of another size or content, a symbolic link
    or anything else but a file or directory; or a name in the manifest that leads out of the directory.
    """
    wanted = _entries(directory)
    there = _files(directory)
    for name in sorted(wanted | there):
        if name not in there:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} is missing")
        if name not in wanted:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} is not in its {NAME}; remove the file")
        size = there[name].stat().st_size
        if size != wanted[name][0]:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} has {size} bytes instead of {wanted[name][0]}")
    read = [name for name in there if needed(name)]
    for name, digest in zip(read, _digests([there[name] for name in read])):
        if digest != wanted[name][1]:
            raise DamagedCheckpoint(f"{directory} is damaged: the checksum of {name} is not the one in its {NAME}")
    return len(read)


def metrics(directory: Path) -> dict[str, float]:
    """The metrics that `write` got. Raises DamagedCheckpoint if they can't be read."""
    values = _read(directory).get("metrics", {})
    if not isinstance(values, dict) or not all(isinstance(value, int | float) for value in values.values()):
        raise DamagedCheckpoint(f"{directory} is damaged: the metrics in its {NAME} are not names and numbers")
    return values


def _read(directory: Path) -> dict[str, Any]:
    try:
        return read_object(directory / NAME)
    except UserError as error:
        raise DamagedCheckpoint(f"{directory} is damaged: {NAME} cannot be read ({error})") from error


def _entries(directory: Path) -> dict[str, tuple[int, str]]:
    try:
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in _read(directory)["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{directory} is damaged: {NAME} cannot be read ({error!r})") from error
    for name in entries:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} in its {NAME} leads out of the checkpoint")
    return entries


def _files(directory: Path) -> dict[str, Path]:
    """Name -> path of all files but the manifest, sorted by name. Nothing is followed out of the directory."""
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(directory):  # does not enter a directory behind a symbolic link
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise DamagedCheckpoint(f"{directory} is damaged: {path} is no file or directory of its own")
        paths = [Path(folder, name) for name in files]
        found |= {path.relative_to(directory).as_posix(): path for path in paths}
    found.pop(NAME, None)
    return dict(sorted(found.items()))


def _digests(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, path.stat().st_size) or 1))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
