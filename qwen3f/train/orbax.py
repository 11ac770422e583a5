"""Leaves on disk by Orbax, which plain JAX reads too; and tensors handed over to JAX and back without a copy too many.

`directory/<leaf's path joined by dots>/` holds a leaf as a Zarr array in files of exactly its bytes (weights hardly
compress): so damage has a leaf's name, and one part of a state is read and checked without the others.
`_METADATA` holds the paths. Nothing is pickled.

JAX is imported by the first call of `import_jax_and_orbax` only, and is held to the CPU.
"""

import functools
import itertools
import logging
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from qwen3f.errors import UserError
from qwen3f.strict_json import read_object
from qwen3f.train.leaves import LeafSpec, Name, flatten, nest
from qwen3f.train.manifest import DamagedCheckpoint

NAMES, ARRAY = "_METADATA", ".zarray"
SHARDINGS = "array_metadatas"  # a directory of Orbax's beside the leaves'


def load() -> None:
    """Import JAX and Orbax and start JAX's CPU client, which takes seconds, of the interpreter's lock too."""
    import_jax_and_orbax()[0].devices("cpu")


def write(directory: Path, leaves: dict[Name, Tensor]) -> None:
    """Write CPU tensors to a directory that isn't there yet, through to the disk. OSError or ValueError if it fails."""
    _, ocp = import_jax_and_orbax()
    arrays = nest({name: to_jax(leaf) for name, leaf in leaves.items()})
    _handler(ocp).save(epath(directory), args=ocp.args.PyTreeSave(arrays))


def read_tree(directory: Path) -> dict[Name, LeafSpec]:
    """Path -> shape and dtype of every leaf; reads no values, and nothing outside `directory`.

    Raises DamagedCheckpoint for names that lead elsewhere, and for arrays that are not stored as `write` does.
    """
    try:
        metadata = read_object(directory / NAMES)
        if metadata["use_ocdbt"] or metadata["use_zarr3"]:
            raise ValueError("it is not in the format of this program")
        entries = [entry["key_metadata"] for entry in metadata["tree_metadata"].values()]
        names = [tuple(str(key["key"]) for key in keys) for keys in entries]
        return {name: _read_spec(directory, name) for name in names}
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{directory} is damaged: its leaves' names or shapes cannot be read ({error})"
        ) from error


def read(directory: Path, wanted: dict[Name, LeafSpec]) -> dict[Name, Tensor]:
    """The values of the leaves `wanted`, some or all of `read_tree`'s, on the CPU; not to be written into.

    Raises DamagedCheckpoint, before any memory is taken, when a leaf's files don't hold exactly its bytes.
    """
    for name, spec in wanted.items():
        _check_files(directory, name, spec)
    jax, ocp = import_jax_and_orbax()
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    target = nest({
        name: jax.ShapeDtypeStruct(spec.shape, jax.numpy.dtype(spec.dtype), sharding=cpu)
        for name, spec in wanted.items()
    })  # fmt: skip
    how = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
    arrays = dict(flatten(_handler(ocp).restore(epath(directory), args=args)))
    return {name: torch.from_dlpack(arrays.pop(name)) for name in wanted}


def needed_for(field: str) -> Callable[[str], bool]:
    """Whether a file, by its name below a checkpoint's state, is read to restore the leaves under `field` alone."""

    def needed(file: str) -> bool:
        leaf, _, rest = file.partition("/")
        # The shapes of all leaves are read; what does not lie in a leaf's directory is of all of them.
        return not rest or leaf in (field, SHARDINGS) or leaf.startswith(f"{field}.") or rest == ARRAY

    return needed


def _handler(ocp: ModuleType) -> Any:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)


