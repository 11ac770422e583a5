"""Leaves on disk in Orbax's format, which plain JAX can read too.

`directory/<leaf's path joined by dots>/` holds a leaf as a Zarr array (zarr.py) of plain files. So a damaged file shows
which leaf is damaged, and a part of a state can be read and checked alone. `_METADATA` holds the paths. Nothing is
pickled.

Only rank 0 imports JAX, only for saving, and lets it use only the CPU.
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
ARRAYS = "array_metadatas"  # a directory of Orbax's own, if Orbax itself wrote the leaves


def load(main: bool) -> None:
    """Import what `write` needs. On rank 0 that includes JAX's start, which takes seconds and holds the interpreter's
    lock."""
    zarr.load()
    if main:
        import_jax_and_orbax()[0].devices("cpu")


def write(directory: Path, parts: dict[Name, Part], main: bool) -> list[str]:
    """Write this rank's part of every leaf, and flush it to the disk. Returns its files' names below `directory`.

    directory: exists, and is empty except for other ranks' files. main: whether this is rank 0, which also writes the
    metadata. OSError or ValueError if it fails.
    """
    if main:
        jax, ocp = import_jax_and_orbax()
        _handler().save(epath(directory), args=ocp.args.PyTreeSave(nest(parts)))
        # Orbax records a jax.Array's sharding, and uses it when a program restores without giving one.
        where = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": str(jax.devices("cpu")[0])})
        shardings = {base64.b64encode(".".join(name).encode()).decode(): where for name in parts}
        (directory / SHARDINGS).write_text(json.dumps(shardings))
    else:
        zarr.write({directory / ".".join(name): part for name, part in parts.items()}, create=False)
    return [f"{'.'.join(name)}/{file}" for name, part in parts.items() for file in zarr.files_of(part)]


def read_tree(directory: Path) -> dict[Name, LeafSpec]:
    """Path -> shape and dtype of every leaf. Reads no values, and nothing outside `directory`.

    Raises DamagedCheckpoint for names that lead out of it, and for arrays that are not in the format of `write`.
    """
    try:
        metadata = read_object(directory / NAMES)
        if metadata.get("use_ocdbt") or metadata["use_zarr3"]:
            raise ValueError("it is not in the format of this program")
        entries = [entry["key_metadata"] for entry in metadata["tree_metadata"].values()]
        names = [tuple(str(key["key"]) for key in keys) for keys in entries]
        return {name: zarr.read_spec(directory / _checked(".".join(name))) for name in names}
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedCheckpoint(
            f"{directory} is damaged: its leaves' names or shapes cannot be read ({error})"
        ) from error


def read(directory: Path, wanted: dict[Name, Part]) -> dict[Name, Tensor]:
    """This rank's parts of some or all of `read_tree`'s leaves, on the CPU. Reads only the files that it needs.

    Raises DamagedCheckpoint, before it allocates memory, if one of these files has the wrong size.
    """
    places = {name: directory / ".".join(name) for name in wanted}
    for name, part in wanted.items():
        zarr.check(places[name], part)
    tensors = zarr.read({places[name]: part for name, part in wanted.items()})
    return {name: tensors.pop(places[name]) for name in wanted}


def needed_for(field: str | None) -> Callable[[str], bool]:
    """(file name below state/) -> whether the file is needed to restore the leaves under `field`.

    field: None: only for `read_tree`.
    """

    def needed(file: str) -> bool:
        leaf, _, rest = file.partition("/")
        # the shapes of all leaves are always read, and so are files outside the leaves' directories
        of_all = not rest or leaf == ARRAYS or rest == zarr.ARRAY
        return of_all or (field is not None and (leaf == field or leaf.startswith(f"{field}.")))

    return needed


def _checked(joined: str) -> str:
    if "/" in joined or joined in ("", ".", ".."):
        raise ValueError(f"the name {joined!r} leads out of the checkpoint")
    return joined


@functools.cache
def _handler() -> Any:
    """Orbax's handler for pytrees, extended to write leaves that are Parts."""
    jax, ocp = import_jax_and_orbax()

    class Parts(ocp.type_handlers.ArrayHandler):  # so that the checkpoint says its leaves are jax.Arrays
        async def serialize(self, values: Sequence[Part], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
            zarr.write({Path(info.parent_dir, info.name): part for info, part in zip(infos, values)}, create=True)
            return []  # no futures: everything has been written

        def memory_size(self, values: Sequence[Part]) -> Sequence[tuple[int, int]]:  # Orbax up to 0.11 logs this
            return [(part.spec.bytes, part.spec.bytes) for part in values]

    handler = Parts()
    registry = ocp.type_handlers.create_type_handler_registry((Part, handler), (jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)


@functools.cache
def import_jax_and_orbax() -> tuple[ModuleType, ModuleType]:
    """Import jax and orbax.checkpoint, once (about a second), configured for this project."""
    # Read when JAX is imported. Without it JAX would take the GPU's memory from torch.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")  # for a program that imported jax before us
    jax.config.update("jax_enable_x64", True)  # else int64 and float64 would be truncated
    if hasattr(jax.config, "jax_enable_preemption_service"):  # else JAX handles SIGTERM itself
        jax.config.update("jax_enable_preemption_service", False)
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_quiet_orbax)
    return jax, ocp


def _quiet_orbax(record: logging.LogRecord) -> bool:
    """A filter for absl's logger, which Orbax and the user share: drops Orbax's own records below a warning.

    Errors of a write are also raised, and `Checkpointer` reports them.
    """
    return f"{os.sep}orbax{os.sep}" not in record.pathname or record.levelno >= logging.WARNING


def epath(path: Path) -> Any:
    """The path as the type that Orbax's handlers require."""
    from etils import epath as etils_epath

    return etils_epath.Path(path)
