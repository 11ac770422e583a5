"""Checkpoints: a pytree of tensors and a small JSON record, written in the background.

On disk, `directory/<step>/state` holds the leaves, by one of two backends (see orbax.py and dcp.py), `meta/metadata` is
JSON as Orbax writes it, and `manifest.json` lists every file's size and sha256. By default plain JAX reads all of it
and nothing is pickled. The leaves are whole, whatever mesh wrote them, so any other reads them (shards.py).

What is kept: a step's directory appears by one rename after everything in it has been written, and leaves by one rename
before anything in it is deleted, so a directory that bears a step's number is always whole.
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
    """A checkpoint has been written for longer than allowed; it may still end. No other can be begun meanwhile."""


class Checkpointer:
    """Saves and restores the training state under `directory`, one subdirectory a step.

    directory: a local directory; made by the first save, only read before that.
    every: steps between checkpoints; 0 saves after the last step alone.
    keep: which stay: a number of the latest (0: all), or more rules.
    asynchronous: whether `save` returns before the files are written.
    backend: "orbax" or "dcp" writes. Orbax's are always read; DCP's, a part of which is a pickle, by "dcp" alone.
    timeout: seconds that one write may take before StuckWrite is raised; 0: no limit.
    world: the ranks that save and restore together, in a directory that all of them see.
    shard_of: what each of them has of a leaf (qwen3f.checkpoint.shards.shards); None: all of it.

    A context manager: a save that is under way when the process ends, neither waited for nor closed, is lost.
    One run at a time may save under a directory; any number may read. Raises UserError for a negative number, an
    unknown backend, DCP on several ranks, or a `directory` that is a file.

    All ranks of the world make it together, and call save, wait, close, restore, restore_part and set_aside together,
    with the same arguments but for their shards. What one of them raises, all raise, with the same words, and the
    Checkpointer goes on on all of them. The other methods, `steps` among them, tell what this rank sees.
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
        self.world, self._writers = world, world.apart()  # a conversation of the threads that write
        self._shard_of = shard_of or (lambda name, shape: whole(shape, world.main))
        self.retention = keep if isinstance(keep, Retention) else Retention(keep)
        self._snapshot = Snapshot()
        self._writing: Background | None = None
        self._step = 0  # of the write under way
        self._prepared: Background | None = None
        self._clean = False  # whether a dead process's leftovers are gone

    def should_save(self, step: int, last: bool) -> bool:
        """Whether the state after `step` steps is to be saved; `last` marks the run's final step."""
        return last or (self.every > 0 and step % self.every == 0)

    def prepare(self, state: Any) -> None:
        """Begin, in the background, what the first save of `state` would else wait for: host memory and imports."""
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
        """Copies `state` to host memory and has it written. What is queued on the GPU later does not touch the copy.

        state: a pytree of tensors on any device, DTensors among them; None and tensors without elements hold no data
            and are not written.
        meta: what JSON can hold (tuples come back as lists, integer keys as strings).
        metrics: numbers that `keep` may choose the best by; those not finite are left out.
        overlap: the copy from a GPU may run beside what is queued next, which may read the state; call `join` before
            anything writes into it.

        At most one write runs: a save waits for the one before it. Raises UserError, writing nothing, when `step` or a
        later one is there already; CheckpointWriteError when this write can't begin or the one before it failed;
        StuckWrite when that one does not end.
        """
        meta = json.loads(json.dumps(meta))  # fails here rather than in the writer's thread
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
            self._snapshot.finish()  # where this rank's copy has begun
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
        """Makes what is queued next on the GPU run after the copy of an overlapping `save`. The host does not wait."""
        self._snapshot.join()

    def wait(self) -> None:
        """Returns when the last save is on disk and what it replaces is gone.

        Raises CheckpointWriteError, once, if the write failed, as commit.OldCheckpointStays if an old checkpoint could
        not be deleted; StuckWrite, each time, while the write does not end in `timeout`.
        """
        if self._prepared is not None:
            self._prepared.ended()  # did it fail, `save` meets the same error
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
                f"{self.timeout:g} s ({commit.kept(self.directory)}), and no other can be begun meanwhile: see whether "
                "the disk or network mount hangs, or write a larger --config.checkpoint.timeout"
            )

    def close(self) -> None:
        """Waits as `wait` does and frees the snapshot's memory."""
        self.wait()
        self._snapshot = Snapshot()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.world = ALONE  # the other ranks may not come here
        try:
            self.close()
        except CheckpointWriteError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the error that ended the run stays the one reported

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
        """The `meta` saved with `step`. Raises UserError when it isn't there, DamagedCheckpoint if it has changed."""
        with _reading(directory := self.path(step)):
            manifest.verify(directory, lambda name: name == META)
            return read_object(directory / META)

    def read_tree(self, step: int) -> dict[Name, LeafSpec]:
        """Path -> shape and dtype of every leaf saved with `step`; reads no values. Raises as `read_meta`."""
        backend = self._reader(directory := self.path(step))
        with _reading(directory):
            manifest.verify(directory, _needed(backend, None))
            return backend.read_tree(directory / STATE)

    def restore(self, like: State, step: int | None = None, cast: bool = False) -> tuple[State, dict[str, Any]]:
        """The state and meta saved at `step` (the latest by default), every bit as it was.

        like: a pytree of tensors giving structure, shapes, dtypes and devices (the CPU for the meta device); its
            values are not read or written. On a mesh leaves come back as DTensors where they are, or as this rank's
            shards; each rank reads its own.
        cast: floating-point leaves saved with another dtype are converted, as `Tensor.to` does.

        Waits for a save under way, and raises what `wait` raises. Before loading anything, raises UserError when the
        step isn't there or its tree is not like `like`, and DamagedCheckpoint when its files aren't those of its
        manifest (reading them once for it).
        """
        return self._restore(like, step, None, cast)

    def restore_part(
        self, field: str, like: State, step: int | None = None, cast: bool = False
    ) -> tuple[State, dict[str, Any]]:
        """`restore` of one field of the saved state, such as "params", to which `like` belongs.

        By Orbax the rest of the state is not read, nor its checksums compared: damage there does not matter.
        """
        return self._restore(like, step, field, cast)

    def _restore(self, like: State, step: int | None, field: str | None, cast: bool) -> tuple[State, dict[str, Any]]:
        self.wait()
        step = self.world.first(self.latest() if step is None else step)  # rank 0 sees the last one first
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
        """Rank 0 looks at all files' names and sizes, then each rank into its share of them."""
        self._agreed(directory, lambda: manifest.check_names(directory) if self.world.main else None)
        share = (self.world.rank, self.world.size)
        self._agreed(directory, lambda: manifest.check_content(directory, needed, share))

    def _agreed(self, directory: Path, work: Callable[[], T]) -> T:
        """work(), which reads a checkpoint, on all ranks; what is wrong with it, raised by all."""

        def checked() -> T:
            try:
                return work()
            except OSError as error:
                raise DamagedCheckpoint(f"{directory} is damaged or incomplete: {error}") from error

        return self.world.together(checked, DamagedCheckpoint, UserError)

    def set_aside(self, after: int) -> Path | None:
        """Moves the checkpoints later than `after` out of the way, to continue from an earlier step; deletes none.

        Returns the directory that they lie in now (see `commit.move_aside`), or None where there were none. Raises
        CheckpointWriteError where they can't be moved.
        """
        self.wait()
        moved = self.world.together(
            lambda: commit.move_aside(self.directory, after) if self.world.main else None, CheckpointWriteError
        )
        moved = self.world.first(moved and str(moved))
        return moved and Path(moved)

    def _shards(self, leaves: dict[Name, Tensor]) -> tuple[dict[Name, Shard], dict[Name, Tensor]]:
        """What this rank has of the leaves: which part, and its values."""
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
        """Make the directory ready, and begin the copy of what this rank writes."""
        if self.world.main:
            if self._clean:
                self.directory.mkdir(parents=True, exist_ok=True)
            else:
                commit.clean(self.directory)
            self._clean = True
        return self._snapshot.begin(leaves)

    def _write(self, step: int, parts: dict[Name, Part], meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """In the writer's thread: the files, the rename; then the checkpoints that `keep` gives up."""
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
                f"{directory} was written by DCP, a part of which is a pickle and can run code when it is read; if you "
                "trust whoever wrote it, write --config.checkpoint.backend=dcp (for inspect.py --config.backend=dcp)"
            )
        return _backend("dcp")


def _written(shards: dict[Name, Shard], leaves: dict[Name, Tensor]) -> dict[Name, Tensor]:
    """Those leaves of which this rank writes something."""
    return {name: leaf for name, leaf in leaves.items() if shards[name].writes and shards[name].pieces}


def _needed(backend: Backend, field: str | None) -> Callable[[str], bool]:
    """Whether a checkpoint's file is read to restore one field; None: to read the leaves' names and shapes alone."""
    needed = backend.needed_for(field)
    return lambda name: name == META or (name.startswith(f"{STATE}/") and needed(name.removeprefix(f"{STATE}/")))


def _backend(name: str) -> Backend:
    return importlib.import_module(f"qwen3f.checkpoint.{name}")  # neither imports what it stands on before it is used


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """What can't be read or made sense of, as DamagedCheckpoint."""
    try:
        yield
    except DamagedCheckpoint:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{directory} is damaged or incomplete: {error}") from error