def _read_spec(directory: Path, name: Name) -> LeafSpec:
    joined = ".".join(name)
    if "/" in joined or joined in ("", ".", ".."):
        raise ValueError(f"the name {joined!r} leads out of the checkpoint")
    array = read_object(directory / joined / ARRAY)
    shape = tuple(int(size) for size in array["shape"])
    if min(shape, default=1) < 1:
        raise ValueError(f"the shape of {joined} is {list(shape)}")
    spec = LeafSpec(shape, _dtype_name(str(array["dtype"])))
    if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        raise ValueError(f"the dtype of {joined} is {array['dtype']}, which torch has not")
    return spec


def _dtype_name(zarr: str) -> str:
    # Zarr writes numpy's codes, such as <f4, and the names of types that numpy doesn't have, such as bfloat16.
    return np.dtype(zarr).name if zarr[:1] in "<>|" else zarr


def _check_files(directory: Path, name: Name, spec: LeafSpec) -> None:
    joined = ".".join(name)
    place = directory / joined
    array = read_object(place / ARRAY)
    chunk = tuple(int(size) for size in array["chunks"])
    fits = len(chunk) == len(spec.shape) and all(1 <= part <= size for part, size in zip(chunk, spec.shape))
    if not fits or array.get("compressor") is not None or array.get("filters") is not None:
        raise DamagedCheckpoint(f"{directory} is damaged: {joined} is not stored as whole, plain chunks")
    counts = [math.ceil(size / part) for size, part in zip(spec.shape, chunk)]
    count, size = math.prod(counts), LeafSpec(chunk, spec.dtype).bytes
    there = {path.name: path.stat().st_size for path in place.iterdir() if path.name != ARRAY}
    indices = itertools.islice(itertools.product(*map(range, counts)), len(there) + 1)  # no more, whatever it claims
    if there != dict.fromkeys((".".join(map(str, index)) or "0" for index in indices), size):
        raise DamagedCheckpoint(f"{directory} is damaged: {joined}, {spec}, is not in {count} files of {size} bytes")


@functools.cache
def import_jax_and_orbax() -> tuple[ModuleType, ModuleType]:
    """Imports jax and orbax.checkpoint under this project's rules, once (about a second)."""
    # Read when JAX is imported: on a GPU machine it would otherwise take the card's memory from torch.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")  # for a program that imported jax before us
    jax.config.update("jax_enable_x64", True)  # else int64 and float64 would be truncated
    if hasattr(jax.config, "jax_enable_preemption_service"):  # else JAX takes SIGTERM for itself
        jax.config.update("jax_enable_preemption_service", False)
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_quiet_orbax)
    logging.getLogger("asyncio").addFilter(_no_orbax_task)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited", RuntimeWarning)  # likewise
    return jax, ocp


def _quiet_orbax(record: logging.LogRecord) -> bool:
    """A filter on absl's logger, which Orbax shares with the user: acts on Orbax's own records alone.

    Drops what is below a warning, and the tracebacks of errors: Orbax logs a failed write's several times over, and
    raises the same error, which `Checkpointer` reports.
    """
    if f"{os.sep}orbax{os.sep}" in record.pathname:
        record.exc_info = None
        return record.levelno >= logging.WARNING
    return True


def _no_orbax_task(record: logging.LogRecord) -> bool:
    """A filter on asyncio's logger: of a failed write's tasks Orbax awaits one, and asyncio complains of the rest."""
    message = record.getMessage()
    return f"{os.sep}orbax{os.sep}" not in message and "OCDBT" not in message  # OCDBT: its storage format


def epath(path: Path) -> Any:
    """The path in the type that Orbax's handlers require."""
    from etils import epath as etils_epath

    return etils_epath.Path(path)


class _HostMemory:
    """A CPU tensor for dlpack. A pinned one calls its device CUDA's, which a JAX held to the CPU doesn't know."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU

    def __dlpack__(self, **options: Any) -> Any:
        return to_dlpack(self.tensor)


def to_jax(tensor: Tensor) -> Any:
    """A CPU tensor, pinned or not, as a jax.Array over the same memory."""
    jax, _ = import_jax_and_orbax()
    return jax.dlpack.from_dlpack(_HostMemory(tensor))
