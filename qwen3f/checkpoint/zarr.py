"""A leaf on disk: a Zarr array (version 2, not compressed) of files with a rank's part each, or a pipeline stage's.

So a rank writes whole files, and no file has two writers; any mesh reads what any other has written.
"""

import functools
import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.checkpoint.tree import LeafSpec, Part
from qwen3f.strict_json import read_object

ARRAY = ".zarray"


@functools.cache
def load() -> ModuleType:
    """tensorstore, which is imported by the first call."""
    import tensorstore

    return tensorstore


def read_spec(directory: Path) -> LeafSpec:
    """An array's shape and dtype. Raises as read_object, and ValueError or KeyError for what `write` doesn't write."""
    array = read_object(directory / ARRAY)
    shape = tuple(int(size) for size in array["shape"])
    if min(shape, default=1) < 1:
        raise ValueError(f"the shape of {directory.name} is {list(shape)}")
    code = str(array["dtype"])
    # Numpy's codes, such as <f4, and the names of types that numpy doesn't have, such as bfloat16.
    spec = LeafSpec(shape, np.dtype(code).name if code[:1] in "<>|" else code)
    if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        raise ValueError(f"the dtype of {directory.name} is {code}, which torch has not")
    return spec


def check(directory: Path, part: Part) -> None:
    """DamagedCheckpoint unless the array is one of plain files, and those that `part` needs have exactly their size."""
    array, leaf, spec = read_object(directory / ARRAY), directory.name, part.spec
    chunk = tuple(int(size) for size in array["chunks"])
    fits = len(chunk) == len(spec.shape) and all(1 <= size <= whole for size, whole in zip(chunk, spec.shape))
    if not fits or array.get("compressor") is not None or array.get("filters") is not None:
        raise DamagedCheckpoint(f"{directory.parent} is damaged: {leaf} is not stored as whole, plain chunks")
    size = LeafSpec(chunk, spec.dtype).bytes
    boxes = [[range(s.start // c, -(-s.stop // c)) for s, c in zip(box, chunk)] for _, box in part.shard.pieces]
    there = len(os.listdir(directory))  # no more names are made than can be there, whatever the shape says
    indices = itertools.chain.from_iterable(itertools.product(*box) for box in boxes)
    few = any(math.prod(map(len, box)) > there for box in boxes)
    if few or any(not _is_whole(directory / _file(index), size) for index in indices):
        count = math.prod(-(-whole // part) for whole, part in zip(spec.shape, chunk))
        raise DamagedCheckpoint(
            f"{directory.parent} is damaged: {leaf}, {spec}, is not in {count} files of {size} bytes"
        )


def read(wanted: Mapping[Path, Part]) -> dict[Path, Tensor]:
    """This rank's tensors of the arrays in these directories; padding is zero. ValueError for what can't be read."""
    ts, out, copies = load(), {}, []
    for directory, part in wanted.items():
        shard = part.shard
        padded = sum(math.prod(s.stop - s.start for s in here) for here, _ in shard.pieces) < math.prod(shard.local)
        out[directory] = (torch.zeros if padded else torch.empty)(shard.local, dtype=part.spec.torch_dtype)
        there, here = ts.open(_where(directory), open=True, read=True).result(), ts.array(_numpy(out[directory]))
        for inside, outside in shard.pieces:
            source = there[outside].translate_to[tuple(s.start for s in inside)]
            copies.append(here[inside].write(source))
    _finish(copies)
    return out


def write(parts: Mapping[Path, Part], *, create: bool) -> None:
    """Write this rank's parts into arrays in these directories, through to the disk. ValueError or OSError if it fails.

    create: make the arrays; otherwise they may not be there yet, and are not looked at.
    """
    ts, writes = load(), []
    how = {"create": True} if create else {"open": True, "assume_metadata": True}
    stores = [ts.open(_where(directory) | _array(part), **how) for directory, part in parts.items()]
    _finish(stores)
    for store, part in zip(stores, parts.values()):
        if part.values is not None:
            values, store = _numpy(part.values), store.result()
            # Its memory stays as it is until the write has ended: no copy of it is needed.
            writes += [
                store[there].write(values[here], can_reference_source_data_indefinitely=True)
                for here, there in part.shard.pieces
            ]
    _finish(writes)


def files_of(part: Part) -> list[str]:
    """The names of the files that hold a rank's part, as it writes them."""
    if part.values is None:
        return []
    chunk = part.shard.chunk
    return [_file(tuple(s.start // size for s, size in zip(box, chunk))) for _, box in part.shard.pieces]


def _file(index: tuple[int, ...]) -> str:
    return ".".join(map(str, index)) or "0"


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _where(directory: Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{directory}/"}}


def _array(part: Part) -> dict[str, Any]:
    name = part.spec.dtype
    metadata = {
        "zarr_format": 2,
        "shape": part.spec.shape,
        "chunks": part.shard.chunk,
        "dtype": name if hasattr(ml_dtypes, name) else np.dtype(name).str,
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "order": "C",
        "dimension_separator": ".",
    }
    return {"metadata": metadata, "store_data_equal_to_fill_value": True}


def _numpy(tensor: Tensor) -> np.ndarray:
    """The same memory; a type that numpy doesn't have as ml_dtypes has it."""
    name = str(tensor.dtype).removeprefix("torch.")
    if not hasattr(ml_dtypes, name):
        return tensor.numpy()
    same_size = {1: torch.uint8, 2: torch.int16}[tensor.itemsize]
    return tensor.view(same_size).numpy().view(getattr(ml_dtypes, name))


def _finish(futures: list[Any]) -> None:
    """Wait for all, as none may be left with memory or files that are given up; then raise the first error."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
