"""Noticing a loss that is not finite without making the host wait for the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f.errors import TrainingError


class _Pending(NamedTuple):
    step: int
    first: int  # place in the data order of the step's first example
    rows: int
    values: Tensor  # finite, loss, grad_norm on the host, once `ready`
    ready: torch.cuda.Event | None


class FiniteCheck:
    """Reads each step's verdict while the next one runs. The step itself has withheld a bad update already."""

    def __init__(self) -> None:
        self._pending: _Pending | None = None

    def __call__(self, step: int, metrics: dict[str, Tensor], first: int, rows: int) -> None:
        """Take note of `step`, whose batch held examples first … first+rows−1; raise for the step before."""
        values = torch.stack([metrics[name].to(torch.float64) for name in ("finite", "loss", "grad_norm")])
        ready = None
        if values.is_cuda:
            values = torch.empty(3, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.flush()
        self._pending = _Pending(step, first, rows, values, ready)

    def flush(self) -> None:
        """Raise TrainingError if the last step noted was not finite."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.ready is not None:
            pending.ready.synchronize()
        finite, loss, norm = pending.values.tolist()
        if not finite:
            raise TrainingError(
                f"step {pending.step} is not finite: loss {loss}, gradient norm {norm}, on examples {pending.first} to "
                f"{pending.first + pending.rows - 1} of the data order. Its update was withheld and it was not saved; "
                "the checkpoints before it are untouched. Try a lower config.schedule.peak_lr or a longer warmup"
            )
