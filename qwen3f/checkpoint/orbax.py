"""Leaves on disk by Orbax, which plain JAX reads too.

`directory/<leaf's path joined by dots>/` holds a leaf as a Zarr array (zarr.py) of plain files: so damage has a leaf's
name, and one part of a state is read and checked without the others. `_METADATA` holds the paths. Nothing is pickled.

JAX is imported by rank 0's saves only, and is held to the CPU.
"""

import base64
import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from qwen3f.checkpoint import zarr
from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.checkpoint.tree import LeafSpec, Name, Part, nest
from qwen3f.errors import UserError
from qwen3f.strict_json import read_object

NAMES = "_METADATA"
SHARDINGS = "_sharding"
ARRAYS = "array_metadatas"  # a directory of Orbax's beside the leaves', where it has written them


def load(main: bool) -> None:
    """Import what `write` uses, which for rank 0, with JAX's start, takes seconds, of the interpreter's lock too."""
    zarr.load()
    if main:
        import_jax_and_orbax()[0].devices("cpu")


def write(directory: Path, parts: dict[Name, Part], main: bool) -> list[str]:
    """Write this rank's part of every leaf, through to the disk; returns its files' names below `directory`.

    directory: there already, and empty but for what other ranks write. main: whether this is rank 0, which also writes
    what the ranks' files have in common. OSError or ValueError if it fails.
    """
    if main:
        jax, ocp = import_jax_and_orbax()
        _handler().save(epath(directory), args=ocp.args.PyTreeSave(nest(parts)))
        # What Orbax notes of a jax.Array's place, and reads where a program does not name another.
        where = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": str(jax.devices("cpu")[0])})
        shardings = {base64.b64encode(".".join(name).encode()).decode(): where for name in parts}
        (directory / SHARDINGS).write_text(json.dumps(shardings))
    else:
        zarr.write({directory / ".".join(name): part for name, part in parts.items()}, create=False)
    return [f"{'.'.join(name)}/{file}" for name, part in parts.items() for file in zarr.files_of(part)]


def read_tree(directory: Path) -> dict[Name, LeafSpec]:
    """Path -> shape and dtype of every leaf; reads no values, and nothing outside `directory`.

    Raises DamagedCheckpoint for names that lead elsewhere, and for arrays that are not stored as `write` does.
    """
    try:
        metadata = read_object(directory / NAMES)
        if metadata.get("use_ocdbt") or metadata["use_zarr3"]:
            raise ValueError("it is not in the format of this program")
        entries = [entry["key_metadata"] for entry in metadata["tree_metadata"].values()]
        names = [tuple(str(key["key"]) for key in keys) for keys in entries]
        return {name: zarr.read_spec(directory / _checked(".".join(name))) for name in names}
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{directory} is damaged: its leaves' names or shapes cannot be read ({error})"
        ) from error


def read(directory: Path, wanted: dict[Name, Part]) -> dict[Name, Tensor]:
    """This rank's tensors of some or all of `read_tree`'s leaves, on the CPU; of their files it reads what it needs.

    Raises DamagedCheckpoint, before any memory is taken, when files that it needs don't hold exactly their bytes.
    """
    places = {name: directory / ".".join(name) for name in wanted}
    for name, part in wanted.items():
        zarr.check(places[name], part)
    tensors = zarr.read({places[name]: part for name, part in wanted.items()})
    return {name: tensors.pop(places[name]) for name in wanted}


def needed_for(field: str | None) -> Callable[[str], bool]:
    """Whether a file, by its name below a checkpoint's state, is read to restore the leaves under `field` alone.

    field: None for `read_tree` alone.
    """

    def needed(file: str) -> bool:
        leaf, _, rest = file.partition("/")
        # The shapes of all leaves are read; what does not lie in a leaf's directory is of all of them.
        of_all = not rest or leaf == ARRAYS or rest == zarr.ARRAY
        return of_all or (field is not None and (leaf == field or leaf.startswith(f"{field}.")))

    return needed


def _checked(joined: str) -> str:
    if "/" in joined or joined in ("", ".", ".."):
        raise ValueError(f"the name {joined!r} leads out of the checkpoint")
    return joined


@functools.cache
def _handler() -> Any:
    """Orbax's handler of pytrees, whose leaves are Parts."""
    jax, ocp = import_jax_and_orbax()

    class Parts(ocp.type_handlers.ArrayHandler):  # known to readers as what it extends: a jax.Array's
        async def serialize(self, values: Sequence[Part], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
            zarr.write({Path(info.parent_dir, info.name): part for info, part in zip(infos, values)}, create=True)
            return []  # nothing is left to wait for

        def memory_size(self, values: Sequence[Part]) -> Sequence[tuple[int, int]]:  # Orbax up to 0.11 logs it
            return [(part.spec.bytes, part.spec.bytes) for part in values]

    handler = Parts()
    registry = ocp.type_handlers.create_type_handler_registry((Part, handler), (jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)


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
    return jax, ocp


def _quiet_orbax(record: logging.LogRecord) -> bool:
    """A filter on absl's logger, which Orbax shares with the user: of Orbax's own records drops those below a warning.

    An error of a write is raised too, and `Checkpointer` reports it.
    """
    return f"{os.sep}orbax{os.sep}" not in record.pathname or record.levelno >= logging.WARNING


def epath(path: Path) -> Any:
    """The path in the type that Orbax's handlers require."""
    from etils import epath as etils_epath

    return etils_epath.Path(path)
