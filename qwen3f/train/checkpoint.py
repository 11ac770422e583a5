"""Checkpoints: a pytree of tensors and a small JSON record, written by Orbax in the background.

On disk, `directory/<step>/state` is an Orbax tree (`StandardSave`) of nested dicts named like the pytree (by a
NamedTuple's fields, a dict's keys, a sequence's indices) and `directory/<step>/meta` is JSON. Plain JAX reads both;
nothing is pickled.

What is kept: a step's directory appears by one rename after everything in it has been written, and leaves by one rename
before anything in it is deleted, so a directory that bears a step's number is always whole.

Beside them `manifest.json` lists every file's size and sha256, written once the rest is committed and checked before
anything is restored.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from qwen3f.errors import TrainingError, UserError
from qwen3f.train import manifest
from qwen3f.train.manifest import DamagedCheckpoint
from qwen3f.train.orbax import epath, from_jax, import_jax_and_orbax, to_jax
from qwen3f.tree import named_leaves

State = TypeVar("State")
Name = tuple[str, ...]  # a leaf's path: ("params", "model.norm.weight")

TEMPORARY = "*.orbax-checkpoint-tmp*"  # Orbax's name for a checkpoint that is still being written
DELETED = ".deleted"  # our suffix for a checkpoint that is being deleted


class CheckpointWriteError(TrainingError):
    """A checkpoint could not be written (disk full, directory gone, …); those written before it are untouched."""


class LeafSpec(NamedTuple):
    """Shape and dtype (JAX's and torch's common name, such as "bfloat16") of one leaf."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


