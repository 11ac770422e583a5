"""A checkpoint comes to the disk whole or not at all, and all ranks of a run agree on which.

They write into a directory under another name, each its own files. One rename gives it its step's number.
"""

import errno
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from qwen3f.checkpoint import manifest
from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.checkpoint.retention import Retention
from qwen3f.checkpoint.tree import LeafSpec, Name, Part
from qwen3f.errors import TrainingError
from qwen3f.files import sync, sync_tree, write_atomically
from qwen3f.processes.world import World

T = TypeVar("T")

STATE, META = "state", "meta/metadata"
WRITING, DELETED = ".writing", ".deleted"  # our suffixes for a checkpoint that is being written, or deleted


class CheckpointWriteError(TrainingError):
    """A checkpoint could not be written (disk full, directory gone, …); those written before it are untouched."""


class OldCheckpointStays(CheckpointWriteError):
    """A checkpoint is written and whole, but one that it replaces could not be deleted."""


class Backend(Protocol):
    """The functions of orbax.py and dcp.py."""

    def load(self, main: bool) -> None: ...
    def write(self, directory: Path, parts: dict[Name, Part], main: bool) -> list[str]: ...
    def read_tree(self, directory: Path) -> dict[Name, LeafSpec]: ...
    def read(self, directory: Path, wanted: dict[Name, Part]) -> dict[Name, Tensor]: ...
    def needed_for(self, field: str | None) -> Callable[[str], bool]: ...


def steps(directory: Path) -> list[int]:
    """The steps whose checkpoints are complete, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if _is_checkpoint(path))


def clean(directory: Path) -> None:
    """Make the directory; delete what a killed process left half written or half deleted."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in [path for suffix in (WRITING, DELETED) for path in directory.glob(f"*{suffix}")]:
        _remove(path)


def guarded(directory: Path, step: int, work: Callable[[], T]) -> T:
    """work(), whose every error becomes a CheckpointWriteError."""
    try:
        return work()
    except CheckpointWriteError:
        raise
    except Exception as error:
        raise CheckpointWriteError(
            f"the checkpoint of step {step} could not be written to {directory} ({kept(directory)}): {error}"
        ) from error


def kept(directory: Path) -> str:
    """What is there, in words."""
    try:
        there = steps(directory)
    except OSError as error:
        return f"what is there cannot be read: {error}"
    return f"the last whole one is of step {there[-1]}" if there else "there is none before it"


def commit(
    directory: Path,
    step: int,
    parts: dict[Name, Part],
    meta: dict[str, Any],
    metrics: Mapping[str, float],
    *,
    backend: Backend,
    world: World,
    before: Callable[[], None],
) -> None:
    """Write a checkpoint. All ranks together, each with its own parts; the rest is rank 0's.

    before: returns when the parts' values are there.

    Raises, on all ranks alike, CheckpointWriteError: then nothing of it is left.
    """
    writing = directory / f"{step}{WRITING}"

    def agreed(work: Callable[[], T]) -> T:
        return world.together(lambda: guarded(directory, step, work), CheckpointWriteError)

    def begin() -> None:
        before()
        if world.main:
            shutil.rmtree(writing, ignore_errors=True)  # of a try before that failed
            writing.mkdir()
            (writing / STATE).mkdir()

    def look() -> None:
        if not (writing / STATE).is_dir():
            raise FileNotFoundError(
                f"rank {world.rank} does not see {writing}, which rank 0 has made: the workdir must be on a file "
                "system that all hosts share"
            )

    def store() -> dict[str, manifest.Entry]:
        files = [f"{STATE}/{name}" for name in backend.write(writing / STATE, parts, world.main)]
        if world.main:
            write_atomically(writing / META, json.dumps(meta).encode())
        for path in {path for name in files for path in (writing / name, (writing / name).parent)}:
            sync(path)
        return manifest.describe(writing, files)

    def publish() -> None:
        manifest.write(writing, metrics, described)
        sync_tree(writing, {writing / name for name in described})
        writing.rename(directory / str(step))
        sync(directory)

    try:
        agreed(begin)
        agreed(look)
        described = {name: entry for own in world.gather(agreed(store)) for name, entry in own.items()}
        agreed(lambda: publish() if world.main else None)
    except CheckpointWriteError:
        if world.main:
            shutil.rmtree(writing, ignore_errors=True)  # on a full disk its space is needed
        raise


def delete_expired(directory: Path, step: int, retention: Retention, world: World) -> None:
    """Delete what the retention gives up, after `step` was written: rank 0 does. All ranks together.

    Raises, on all ranks alike, OldCheckpointStays: for whatever goes wrong, since the new one is there.
    """

    def delete() -> None:
        what = f"what config.checkpoint.keep gives up in {directory}"
        try:
            asked = retention.keep and retention.best  # else no metric decides, and no manifest is read for it
            known = {there: _metrics(directory / str(there)) if asked else {} for there in steps(directory)}
            for old in retention.expired({there: values or {} for there, values in known.items()}):
                if known[old] is None:  # it may be among the best: the next save looks again
                    continue
                place = directory / str(old)
                what = f"{place}, which config.checkpoint.keep gives up,"
                _remove(place.rename(place.with_name(f"{old}{DELETED}")))
        except Exception as error:  # a rank that left here alone would leave the others waiting
            raise OldCheckpointStays(
                f"the checkpoint of step {step} is written, but {what} could not be deleted: {error}"
            ) from error

    world.together(lambda: delete() if world.main else None, OldCheckpointStays)


def move_aside(directory: Path, after: int) -> Path | None:
    """Move the checkpoints later than `after` into a directory of their own; returns it, or None if there are none.

    It is `directory`'s name with ".asideN", beside it. Where that is another file system, since `directory` is a link,
    it is beside what the link leads to, or else within.

    Raises CheckpointWriteError. What was moved before stays so: the latest are moved first.
    """
    try:
        later = [step for step in steps(directory) if step > after]
        if not later:
            return None
        real = directory.resolve()
        for place in (directory, real, real / directory.name):
            numbered = (place.with_name(f"{directory.name}.aside{count}") for count in itertools.count(1))
            aside = next(path for path in numbered if not path.exists())
            if _moved(directory, reversed(later), aside):
                return aside
    except OSError as error:
        raise CheckpointWriteError(
            f"the checkpoints after step {after} could not be moved out of {directory} ({error}): move them yourself"
        ) from error
    raise CheckpointWriteError(
        f"{directory} lies on several file systems: move the checkpoints after step {after} yourself"
    )


def _moved(directory: Path, later: Iterable[int], aside: Path) -> bool:
    """Whether they could be moved there; False, with nothing changed, for another file system."""
    aside.mkdir()
    try:
        for step in later:
            (directory / str(step)).rename(aside / str(step))
    except OSError as error:
        if not any(aside.iterdir()):
            aside.rmdir()
            if error.errno == errno.EXDEV:
                return False
        raise
    return True


def _remove(path: Path) -> None:
    """A directory with all that is in it; of a link the link alone, since what it leads to may be someone's archive."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _metrics(checkpoint: Path) -> dict[str, float] | None:
    """What it was saved with. Of a damaged one nothing is known: it can't be among the best. None: the disk failed."""
    try:
        return manifest.metrics(checkpoint)
    except DamagedCheckpoint:
        return {}
    except OSError:
        return None


def _is_checkpoint(path: Path) -> bool:
    return path.name.isdecimal() and str(int(path.name)) == path.name and (path / STATE).is_dir()
