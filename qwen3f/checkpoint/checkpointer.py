"""Checkpoints: a pytree of tensors and a small JSON record, written in the background.

On disk, `directory/<step>/state` holds the leaves, written by one of two backends (orbax.py, dcp.py), `meta/metadata`
is JSON as Orbax writes it, and `manifest.json` lists every file's size and sha256. With the default backend plain JAX
can read everything, and nothing is pickled. Leaves are stored whole, so any mesh can read what another one has written
(shards.py).

A step's directory gets its name by one rename after all its files have been written, and is renamed again before any
file in it is deleted. So a directory whose name is a step's number is always complete.
"""

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from qwen3f.checkpoint import commit, manifest
from qwen3f.checkpoint.background import Background
from qwen3f.checkpoint.commit import META, STATE, Backend, CheckpointWriteError
from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.checkpoint.retention import Retention
from qwen3f.checkpoint.shards import Shard, ShardOf, whole
from qwen3f.checkpoint.snapshot import Snapshot
from qwen3f.checkpoint.tree import LeafSpec, Name, Part, check_same_tree, data_leaves, holds_data, spec_of
from qwen3f.errors import UserError
from qwen3f.processes.world import ALONE, World
from qwen3f.strict_json import read_object
from qwen3f.tree import named_leaves
from sharding.state import local_shards, placed_like

State = TypeVar("State")
T = TypeVar("T")

BACKENDS = ("orbax", "dcp")


class StuckWrite(CheckpointWriteError):
    """Writing a checkpoint takes longer than allowed. It may still finish; no other save can start until then."""