class Checkpointer:
    """Saves and restores the training state under `directory`, one subdirectory a step.

    directory: a local directory; made by the first save, only read before that.
    every: steps between checkpoints; 0 saves after the last step alone.
    keep: how many of the latest checkpoints stay; 0 keeps all.
    asynchronous: whether `save` returns before the files are written.

    A context manager: a save that is under way when the interpreter ends, neither waited for nor closed, is lost.
    One process at a time may save under a directory; any number may read. Raises UserError for a negative number or a
    `directory` that is a file.
    """

    def __init__(self, directory: Path, every: int, keep: int, asynchronous: bool = True) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 0:
                raise UserError(f"config.checkpoint.{name} is {value}: write 0 or a positive number of steps")
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file: checkpoints need a directory, choose another --workdir")
        self.every, self.keep, self.asynchronous = every, keep, asynchronous
        self._buffers: dict[Name, Tensor] = {}  # host memory of the snapshot, used again by the next one
        self._writer: Any = None  # Orbax's AsyncCheckpointer, made by the first save
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def should_save(self, step: int, last: bool) -> bool:
        """Whether the state after `step` steps is to be saved; `last` marks the run's final step."""
        return last or (self.every > 0 and step % self.every == 0)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copies `state` to host memory and has it written; returns once the copy is taken.

        state: a pytree of tensors on any device; None and tensors without elements hold no data and are not written.
        meta: what JSON can hold (tuples come back as lists, integer keys as strings).

        At most one write runs: a save waits for the one before it. Raises UserError, writing nothing, when `step` or a
        later one is there already, and CheckpointWriteError when this write can't begin or the one before it failed.
        """
        meta = json.loads(json.dumps(meta))  # fails here rather than in the writer's thread
        self.wait()
        there = self.steps()
        if there and step <= there[-1]:
            what = "already holds" if step in there else f"has a checkpoint of step {there[-1]}, later than"
            raise UserError(
                f"{self.directory} {what} step {step}, and nothing is overwritten: resume from step {there[-1]}, "
                "or choose another --workdir"
            )
        _, ocp = import_jax_and_orbax()
        arrays = _nest({name: to_jax(leaf) for name, leaf in self._snapshot(state).items()})
        try:
            if self._writer is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
                self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
            self._writer.save(self.directory / str(step), args=items)
        except (OSError, RuntimeError, ValueError) as error:
            raise self._write_error(step, error) from error
        self._pending = self._thread.submit(self._finish, step)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is on disk and what it replaces is gone.

        Raises, once, what went wrong in the background: CheckpointWriteError if the write failed, OSError if an old
        checkpoint could not be deleted.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits as `wait` does and frees the snapshot's memory. The checkpointer can't save after it."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._writer is not None:
                self._writer.close()
            self._buffers = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except (CheckpointWriteError, OSError) as failure:
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
        _, ocp = import_jax_and_orbax()
        with _reading(directory := self.path(step)):
            return ocp.JsonCheckpointHandler().restore(epath(directory / "meta"))

    def read_tree(self, step: int) -> dict[Name, LeafSpec]:
        """Path -> shape and dtype of every leaf saved with `step`; reads no values. Raises as `read_meta`."""
        _, ocp = import_jax_and_orbax()
        with _reading(directory := self.path(step)):
            leaves = _walk(ocp.PyTreeCheckpointHandler().metadata(epath(directory / "state")))
            return {name: LeafSpec(tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves}

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """The state and meta saved at `step` (the latest by default), every bit as it was.

        like: a pytree of tensors giving structure, shapes, dtypes and devices (the CPU for the meta device); its
            values are not read or written.

        Waits for a save under way, and raises what `wait` raises. Before loading anything, raises UserError when the
        step isn't there or its tree is not like `like`, and DamagedCheckpoint when its files aren't those of its
        manifest (reading them once for it). A checkpoint whose writer was killed before the manifest is used with a
        warning.
        """
        return self._restore(like, step, ())

    def restore_part(self, field: str, like: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """`restore` of one field of the saved state, such as "params", to which `like` belongs; the rest isn't read."""
        return self._restore(like, step, (field,))

    def _restore(self, like: State, step: int | None, prefix: Name) -> tuple[State, dict[str, Any]]:
        self.wait()
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self.directory} holds no checkpoint: save one first, or choose another --workdir")
        manifest.verify(directory := self.path(step))
        jax, ocp = import_jax_and_orbax()
        leaves = {(*prefix, *name): leaf for name, leaf in named_leaves(like).items()}
        here = {name: _spec(leaf) for name, leaf in leaves.items() if _holds_data(leaf)}
        wanted = {name: spec for name, spec in self.read_tree(step).items() if name[: len(prefix)] == prefix}
        _check_same_tree(wanted, here, str(directory))
        cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        target = {
            name: jax.ShapeDtypeStruct(spec.shape, jax.numpy.dtype(spec.dtype), sharding=cpu)
            for name, spec in here.items()
        }
        target = _nest(target)
        how = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=bool(prefix))
        handler = ocp.PyTreeCheckpointHandler()  # the standard one reads whole trees only
        with _reading(directory):
            arrays = dict(_walk(handler.restore(epath(directory / "state"), args=args)))
        values = [from_jax(arrays.pop(name), leaf) if name in here else _empty(leaf) for name, leaf in leaves.items()]
        return pytree.tree_unflatten(values, pytree.tree_structure(like)), self.read_meta(step)

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

    @torch.no_grad()
    def _snapshot(self, state: Any) -> dict[Name, Tensor]:
        """Copies the leaves into host buffers, made once: touching fresh pages costs several times the copy."""
        leaves = {name: leaf for name, leaf in named_leaves(state).items() if _holds_data(leaf)}
        _check_names_apart(leaves)
        old, self._buffers = self._buffers, {}
        for name, leaf in leaves.items():
            buffer = old.pop(name, None)
            if buffer is None or _spec(buffer) != _spec(leaf):
                # Contiguous always, pinned for a GPU's copies.
                buffer = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)
            self._buffers[name] = buffer.copy_(leaf, non_blocking=True)
        for device in {leaf.device for leaf in leaves.values() if leaf.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return self._buffers

    def _finish(self, step: int) -> None:
        """In the writer's thread: waits for the write, then deletes what `keep` no longer covers."""
        try:
            self._writer.wait_until_finished()
        except (OSError, RuntimeError, ValueError) as error:
            raise self._write_error(step, error) from error
        try:
            manifest.write(self.directory / str(step))
        except OSError as error:
            raise self._write_error(step, error) from error
        for old in self.steps()[: -self.keep] if self.keep else []:
            directory = self.directory / str(old)
            shutil.rmtree(directory.rename(directory.with_name(f"{old}{DELETED}")))

    def _write_error(self, step: int, error: Exception) -> CheckpointWriteError:
        latest = self.latest()
        kept = "there is none before it" if latest is None else f"the last whole one is of step {latest}"
        return CheckpointWriteError(
            f"the checkpoint of step {step} could not be written to {self.directory} ({kept}): {error}"
        )

    def _remove_leftovers(self) -> None:
        """Deletes what a killed process left half written or half deleted."""
        for pattern in (TEMPORARY, f"*{DELETED}"):
            for path in self.directory.glob(pattern):
                shutil.rmtree(path)


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """What Orbax raises for files that it can't make sense of, as DamagedCheckpoint."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{directory} is damaged or incomplete: {error}") from error


def _is_checkpoint(path: Path) -> bool:
    # Orbax puts the metadata file there first and renames the directory last.
    return path.name.isdecimal() and str(int(path.name)) == path.name and (path / "_CHECKPOINT_METADATA").is_file()


def _holds_data(leaf: Any) -> bool:
    if leaf is not None and not isinstance(leaf, Tensor):
        raise TypeError(f"a checkpoint's leaf is a {type(leaf).__name__}: make it a tensor, or put it into meta")
    return leaf is not None and leaf.numel() > 0


def _check_names_apart(leaves: dict[Name, Tensor]) -> None:
    # Orbax joins a path by dots on disk: of two that join alike, it would keep one without a word.
    joined: dict[str, Name] = {}
    for name in leaves:
        other = joined.setdefault(".".join(name), name)
        if other != name:
            raise ValueError(f"the state's leaves {other} and {name} would share a name on disk: rename one")


def _spec(leaf: Tensor) -> LeafSpec:
    return LeafSpec(tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."))


def _empty(leaf: Tensor | None) -> Tensor | None:
    return None if leaf is None else torch.empty_like(leaf, device="cpu" if leaf.is_meta else leaf.device)


def _nest(flat: dict[Name, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        node = nested
        for key in name[:-1]:
            node = node.setdefault(key, {})
        node[name[-1]] = leaf
    return nested


def _walk(tree: Any, prefix: Name = ()) -> Iterator[tuple[Name, Any]]:
    """The leaves of nested dicts, with their paths; undoes `_nest`."""
    tree = getattr(tree, "tree", tree)  # Orbax wraps a tree's metadata
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _walk(value, (*prefix, key))


def _check_same_tree(on_disk: dict[Name, LeafSpec], here: dict[Name, LeafSpec], where: str) -> None:
    names = [*here, *(name for name in on_disk if name not in here)]
    differing = [name for name in names if on_disk.get(name) != here.get(name)]
    if not differing:
        return
    shown = [
        f"{'.'.join(name)} is {on_disk.get(name, 'absent')} on disk and {here.get(name, 'absent')} in this run"
        for name in differing[:3]
    ]
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise UserError(
        f"workdir's checkpoint belongs to another model ({where}): {'; '.join(shown)}{more}. "
        "Choose another --workdir, or the configuration that this one was started with"
    )
