"""Checkpoints: a pytree of tensors and a small JSON record, written in the background.

On disk, `directory/<step>/state` holds the leaves, by one of two backends (see orbax.py and dcp.py), `meta/metadata` is
JSON as Orbax writes it, and `manifest.json` lists every file's size and sha256. By default plain JAX reads all of it
and nothing is pickled.

What is kept: a step's directory appears by one rename after everything in it has been written, and leaves by one rename
before anything in it is deleted, so a directory that bears a step's number is always whole.
"""

import importlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from qwen3f.errors import TrainingError, UserError
from qwen3f.files import sync, sync_tree, write_atomically
from qwen3f.strict_json import read_object
from qwen3f.train import manifest
from qwen3f.train.background import Background
from qwen3f.train.leaves import LeafSpec, Name, check_same_tree, data_leaves, holds_data, spec_of
from qwen3f.train.manifest import DamagedCheckpoint
from qwen3f.train.retention import Retention
from qwen3f.train.snapshot import Snapshot
from qwen3f.tree import named_leaves

State = TypeVar("State")

STATE, META = "state", "meta/metadata"
WRITING, DELETED = ".writing", ".deleted"  # our suffixes for a checkpoint that is being written, or deleted
BACKENDS = ("orbax", "dcp")


class CheckpointWriteError(TrainingError):
    """A checkpoint could not be written (disk full, directory gone, …); those written before it are untouched."""


class StuckWrite(CheckpointWriteError):
    """A checkpoint has been written for longer than allowed; it may still end. No other can be begun meanwhile."""


class Backend(Protocol):
    """The functions of orbax.py and dcp.py."""

    def load(self) -> None: ...
    def write(self, directory: Path, leaves: dict[Name, Tensor]) -> None: ...
    def read_tree(self, directory: Path) -> dict[Name, LeafSpec]: ...
    def read(self, directory: Path, wanted: dict[Name, LeafSpec]) -> dict[Name, Tensor]: ...
    def needed_for(self, field: str) -> Callable[[str], bool]: ...


