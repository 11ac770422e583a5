"""Detects a loss or gradient that is not finite, without making the host wait for the device."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f.errors import TrainingError


class _Pending(NamedTuple):
    step: int
    first: int  # place in the data order of the step's first example
    rows: int
    batch: Mapping[str, Tensor]
    values: Tensor  # finite, loss, grad_norm on the host, once `ready`
    ready: torch.cuda.Event | None


class FiniteCheck:
    """Checks each step's result while the next step runs. The step itself has already left out a bad update.

    skips: how many bad steps are skipped before one ends the run. dump: called with (step, batch) of each bad step;
    writes the batch to a file and returns words that say where. say: called with a line for each skipped step. judge:
    called with (step, loss, first, rows) of each good step; may raise.
    """

    def __init__(
        self,
        skips: int,
        dump: Callable[[int, Mapping[str, Tensor]], str],
        say: Callable[[str], None],
        judge: Callable[[int, float, int, int], None],
    ) -> None:
        self._skips, self._dump, self._say, self._judge = skips, dump, say, judge
        self._bad = 0
        self._pending: _Pending | None = None

    def __call__(
        self, step: int, metrics: dict[str, Tensor], batch: Mapping[str, Tensor], first: int, rows: int
    ) -> None:
        """Record `step`, whose batch used examples first … first+rows−1; check the step before it."""
        values = torch.stack([metrics[name].to(torch.float64) for name in ("finite", "loss", "grad_norm")])
        ready = None
        if values.is_cuda:
            values = torch.empty(3, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.flush()
        self._pending = _Pending(step, first, rows, batch, values, ready)

    def flush(self) -> None:
        """Check the last recorded step. TrainingError if it is not finite and no skip is left; also as `judge`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.ready is not None:
            pending.ready.synchronize()
        finite, loss, norm = pending.values.tolist()
        if finite:
            return self._judge(pending.step, loss, pending.first, pending.rows)
        self._bad += 1
        place = self._dump(pending.step, pending.batch)
        last = pending.first + pending.rows - 1
        what = (
            f"step {pending.step} is not finite: loss {loss}, gradient norm {norm}, on examples {pending.first} to "
            f"{last} of the data order; its batch is {place}. Its update was not applied"
        )
        if self._bad <= self._skips:
            self._say(f"{what}; {self._bad} of {self._skips} such steps skipped")
            return
        raise TrainingError(
            f"{what} and not saved; the checkpoints before it are untouched. Write a lower config.schedule.peak_lr or "
            "a larger config.schedule.warmup, or skip such steps: "
            f"--config.nonfinite_skips={2 * self._skips or 10}"
        )
