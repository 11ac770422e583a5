"""Writes a checkpoint atomically: it is complete or not there, and all ranks know which.

Each rank writes its own files into a directory with another name. One rename gives the directory its step's number.
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
WRITING, DELETED = ".writing", ".deleted"  # suffixes of a checkpoint that is being written, or being deleted


class CheckpointWriteError(TrainingError):
    """A checkpoint could not be written (disk full, directory gone, …). Earlier checkpoints are not changed."""


class OldCheckpointStays(CheckpointWriteError):
    """A checkpoint was written completely, but one that it replaces could not be deleted."""


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
    """Make the directory; delete checkpoints in it that a killed process left half written or half deleted."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in [path for suffix in (WRITING, DELETED) for path in directory.glob(f"*{suffix}")]:
        _remove(path)


def guarded(directory: Path, step: int, work: Callable[[], T]) -> T:
    """Run work(); any error becomes a CheckpointWriteError."""
    try:
        return work()
    except CheckpointWriteError:
        raise
    except Exception as error:  # a backend may raise anything; one kind tells the run that a save failed
        raise CheckpointWriteError(
            f"the checkpoint of step {step} could not be written to {directory} ({kept(directory)}): {error}"
        ) from error


def kept(directory: Path) -> str:
    """Words for a message: which checkpoint is the last complete one."""
    try:
        there = steps(directory)
    except OSError as error:
        return f"the directory cannot be read: {error}"
    return f"the last complete one is of step {there[-1]}" if there else "there is no earlier one"


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
    """Write a checkpoint. All ranks call it together, each with its own parts; rank 0 writes everything else.

    before: called first; waits until the parts' values have been copied to host memory. Raises CheckpointWriteError, on
    all ranks; then none of the checkpoint's files are left.
    """
    writing = directory / f"{step}{WRITING}"

    def agreed(work: Callable[[], T]) -> T:
        return world.together(lambda: guarded(directory, step, work), CheckpointWriteError)

    def begin() -> None:
        before()
        if world.main:
            shutil.rmtree(writing, ignore_errors=True)  # left by an earlier attempt that failed
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
            shutil.rmtree(writing, ignore_errors=True)  # frees its space, in case the disk is full
        raise


def delete_expired(directory: Path, step: int, retention: Retention, world: World) -> None:
    """After `step` was written, delete the checkpoints that the retention does not keep. Rank 0 deletes; all ranks call
    it together.

    Any error is raised as OldCheckpointStays, on all ranks, because the new checkpoint is complete.
    """

    def delete() -> None:
        what = f"checkpoints in {directory} that config.checkpoint.keep does not keep"
        try:
            asked = retention.keep and retention.best  # only then metrics decide, and manifests have to be read
            known = {there: _metrics(directory / str(there)) if asked else {} for there in steps(directory)}
            for old in retention.expired({there: values or {} for there, values in known.items()}):
                if known[old] is None:  # unreadable metrics: it may be among the best, so the next save decides
                    continue
                place = directory / str(old)
                what = f"{place}, which config.checkpoint.keep does not keep,"
                _remove(place.rename(place.with_name(f"{old}{DELETED}")))
        except Exception as error:  # every error: if rank 0 left here alone, the other ranks would wait for ever
            raise OldCheckpointStays(
                f"the checkpoint of step {step} is written, but {what} could not be deleted: {error}"
            ) from error

    world.together(lambda: delete() if world.main else None, OldCheckpointStays)


def move_aside(directory: Path, after: int) -> Path | None:
    """Move the checkpoints later than `after` into a new directory; returns it, or None if there are none.

    The new directory is next to `directory` and has its name plus ".asideN". If `directory` is a link to another file
    system, it is next to the link's target, or else inside the target.

    Raises CheckpointWriteError. The latest checkpoints are moved first; those already moved are not moved back.
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
    """Move checkpoints to `aside`. Returns whether that worked; False, with nothing changed, if it is on another file
    system."""
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
    """Delete a directory with its content. Of a link only the link is deleted: its target may be an archive."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _metrics(checkpoint: Path) -> dict[str, float] | None:
    """The metrics of a checkpoint; {} for a damaged one, which can't be among the best; None if the disk failed."""
    try:
        return manifest.metrics(checkpoint)
    except DamagedCheckpoint:
        return {}
    except OSError:
        return None


def _is_checkpoint(path: Path) -> bool:
    return path.name.isdecimal() and str(int(path.name)) == path.name and (path / STATE).is_dir()
