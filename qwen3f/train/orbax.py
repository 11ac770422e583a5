"""Orbax and JAX under this project's rules, and tensors handed over to JAX and back without a copy too many.

JAX is imported by the first call of `import_jax_and_orbax` only, and is held to the CPU.
"""

import functools
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack


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


def from_jax(array: Any, like: Tensor) -> Tensor:
    device = torch.device("cpu") if like.is_meta else like.device
    # A copy of its own: JAX takes its arrays for immutable, and training writes into the state.
    return torch.from_dlpack(array).to(device, copy=True)