class Checkpointer:
    """Saves and restores the training state under `directory`, in one subdirectory per step.

    directory: a local directory; the first save makes it.
    every: steps between checkpoints; 0 saves only after the last step.
    keep: keep this many of the latest checkpoints (0: all), or a Retention with more rules.
    asynchronous: whether `save` returns before the files are written.
    backend: writes "orbax" or "dcp". Orbax's checkpoints can always be read; DCP's, which contain a pickle, only with
      "dcp".
    timeout: seconds that one write may take before StuckWrite is raised; 0: no limit.
    world: the ranks that save and restore together. All of them must see the directory.
    shard_of: which part of a leaf each rank has (qwen3f.checkpoint.shards.shards); None: every rank has the whole leaf.

    A context manager: it waits for the last save. Without it (or close or wait), a save in progress is lost when the
    process ends. One run at a time may save under a directory; any number may read. Raises UserError for a negative
    number, an unknown backend, DCP on several ranks, or a `directory` that is a file.

    All ranks of the world make it together, and call save, wait, close, restore, restore_part and set_aside together,
    with the same arguments except their shards. An error on one rank is raised on all, with the same text, and the
    Checkpointer stays usable. The other methods, such as `steps`, return what this rank sees.
    """

    def __init__(
        self,
        directory: Path,
        every: int,
        keep: int | Retention,
        asynchronous: bool = True,
        backend: str = "orbax",
        timeout: float = 0.0,
        world: World = ALONE,
        shard_of: ShardOf | None = None,
    ) -> None:
        if every < 0:
            raise UserError(f"config.checkpoint.every is {every}: write 0 or a positive number of steps")
        if backend not in BACKENDS:
            raise UserError(f"config.checkpoint.backend is {backend!r}: write {' or '.join(BACKENDS)}")
        if backend == "dcp" and world.size > 1:
            raise UserError("config.checkpoint.backend=dcp saves one device's state; write orbax for a mesh")
        self.directory = Path(directory).absolute()
        if not self.directory.is_dir() and (self.directory.exists() or self.directory.is_symlink()):
            raise UserError(
                f"{self.directory} is a file, or a link to nothing: checkpoints need a directory, choose another "
                "--workdir"
            )
        self.every, self.asynchronous, self.backend, self.timeout = every, asynchronous, backend, timeout
        self.world, self._writers = world, world.apart()  # the writer threads exchange messages in their own group
        self._shard_of = shard_of or (lambda name, shape: whole(shape, world.main))
        self.retention = keep if isinstance(keep, Retention) else Retention(keep)
        self._snapshot = Snapshot()
        self._writing: Background | None = None
        self._step = 0  # step of the write in progress
        self._prepared: Background | None = None
        self._clean = False  # whether files that a killed process left have been deleted

    def should_save(self, step: int, last: bool) -> bool:
        """Whether the state after `step` steps is to be saved; `last` marks the run's final step."""
        return last or (self.every > 0 and step % self.every == 0)

    def prepare(self, state: Any) -> None:
        """Allocate host memory and import modules in the background, so that the first save need not wait."""
        shards, leaves = self._shards(data_leaves(state))

        def work() -> None:
            _backend(self.backend).load(self.world.main)
            self._snapshot.reserve(_written(shards, leaves))

        self._prepared = Background("prepare checkpoints", work)

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
        overlap: bool = False,
    ) -> None:
        """Copy `state` to host memory, and write it in the background. GPU work queued later does not affect the copy.

        state: a pytree of tensors or DTensors on any device; None and tensors without elements are not written.
        meta: JSON-like (tuples come back as lists, integer keys as strings).
        metrics: numbers by which `keep` may choose the best; values that are not finite are left out.
        overlap: the copy from a GPU may run at the same time as work that is queued later. That work may read the
            state; call `join` before anything writes into it.

        At most one write runs at a time: a save waits for the previous one. Raises UserError, without writing, if there
        is a checkpoint of `step` or a later one; CheckpointWriteError if this write can't start or the previous one
        failed; StuckWrite if the previous one does not end.
        """
        meta = json.loads(json.dumps(meta))  # so that a wrong meta fails here, not in the writer's thread
        kept = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        shards, leaves = self._shards(data_leaves(state))
        self.wait()

        def begin() -> dict[Name, Tensor]:
            if self.world.main:
                self._check_later(step)
            return commit.guarded(self.directory, step, lambda: self._begin(_written(shards, leaves)))

        try:
            copies = self.world.together(begin, UserError, CheckpointWriteError)
        except (UserError, CheckpointWriteError):
            self._snapshot.finish()  # this rank's copy may have started
            raise
        if not overlap:
            self.join()
        parts = {
            name: Part(spec_of(leaf)._replace(shape=shards[name].shape), shards[name], copies.get(name))
            for name, leaf in leaves.items()
        }
        self._step = step
        self._writing = Background(f"write checkpoint {step}", lambda: self._write(step, parts, meta, kept))
        if not self.asynchronous:
            self.wait()

    def join(self) -> None:
        """Make GPU work queued from now on wait for the copy of an overlapping `save`. The host does not wait."""
        self._snapshot.join()

    def wait(self) -> None:
        """Wait until the last save is on disk and the checkpoints that it replaces are deleted.

        Raises CheckpointWriteError, once, if the write failed (its subclass commit.OldCheckpointStays if an old
        checkpoint could not be deleted); StuckWrite, at every call, while the write exceeds `timeout`.
        """
        if self._prepared is not None:
            self._prepared.ended()  # if it failed, `save` raises the same error
            self._prepared = None
        if self._writing is not None:
            self.world.together(self._check_ended, StuckWrite)
            writing, self._writing = self._writing, None
            if writing.error is not None:
                raise writing.error

    def _check_ended(self) -> None:
        if not self._writing.ended(self.timeout):
            raise StuckWrite(
                f"the checkpoint of step {self._step} has not been written to {self.directory} within "
                f"{self.timeout:g} s ({commit.kept(self.directory)}), and no other can start until then: check whether "
                "the disk or network mount hangs, or write a larger --config.checkpoint.timeout"
            )

    def close(self) -> None:
        """As `wait`; then frees the host memory of the copy."""
        self.wait()
        self._snapshot = Snapshot()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.world = ALONE  # after an error the other ranks may not reach this point
        try:
            self.close()
        except CheckpointWriteError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # report the error that ended the run, with this one as a note

    def steps(self) -> list[int]:
        """The steps whose checkpoints are complete, ascending."""
        return commit.steps(self.directory)

    def latest(self) -> int | None:
        """The last complete checkpoint's step, or None."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """The directory of `step`'s checkpoint. Raises UserError when it isn't there."""
        if step not in (steps := self.steps()):
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.directory} holds no checkpoint of step {step}: there are {there}")
        return self.directory / str(step)

    def read_meta(self, step: int) -> dict[str, Any]:
        """The `meta` saved with `step`. UserError if there is no checkpoint, DamagedCheckpoint if it was changed."""
        with _reading(directory := self.path(step)):
            manifest.verify(directory, lambda name: name == META)
            return read_object(directory / META)

    def read_tree(self, step: int) -> dict[Name, LeafSpec]:
        """Path -> shape and dtype of every leaf of `step`, without reading values. Raises as `read_meta`."""
        backend = self._reader(directory := self.path(step))
        with _reading(directory):
            manifest.verify(directory, _needed(backend, None))
            return backend.read_tree(directory / STATE)

    def restore(self, like: State, step: int | None = None, cast: bool = False) -> tuple[State, dict[str, Any]]:
        """(state, meta) as saved at `step` (by default the latest), bit for bit.

        like: a pytree of tensors with the structure, shapes, dtypes and devices of the result (for the meta device it
            is on the CPU); its values are not used. On a mesh its leaves are DTensors or this rank's shards, and so are
            the result's; each rank reads only its own part.
        cast: floating-point leaves saved with another dtype are converted, as `Tensor.to` does.

        Waits for a save in progress, and raises as `wait`. Before it loads anything, it raises UserError if there is no
        such checkpoint or its tree differs from `like`, and DamagedCheckpoint if its files differ from its manifest
        (they are read once for this check).
        """
        return self._restore(like, step, None, cast)

    def restore_part(
        self, field: str, like: State, step: int | None = None, cast: bool = False
    ) -> tuple[State, dict[str, Any]]:
        """`restore` for one field of the saved state, such as "params". like: as for `restore`, for that field.

        With Orbax the other fields are neither read nor checked, so damage there does not matter.
        """
        return self._restore(like, step, field, cast)

    def _restore(self, like: State, step: int | None, field: str | None, cast: bool) -> tuple[State, dict[str, Any]]:
        self.wait()
        step = self.world.first(self.latest() if step is None else step)  # other ranks may see the last one later
        if step is None:
            raise UserError(f"{self.directory} holds no checkpoint: save one first, or choose another --workdir")
        directory = self.directory / str(step)
        backend = self._agreed(directory, lambda: self._reader(self.path(step)))
        prefix = () if field is None else (field,)
        self._verify(directory, (lambda name: True) if field is None else _needed(backend, field))
        leaves = {(*prefix, *name): leaf for name, leaf in named_leaves(like).items()}
        shards, local = self._shards({name: leaf for name, leaf in leaves.items() if holds_data(leaf)})

        def read() -> tuple[dict[Name, Tensor], dict[str, Any]]:
            here = {name: spec_of(leaf)._replace(shape=shards[name].shape) for name, leaf in local.items()}
            with _reading(directory):
                tree, meta = backend.read_tree(directory / STATE), read_object(directory / META)
            there = {name: spec for name, spec in tree.items() if name[: len(prefix)] == prefix}
            check_same_tree(there, here, str(directory), cast)
            with _reading(directory):
                return backend.read(directory / STATE, {name: Part(there[name], shards[name]) for name in here}), meta

        values, meta = self._agreed(directory, read)

        def restored(name: Name, leaf: Tensor | None) -> Tensor | None:
            if leaf is None:
                return None
            device = torch.device("cpu") if leaf.is_meta else leaf.device
            if name not in local:
                return placed_like(leaf, torch.empty_like(local_shards(leaf), device=device))
            return placed_like(leaf, values.pop(name).to(device, leaf.dtype))

        out = [restored(name, leaf) for name, leaf in leaves.items()]
        return pytree.tree_unflatten(out, pytree.tree_structure(like)), meta

    def _verify(self, directory: Path, needed: Callable[[str], bool]) -> None:
        """Check against the manifest: rank 0 checks all files' names and sizes, each rank the content of its share."""
        self._agreed(directory, lambda: manifest.check_names(directory) if self.world.main else None)
        share = (self.world.rank, self.world.size)
        self._agreed(directory, lambda: manifest.check_content(directory, needed, share))

    def _agreed(self, directory: Path, work: Callable[[], T]) -> T:
        """Run work(), which reads a checkpoint, on all ranks; errors are raised on all."""

        def checked() -> T:
            try:
                return work()
            except OSError as error:
                raise DamagedCheckpoint(f"{directory} is damaged or incomplete: {error}") from error

        return self.world.together(checked, DamagedCheckpoint, UserError)

    def set_aside(self, after: int) -> Path | None:
        """Move the checkpoints later than `after` to another directory, so that a run can resume from an earlier step.

        Returns that directory (see `commit.move_aside`), or None if there were none. Raises CheckpointWriteError if
        they can't be moved.
        """
        self.wait()
        moved = self.world.together(
            lambda: commit.move_aside(self.directory, after) if self.world.main else None, CheckpointWriteError
        )
        moved = self.world.first(moved and str(moved))
        return moved and Path(moved)

    def _shards(self, leaves: dict[Name, Tensor]) -> tuple[dict[Name, Shard], dict[Name, Tensor]]:
        """({path: this rank's Shard}, {path: this rank's tensor}) of the leaves."""
        local = {name: local_shards(leaf) for name, leaf in leaves.items()}
        return {name: self._shard_of(name, leaf.shape) for name, leaf in local.items()}, local

    def _check_later(self, step: int) -> None:
        there = commit.guarded(self.directory, step, self.steps)
        if there and step <= there[-1]:
            what = "already holds" if step in there else f"has a checkpoint of step {there[-1]}, later than"
            raise UserError(
                f"{self.directory} {what} step {step}, and nothing is overwritten: resume from step {there[-1]}, "
                "or choose another --workdir"
            )

    def _begin(self, leaves: dict[Name, Tensor]) -> dict[Name, Tensor]:
        """Prepare the directory, and start the copy of the leaves that this rank writes."""
        if self.world.main:
            if self._clean:
                self.directory.mkdir(parents=True, exist_ok=True)
            else:
                commit.clean(self.directory)
            self._clean = True
        return self._snapshot.begin(leaves)

    def _write(self, step: int, parts: dict[Name, Part], meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """In the writer's thread: write the files, rename the directory, delete expired checkpoints."""
        backend, world = _backend(self.backend), self._writers
        commit.commit(
            self.directory, step, parts, meta, metrics, backend=backend, world=world, before=self._snapshot.finish
        )
        commit.delete_expired(self.directory, step, self.retention, world)

    def _reader(self, directory: Path) -> Backend:
        """The backend that wrote `directory`."""
        if not (directory / STATE / ".metadata").exists():
            return _backend("orbax")
        if self.backend != "dcp":
            raise UserError(
                f"{directory} was written by DCP and contains a pickle, which can run code when it is read; if you "
                "trust whoever wrote it, write --config.checkpoint.backend=dcp (for inspect.py --config.backend=dcp)"
            )
        return _backend("dcp")


def _written(shards: dict[Name, Shard], leaves: dict[Name, Tensor]) -> dict[Name, Tensor]:
    """The leaves of which this rank writes a part."""
    return {name: leaf for name, leaf in leaves.items() if shards[name].writes and shards[name].pieces}


def _needed(backend: Backend, field: str | None) -> Callable[[str], bool]:
    """(file name) -> whether the file is needed to restore one field; field None: to read only names and shapes."""
    needed = backend.needed_for(field)
    return lambda name: name == META or (name.startswith(f"{STATE}/") and needed(name.removeprefix(f"{STATE}/")))


def _backend(name: str) -> Backend:
    return importlib.import_module(f"qwen3f.checkpoint.{name}")  # only the backend that is used is imported


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """A context that turns errors of reading or parsing files into DamagedCheckpoint."""
    try:
        yield
    except DamagedCheckpoint:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedCheckpoint(f"{directory} is damaged or incomplete: {error}") from error
