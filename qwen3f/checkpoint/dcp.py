"""Leaves on disk by torch.distributed.checkpoint (DCP), for use without JAX. Only for checkpoints that you trust.

DCP's `.metadata` is a pickle: reading it can run code that its author put there. The manifest's checksums only show
that the file was not changed since, not who wrote it. So such a checkpoint is opened only by a run with
`config.checkpoint.backend="dcp"`.

`dcp.load` can read `directory`. Its keys are leaves' paths joined by slashes, such as "params/model.norm.weight". All
leaves share a file, so restoring one field checks the whole file.
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
    """Does nothing: importing this module has imported everything."""


def write(directory: Path, parts: dict[Name, Part], main: bool) -> list[str]:
    """Write whole leaves to an empty directory, and flush them to the disk. OSError if it fails.

    Returns []: names are needed only for several ranks, which this backend does not support.
    """
    writer = torch_dcp.FileSystemWriter(directory, single_file_per_rank=True, sync_files=True)
    leaves = {"/".join(name): part.values for name, part in parts.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        torch_dcp.save(leaves, storage_writer=writer, no_dist=True)
    return []


def read_tree(directory: Path) -> dict[Name, LeafSpec]:
    """Path -> shape and dtype of every leaf. Unpickles. DamagedCheckpoint for files that `write` can't have written."""
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

    Raises DamagedCheckpoint, before it allocates memory, if the files are smaller than the leaves.
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
    """(file name) -> whether the file is needed to restore the leaves under `field`; None: only for `read_tree`."""
    return lambda file: field is not None or file == METADATA
