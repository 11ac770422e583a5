"""Leaves on disk by torch.distributed.checkpoint (DCP), for people without JAX. For trusted checkpoints only.

DCP's `.metadata` is a pickle, and reading it can run any code that whoever wrote it put there; the manifest's checksums
say that nothing changed since, not who wrote it. So such a checkpoint is opened only by a run that asks for this
backend: `config.checkpoint.backend="dcp"`.

`directory` is what `dcp.load` reads, with the keys "params/model.norm.weight": a leaf's path joined by slashes. All
leaves share a file, so restoring one field checks them all.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.checkpoint.tree import LeafSpec, Name, Part

METADATA = ".metadata"


def load(main: bool) -> None:
    """Nothing is left to do: importing this module has imported torch's."""


def write(directory: Path, parts: dict[Name, Part], main: bool) -> list[str]:
    """Write whole leaves to an empty directory, through to the disk. OSError if it fails.

    Returns no names: there is one rank, and all files are its own.
    """
    writer = torch_dcp.FileSystemWriter(directory, single_file_per_rank=True, sync_files=True)
    leaves = {"/".join(name): part.values for name, part in parts.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        torch_dcp.save(leaves, storage_writer=writer, no_dist=True)
    return []


def read_tree(directory: Path) -> dict[Name, LeafSpec]:
    """Path -> shape and dtype of every leaf. Unpickles. Raises DamagedCheckpoint for what `write` doesn't write."""
    try:
        metadata = torch_dcp.FileSystemReader(directory).read_metadata()
    except Exception as error:  # unpickling may raise anything
        raise DamagedCheckpoint(f"{directory} is damaged: {METADATA} cannot be read ({error!r})") from error
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise DamagedCheckpoint(f"{directory} is damaged: its file {info.relative_path} is not in it")
    specs: dict[Name, LeafSpec] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise DamagedCheckpoint(f"{directory} is damaged: {key} is not a tensor")
        specs[tuple(key.split("/"))] = LeafSpec(tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
    return specs


def read(directory: Path, wanted: dict[Name, Part]) -> dict[Name, Tensor]:
    """Some or all of `read_tree`'s leaves, whole, on the CPU.

    Raises DamagedCheckpoint, before any memory is taken, when the files can't hold their bytes.
    """
    size = sum(path.stat().st_size for path in directory.glob("*.distcp"))
    if size < (least := sum(part.spec.bytes for part in wanted.values())):
        raise DamagedCheckpoint(f"{directory} is damaged: {size} bytes on disk for leaves of {least} bytes")
    values = {
        "/".join(name): torch.empty(part.spec.shape, dtype=part.spec.torch_dtype) for name, part in wanted.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        torch_dcp.load(values, storage_reader=torch_dcp.FileSystemReader(directory), no_dist=True)
    return {name: values["/".join(name)] for name in wanted}


def needed_for(field: str | None) -> Callable[[str], bool]:
    """Whether a file is read to restore the leaves under `field`: they all share one. None: for `read_tree` alone."""
    return lambda file: field is not None or file == METADATA
