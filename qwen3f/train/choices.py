"""Turns words of a configuration into objects: device, dtype, compile mode, layout. setup and plan use this module.

Only find_device looks at the machine; the other functions are pure.
"""

import torch
from ml_collections import ConfigDict

from qwen3f.errors import UserError
from qwen3f.model import INVARIANT, Execution
from sharding.axes import sizes_only
from sharding.layout import Layout, find_gather_dtype
from sharding.mesh import hybrid, parse_mesh
from sharding.pipeline.cut import Pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def find_device(name: str) -> torch.device:
    """The device that config.device names: auto, cpu or cuda. UserError for another name, or a missing CUDA device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"config.device={name!r} is not a device; write auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"config.device={name!r}: write auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"config.device={name!r}, but torch sees no CUDA device; write auto or cpu")
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype that config.dtype names; auto is bfloat16 on CUDA, else float32. UserError for another name."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"config.dtype={name!r}: write auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def find_compile_mode(mode: str, device: torch.device) -> str:
    """The mode that config.compile names; auto is block on CUDA, else off."""
    return mode if mode != "auto" else "block" if device.type == "cuda" else "off"


def find_execution(config: ConfigDict, device: torch.device) -> Execution:
    """The Execution for config.compile and config.attention; for attention "invariant" it is model.INVARIANT."""
    if config.attention != "invariant":
        return Execution(find_compile_mode(config.compile, device), config.attention)
    if config.compile not in ("auto", "off"):
        raise UserError(f"config.attention=invariant with config.compile={config.compile}: write compile=off")
    return INVARIANT


def find_layout(config: ConfigDict, devices: int | None, compute_dtype: torch.dtype) -> Layout:
    """The layout of config.mesh, config.fsdp and config.pipeline; its axes have sizes, but no process groups yet.

    devices: the number that fills a size of -1. Raises UserError.
    """
    shape = hybrid(parse_mesh(config.mesh, devices), config.fsdp.shard_size, config.fsdp.enabled)
    return Layout(
        axes=sizes_only(shape),
        fsdp=config.fsdp.enabled,
        reshard=config.fsdp.reshard,
        pipeline=Pipeline(**config.pipeline.to_dict()),
        gather_dtype=find_gather_dtype(config.fsdp.reduce, compute_dtype),
    )
