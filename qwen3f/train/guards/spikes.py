"""Loss spikes: go back to the last checkpoint and skip the data that led to the spike.

This follows PaLM (Chowdhery et al. 2022, section 5.1), where it was done by hand. A window holds the last losses that
were no spikes. A loss is a spike if it exceeds the window's median by more than `threshold` robust deviations. A robust
deviation is 1.4826 times the median distance from the median (for normally distributed losses, the standard deviation),
but at least LEAST times the median, so that an almost constant loss does not trigger a rollback.
"""

import dataclasses
import statistics
from collections import deque
from typing import Any

from qwen3f.errors import TrainingError

NORMAL = 1.4826  # of a normal distribution: standard deviation / median absolute deviation
LEAST = 0.01


class LossSpike(Exception):
    """step: the step with the spike. end: index in the data order after that step's examples."""

    def __init__(self, step: int, end: int, what: str) -> None:
        super().__init__(what)
        self.step, self.end = step, end


@dataclasses.dataclass(frozen=True)
class SpikePolicy:
    """threshold: robust deviations above the median; 0: no check. window: number of losses in the window; there is no
    check until it is full. rollbacks: how many a run may have; the next spike ends it."""

    threshold: float
    window: int
    rollbacks: int


class SpikeGuard:
    """Checks losses by `policy`. Its whole state is its `record`, which is saved in checkpoints. So a resumed run makes
    the same decisions as a run without interruption.

    record: from the checkpoint that the run resumes from; {} for a new run.
    """

    def __init__(self, policy: SpikePolicy, record: dict[str, Any]) -> None:
        self._policy = policy
        self._losses: deque[float] = deque(record.get("losses", ()), maxlen=policy.window)
        self._rollbacks: int = record.get("rollbacks", 0)
        self._skipped: list[list[int]] = [list(span) for span in record.get("skipped", ())]

    @property
    def record(self) -> dict[str, Any]:
        """For JSON: the window's losses; rollbacks so far; [first, end) of each skipped span of the data order."""
        return {"losses": list(self._losses), "rollbacks": self._rollbacks, "skipped": self._skipped}

    def judge(self, step: int, loss: float, first: int, rows: int) -> None:
        """Add a finite loss, of examples first … first + rows − 1, to the window; raise LossSpike if it is a spike."""
        if not self._policy.threshold:
            return
        if len(self._losses) == self._policy.window:
            middle = statistics.median(self._losses)
            spread = NORMAL * statistics.median(abs(value - middle) for value in self._losses)
            limit = middle + self._policy.threshold * max(spread, LEAST * abs(middle))
            if loss > limit:
                what = (
                    f"the loss of step {step}, {loss:.4f}, exceeds {limit:.4f}: the median of the last "
                    f"{len(self._losses)} losses, {middle:.4f}, plus {self._policy.threshold:g} robust deviations"
                )
                raise LossSpike(step, first + rows, what)
        self._losses.append(loss)

    def rolled_back(self, spike: LossSpike, record: dict[str, Any], first: int) -> "SpikeGuard":
        """The guard after a rollback. record: of the checkpoint that the run goes back to. first: the checkpoint's next
        example; the run continues with example spike.end instead. Raises TrainingError if no rollback is left.
        """
        if self._rollbacks == self._policy.rollbacks:
            raise TrainingError(
                f"{spike}; {self._rollbacks} of {self._policy.rollbacks} rollbacks are used up. The checkpoints are "
                "untouched. Write a lower config.schedule.peak_lr, or allow more: --config.spike.rollbacks=10"
            )
        guard = SpikeGuard(self._policy, record)
        guard._rollbacks = self._rollbacks + 1
        guard._skipped.append([first, spike.end])
        return guard
