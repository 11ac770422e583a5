"""A leaf on disk: a Zarr array (version 2, not compressed). Each file holds one rank's part, or one pipeline stage's.

So ranks write whole files, and no file has two writers. Any mesh can read what another one has written.
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
    """The module tensorstore, imported at the first call."""
    import tensorstore

    return tensorstore


def read_spec(directory: Path) -> LeafSpec:
    """An array's shape and dtype. Raises as read_object; ValueError or KeyError for another format than `write`'s."""
    array = read_object(directory / ARRAY)
    shape = tuple(int(size) for size in array["shape"])
    if min(shape, default=1) < 1:
        raise ValueError(f"the shape of {directory.name} is {list(shape)}")
    code = str(array["dtype"])
    # numpy's codes, such as <f4, or the name of a type that numpy doesn't have, such as bfloat16
    spec = LeafSpec(shape, np.dtype(code).name if code[:1] in "<>|" else code)
    if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        raise ValueError(f"the dtype of {directory.name} is {code}, which torch does not have")
    return spec


def check(directory: Path, part: Part) -> None:
    """DamagedCheckpoint unless the array is stored as plain files, and those that `part` needs have the right size."""
    array, leaf, spec = read_object(directory / ARRAY), directory.name, part.spec
    chunk = tuple(int(size) for size in array["chunks"])
    fits = len(chunk) == len(spec.shape) and all(1 <= size <= whole for size, whole in zip(chunk, spec.shape))
    if not fits or array.get("compressor") is not None or array.get("filters") is not None:
        raise DamagedCheckpoint(f"{directory.parent} is damaged: {leaf} is not stored as whole, plain chunks")
    size = LeafSpec(chunk, spec.dtype).bytes
    boxes = [[range(s.start // c, -(-s.stop // c)) for s, c in zip(box, chunk)] for _, box in part.shard.pieces]
    there = len(os.listdir(directory))  # limit for the number of names to check, in case a damaged shape is huge
    indices = itertools.chain.from_iterable(itertools.product(*box) for box in boxes)
    few = any(math.prod(map(len, box)) > there for box in boxes)
    if few or any(not _is_whole(directory / _file(index), size) for index in indices):
        count = math.prod(-(-whole // part) for whole, part in zip(spec.shape, chunk))
        raise DamagedCheckpoint(
            f"{directory.parent} is damaged: {leaf}, {spec}, is not in {count} files of {size} bytes"
        )


def read(wanted: Mapping[Path, Part]) -> dict[Path, Tensor]:
    """This rank's parts of the arrays in these directories; padding is zero. ValueError for an unreadable array."""
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
    """Write this rank's parts into the arrays in these directories, and flush them. ValueError or OSError if it fails.

    create: write the arrays' metadata too. If False, another rank does; it may not exist yet, and is not read.
    """
    ts, writes = load(), []
    how = {"create": True} if create else {"open": True, "assume_metadata": True}
    stores = [ts.open(_where(directory) | _array(part), **how) for directory, part in parts.items()]
    _finish(stores)
    for store, part in zip(stores, parts.values()):
        if part.values is not None:
            values, store = _numpy(part.values), store.result()
            # the values do not change until the write has ended, so tensorstore need not copy them
            writes += [
                store[there].write(values[here], can_reference_source_data_indefinitely=True)
                for here, there in part.shard.pieces
            ]
    _finish(writes)


def files_of(part: Part) -> list[str]:
    """The names of the files that a rank writes for its part."""
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
    """The tensor as a numpy array of the same memory; dtypes that numpy lacks are those of ml_dtypes."""
    name = str(tensor.dtype).removeprefix("torch.")
    if not hasattr(ml_dtypes, name):
        return tensor.numpy()
    same_size = {1: torch.uint8, 2: torch.int16}[tensor.itemsize]
    return tensor.view(same_size).numpy().view(getattr(ml_dtypes, name))


def _finish(futures: list[Any]) -> None:
    """Wait for all futures, because each uses memory or files that are released later; then raise the first error."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