class Checkpointer:
    """Saves and restores the training state under `directory`, one subdirectory a step.

    directory: a local directory; made by the first save, only read before that.
    every: steps between checkpoints; 0 saves after the last step alone.
    keep: which stay: a number of the latest (0: all), or more rules.
    asynchronous: whether `save` returns before the files are written.
    backend: "orbax" or "dcp" writes. Orbax's are always read; DCP's, a part of which is a pickle, by "dcp" alone.
    timeout: seconds that one write may take before StuckWrite is raised; 0: no limit.

    A context manager: a save that is under way when the process ends, neither waited for nor closed, is lost.
    One process at a time may save under a directory; any number may read. Raises UserError for a negative number, an
    unknown backend or a `directory` that is a file.
    """

    def __init__(
        self,
        directory: Path,
        every: int,
        keep: int | Retention,
        asynchronous: bool = True,
        backend: str = "orbax",
        timeout: float = 0.0,
    ) -> None:
        if every < 0:
            raise UserError(f"config.checkpoint.every is {every}: write 0 or a positive number of steps")
        if backend not in BACKENDS:
            raise UserError(f"config.checkpoint.backend is {backend!r}: write {' or '.join(BACKENDS)}")
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file: checkpoints need a directory, choose another --workdir")
        self.every, self.asynchronous, self.backend, self.timeout = every, asynchronous, backend, timeout
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
        leaves = data_leaves(state)

        def work() -> None:
            _backend(self.backend).load()
            self._snapshot.reserve(leaves)

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

        state: a pytree of tensors on any device; None and tensors without elements hold no data and are not written.
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
        leaves = data_leaves(state)
        self.wait()
        there = self.steps()
        if there and step <= there[-1]:
            what = "already holds" if step in there else f"has a checkpoint of step {there[-1]}, later than"
            raise UserError(
                f"{self.directory} {what} step {step}, and nothing is overwritten: resume from step {there[-1]}, "
                "or choose another --workdir"
            )
        try:
            self._begin_writing()
            copies = self._snapshot.begin(leaves)
        except (OSError, RuntimeError) as error:  # RuntimeError: no memory for the copy
            raise self._write_error(step, error) from error
        if not overlap:
            self.join()
        self._step = step
        self._writing = Background(f"write checkpoint {step}", lambda: self._write(step, copies, meta, kept))
        if not self.asynchronous:
            self.wait()

    def join(self) -> None:
        """Makes what is queued next on the GPU run after the copy of an overlapping `save`. The host does not wait."""
        self._snapshot.join()

    def wait(self) -> None:
        """Returns when the last save is on disk and what it replaces is gone.

        Raises CheckpointWriteError, once, if the write failed or an old checkpoint could not be deleted; StuckWrite,
        each time, while the write does not end in `timeout`.
        """
        if self._prepared is not None:
            self._prepared.ended()  # did it fail, `save` meets the same error
            self._prepared = None
        if self._writing is None:
            return
        if not self._writing.ended(self.timeout):
            raise StuckWrite(
                f"the checkpoint of step {self._step} has not been written to {self.directory} within "
                f"{self.timeout:g} s ({self._kept()}), and no other can be begun meanwhile: see whether the disk or "
                "network mount hangs, or write a larger --config.checkpoint.timeout"
            )
        writing, self._writing = self._writing, None
        if writing.error is not None:
            raise writing.error

    def close(self) -> None:
        """Waits as `wait` does and frees the snapshot's memory."""
        self.wait()
        self._snapshot = Snapshot()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except CheckpointWriteError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the error that ended the run stays the one reported

    def steps(self) -> list[int]:
        """The steps whose checkpoints are complete, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if _is_checkpoint(path))

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
        """The `meta` saved with `step`. Raises UserError when it isn't there, DamagedCheckpoint if it can't be read."""
        with _reading(directory := self.path(step)):
            return read_object(directory / META)

    def read_tree(self, step: int) -> dict[Name, LeafSpec]:
        """Path -> shape and dtype of every leaf saved with `step`; reads no values. Raises as `read_meta`."""
        backend = self._reader(directory := self.path(step))
        with _reading(directory):
            return backend.read_tree(directory / STATE)

    def restore(self, like: State, step: int | None = None, cast: bool = False) -> tuple[State, dict[str, Any]]:
        """The state and meta saved at `step` (the latest by default), every bit as it was.

        like: a pytree of tensors giving structure, shapes, dtypes and devices (the CPU for the meta device); its
            values are not read or written.
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

        By Orbax the rest is not read, nor its checksums compared: damage there does not matter.
        """
        return self._restore(like, step, field, cast)

    def _restore(self, like: State, step: int | None, field: str | None, cast: bool) -> tuple[State, dict[str, Any]]:
        self.wait()
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self.directory} holds no checkpoint: save one first, or choose another --workdir")
        directory = self.path(step)
        backend = self._reader(directory)
        prefix = () if field is None else (field,)
        needed = (lambda file: True) if field is None else backend.needed_for(field)
        manifest.verify(directory, lambda file: needed(file.removeprefix(f"{STATE}/")))
        leaves = {(*prefix, *name): leaf for name, leaf in named_leaves(like).items()}
        here = {name: spec_of(leaf) for name, leaf in leaves.items() if holds_data(leaf)}
        there = {name: spec for name, spec in self.read_tree(step).items() if name[: len(prefix)] == prefix}
        check_same_tree(there, here, str(directory), cast)
        with _reading(directory):
            values = backend.read(directory / STATE, {name: there[name] for name in here})

        def restored(name: Name, leaf: Tensor | None) -> Tensor | None:
            device = torch.device("cpu") if leaf is None or leaf.is_meta else leaf.device
            if name not in here:
                return None if leaf is None else torch.empty_like(leaf, device=device)
            return values.pop(name).to(device, leaf.dtype, copy=True)  # the backend's own memory is not ours to write

        out = [restored(name, leaf) for name, leaf in leaves.items()]
        return pytree.tree_unflatten(out, pytree.tree_structure(like)), self.read_meta(step)

    def set_aside(self, after: int) -> Path | None:
        """Moves the checkpoints later than `after` out of the way, to continue from an earlier step; deletes none.

        Returns the directory that they lie in now (beside `directory`), or None where there were none.
        """
        self.wait()
        later = [step for step in self.steps() if step > after]
        if not later:
            return None
        count = 1
        while (aside := self.directory.with_name(f"{self.directory.name}.aside{count}")).exists():
            count += 1
        aside.mkdir()
        for step in reversed(later):  # the latest first: were this cut short, what remains would still be in order
            (self.directory / str(step)).rename(aside / str(step))
        return aside

    def _begin_writing(self) -> None:
        """Makes the directory; deletes, once, what a killed process left half written or half deleted."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._clean:
            for path in [path for suffix in (WRITING, DELETED) for path in self.directory.glob(f"*{suffix}")]:
                shutil.rmtree(path)
            self._clean = True

    def _write(self, step: int, copies: dict[Name, Tensor], meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """In the writer's thread: the files, the manifest, the rename; then the checkpoints that `keep` gives up."""
        writing = self.directory / f"{step}{WRITING}"
        try:
            self._snapshot.finish()
            shutil.rmtree(writing, ignore_errors=True)  # of a try before that failed
            writing.mkdir()
            _backend(self.backend).write(writing / STATE, copies)
            write_atomically(writing / META, json.dumps(meta).encode())
            manifest.write(writing, metrics)
            sync_tree(writing)
            writing.rename(self.directory / str(step))
            sync(self.directory)
        except Exception as error:
            shutil.rmtree(writing, ignore_errors=True)  # on a full disk its space is needed
            raise self._write_error(step, error) from error
        for old in self.retention.expired({there: self._metrics(there) for there in self.steps()}):
            directory = self.directory / str(old)
            try:
                shutil.rmtree(directory.rename(directory.with_name(f"{old}{DELETED}")))
            except OSError as error:
                raise CheckpointWriteError(
                    f"the checkpoint of step {step} is written, but {directory}, which config.checkpoint.keep gives "
                    f"up, could not be deleted: {error}"
                ) from error

    def _metrics(self, step: int) -> dict[str, float]:
        """What `step` was saved with. Of a damaged one nothing is known: it can't be among the best."""
        try:
            return manifest.metrics(self.directory / str(step))
        except DamagedCheckpoint:
            return {}

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

    def _write_error(self, step: int, error: Exception) -> CheckpointWriteError:
        return CheckpointWriteError(
            f"the checkpoint of step {step} could not be written to {self.directory} ({self._kept()}): {error}"
        )

    def _kept(self) -> str:
        latest = self.latest()
        return "there is none before it" if latest is None else f"the last whole one is of step {latest}"


def _backend(name: str) -> Backend:
    return importlib.import_module(f"qwen3f.train.{name}")  # neither imports what it stands on before it is used


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """What can't be read or made sense of, as DamagedCheckpoint."""
    try:
        yield
    except DamagedCheckpoint:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{directory} is damaged or incomplete: {error}") from error


def _is_checkpoint(path: Path) -> bool:
    return path.name.isdecimal() and str(int(path.name)) == path.name and (path / STATE).is_dir()
