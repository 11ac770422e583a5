"""A checkpoint's manifest: the size and sha256 of every file, so that damage is found before a run uses it.

`manifest.json` in the checkpoint's directory: {"files": {"state/…": {"bytes": …, "sha256": …}, …}, "metrics": {…}}.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from qwen3f.errors import UserError
from qwen3f.files import write_atomically
from qwen3f.strict_json import read_object

NAME = "manifest.json"
THREADS = 4
Entry = dict[str, Any]  # {"bytes": …, "sha256": …} of a file
CHUNK = 2**24  # bytes per read; large reads and hashes leave the interpreter's lock to the training loop


class DamagedCheckpoint(UserError):
    """A checkpoint's files are not those that were written."""


def describe(directory: Path, names: Sequence[str]) -> dict[str, Entry]:
    """Name -> size and sha256 of files below `directory`. Reads each file once. OSError if the disk fails."""
    paths = [directory / name for name in names]
    return {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for name, path, digest in zip(names, paths, _digests(paths))
    }


def describe_all(directory: Path) -> dict[str, Entry]:
    """`describe` of all files below `directory`. Raises DamagedCheckpoint if one is a symbolic link."""
    return describe(directory, list(_files(directory)))


def write(directory: Path, metrics: Mapping[str, float], described: Mapping[str, Entry] | None = None) -> None:
    """Write manifest.json for all files below `directory`. metrics: finite numbers. OSError if the disk fails.

    described: entries of files that need not be read again, from `describe`, perhaps of other hosts.
    """
    files = dict(described or {})
    files |= describe(directory, [name for name in _files(directory) if name not in files])
    content = {"files": dict(sorted(files.items())), "metrics": dict(metrics)}
    write_atomically(directory / NAME, (json.dumps(content, indent=1) + "\n").encode())


def verify(directory: Path, needed: Callable[[str], bool] = lambda name: True) -> int:
    """Check all names and sizes, then the content of the files whose name is `needed`; returns how many these are.

    Raises as check_names and check_content.
    """
    check_names(directory)
    return check_content(directory, needed)


def check_names(directory: Path) -> None:
    """Compares the names and sizes of all files with the manifest's; no file is read.

    Names in the manifest are compared with what lies in the directory and never opened.

    Raises DamagedCheckpoint, with the name, for the first file that is missing, unknown, of another size, or neither a
    regular file nor a directory (such as a symbolic link); also for a name in the manifest that leads out of the
    directory.
    """
    wanted, there = entries(directory), _files(directory)
    for name in sorted(wanted | there):
        if name not in there:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} is missing")
        if name not in wanted:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} is not in its {NAME}; remove the file")
        size = there[name].stat().st_size
        if size != wanted[name][0]:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} has {size} bytes instead of {wanted[name][0]}")


def check_content(
    directory: Path, needed: Callable[[str], bool] = lambda name: True, share: tuple[int, int] = (0, 1)
) -> int:
    """Read files and compare their sha256 with the manifest's; call check_names first. Returns how many it read.

    needed: (file name) -> whether to read it. share: (index, count): `count` readers share the files in parts of
    similar size, and this is reader `index`. Raises DamagedCheckpoint, with the name, for a file that cannot be read or
    whose content differs.
    """
    wanted, (place, count) = entries(directory), share
    read = sorted(filter(needed, wanted), key=lambda name: (-wanted[name][0], name))[place::count]
    try:
        found = _digests([directory / name for name in read])
    except OSError as error:
        raise DamagedCheckpoint(f"{directory} is damaged or incomplete: {error}") from error
    for name, digest in zip(read, found):
        if digest != wanted[name][1]:
            raise DamagedCheckpoint(f"{directory} is damaged: the checksum of {name} is not the one in its {NAME}")
    return len(read)


def metrics(directory: Path) -> dict[str, float]:
    """The metrics in the manifest. Raises DamagedCheckpoint if they can't be read."""
    values = _read(directory).get("metrics", {})
    if not isinstance(values, dict) or not all(isinstance(value, int | float) for value in values.values()):
        raise DamagedCheckpoint(f"{directory} is damaged: the metrics in its {NAME} are not names and numbers")
    return values


def _read(directory: Path) -> dict[str, Any]:
    try:
        return read_object(directory / NAME)
    except UserError as error:
        raise DamagedCheckpoint(f"{directory} is damaged: {NAME} cannot be read ({error})") from error


def entries(directory: Path) -> dict[str, tuple[int, str]]:
    """Name -> (bytes, sha256) of every file in the manifest. DamagedCheckpoint if it can't be read."""
    try:
        found = {name: (entry["bytes"], entry["sha256"]) for name, entry in _read(directory)["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{directory} is damaged: {NAME} cannot be read ({error!r})") from error
    for name in found:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} in its {NAME} leads out of the checkpoint")
    return found


def _files(directory: Path) -> dict[str, Path]:
    """Name -> path of all files except the manifest, sorted by name. Symbolic links are errors, and not followed."""
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(directory):  # does not enter a directory behind a symbolic link
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise DamagedCheckpoint(f"{directory} is damaged: {path} is not a regular file or directory")
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
