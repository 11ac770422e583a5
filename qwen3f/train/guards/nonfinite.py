"""Noticing a loss that is not finite without making the host wait for the device."""

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
    """Reads each step's verdict while the next one runs. The step itself has withheld a bad update already.

    skips: how many bad steps are passed over before one ends the run. dump: called with (step, batch) of each bad step;
    writes the batch somewhere and returns words that say where. say: called with a line for each step passed over.
    judge: called with (step, loss, first, rows) of each good one; may raise.
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
        """Take note of `step`, whose batch used examples first … first+rows−1; judge the step before."""
        values = torch.stack([metrics[name].to(torch.float64) for name in ("finite", "loss", "grad_norm")])
        ready = None
        if values.is_cuda:
            values = torch.empty(3, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.flush()
        self._pending = _Pending(step, first, rows, batch, values, ready)

    def flush(self) -> None:
        """Judge the last step noted. Raises TrainingError if it is not finite and no skip is left, and as `judge`."""
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
            f"{last} of the data order, {place}. Its update was withheld"
        )
        if self._bad <= self._skips:
            self._say(f"{what}; {self._bad} of {self._skips} such steps passed over")
            return
        raise TrainingError(
            f"{what} and it was not saved; the checkpoints before it are untouched. Try a lower "
            "config.schedule.peak_lr or a longer warmup, or let such steps pass: "
            f"--config.nonfinite_skips={2 * self._skips or 10}"
        )
