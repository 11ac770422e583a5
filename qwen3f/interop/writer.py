"""safetensors files, written one tensor at a time: the library's own writer needs a whole shard in memory, cast."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f.errors import UserError

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorSpec(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_file(path: Path, specs: Mapping[str, TensorSpec], fetch: Callable[[str], Tensor]) -> None:
    """Write the tensors of `specs`; `fetch` gives each when its turn comes, on any device. On disk when it returns.

    Wide dtypes come first, so that every tensor is aligned in a memory map.
    Raises UserError, naming the tensor, for numbers that its dtype makes infinite: float16 ends at 65,504.
    """
    order = sorted(specs, key=lambda key: -specs[key].dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for key in order:
        shape, dtype = specs[key]
        end = offset + specs[key].nbytes
        entries[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for key in order:
            given = fetch(key).detach()
            tensor = given.to("cpu", specs[key].dtype).contiguous()
            if tensor.dtype != given.dtype and not is_finite(tensor) and is_finite(given):
                raise UserError(
                    f"{key} holds weights that are too large for {str(tensor.dtype).removeprefix('torch.')}; write "
                    "config.dtype=bfloat16 or config.dtype=float32, whose range is wider"
                )
            file.write(tensor.view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor, which is not empty, are finite. Needs no memory of the tensor's size."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def cut(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """The keys in order, in parts of at most `max_bytes` each; a larger tensor is a part of its own."""
    parts: list[list[str]] = [[]]
    room = max_bytes
    for key, spec in specs.items():
        if spec.nbytes > room and parts[-1]:
            parts.append([])
            room = max_bytes
        parts[-1].append(key)
        room -= spec.nbytes
    return parts
