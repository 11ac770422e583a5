"""A checkpoint's manifest: the size and sha256 of every file, so that damage is found before it is trained on.

`manifest.json` in the checkpoint's directory: {"files": {"state/…": {"bytes": …, "sha256": …}, …}}.
"""

import hashlib
import json
from pathlib import Path

from absl import logging

from qwen3f.errors import UserError
from qwen3f.files import write_atomically
from qwen3f.strict_json import read_object

NAME = "manifest.json"


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not the ones that were written."""


def write(directory: Path) -> None:
    """Describe all files below `directory` as they are. Reads each once. OSError if the disk fails."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(directory)
    }
    write_atomically(directory / NAME, (json.dumps({"files": files}, indent=1) + "\n").encode())


def verify(directory: Path) -> int | None:
    """The number of files, if all are as the manifest says; None, with a warning, if there is no manifest.

    Sizes are compared before anything is read. Names in the manifest are compared with what lies in the directory and
    never opened, so they cannot lead elsewhere.

    Raises DamagedCheckpoint naming the first file that is missing, unknown, or of another size or content.
    """
    if not (directory / NAME).exists():
        logging.warning("%s has no %s (its writer was killed after the commit): its files can't be checked",
                        directory, NAME)  # fmt: skip
        return None
    wanted = _entries(directory / NAME)
    there = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    for name in sorted(wanted | there):
        if name not in there:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} is missing")
        if name not in wanted:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} is not in its {NAME}; remove the file")
        size = there[name].stat().st_size
        if size != wanted[name][0]:
            raise DamagedCheckpoint(f"{directory} is damaged: {name} has {size} bytes instead of {wanted[name][0]}")
    for name, path in there.items():
        if _sha256(path) != wanted[name][1]:
            raise DamagedCheckpoint(f"{directory} is damaged: the checksum of {name} is not the one in its {NAME}")
    return len(wanted)


def _entries(path: Path) -> dict[str, tuple[int, str]]:
    try:
        files = read_object(path)["files"]
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path.parent} is damaged: {NAME} cannot be read ({error})") from error


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / NAME)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
