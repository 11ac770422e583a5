"""Loss spikes: go back to the last checkpoint and leave out the data that led there.

After PaLM (Chowdhery et al. 2022, section 5.1), who did so by hand. Every loss but the spikes' goes into a window; a
loss is a spike when it exceeds the window's median by more than `threshold` robust deviations. One of these is
1.4826 times the median distance from the median (the standard deviation, were the losses normal), and at least
LEAST of the median, so that a loss that hardly moves is no reason to go back.
"""

import dataclasses
import statistics
from collections import deque
from typing import Any

from qwen3f.errors import TrainingError

NORMAL = 1.4826  # standard deviation over median absolute deviation
LEAST = 0.01


class LossSpike(Exception):
    """step: whose loss it is. end: the place in the data order after that step's examples."""

    def __init__(self, step: int, end: int, what: str) -> None:
        super().__init__(what)
        self.step, self.end = step, end


@dataclasses.dataclass(frozen=True)
class SpikePolicy:
    """threshold: robust deviations above the median, 0: no judgement. window: losses that the median is of; nothing is
    judged before so many. rollbacks: how many in a run, before a spike ends it."""

    threshold: float
    window: int
    rollbacks: int


class SpikeGuard:
    """Judges losses by `policy`. What it knows is its `record`, which goes into a checkpoint: so a resumed run judges
    every step as the undisturbed one, and goes back as often.

    record: of the checkpoint that the run goes on from; {} for a new run.
    """

    def __init__(self, policy: SpikePolicy, record: dict[str, Any]) -> None:
        self._policy = policy
        self._losses: deque[float] = deque(record.get("losses", ()), maxlen=policy.window)
        self._rollbacks: int = record.get("rollbacks", 0)
        self._skipped: list[list[int]] = [list(span) for span in record.get("skipped", ())]

    @property
    def record(self) -> dict[str, Any]:
        """For JSON: the window's losses; rollbacks so far; [first, end) of each span of the data order left out."""
        return {"losses": list(self._losses), "rollbacks": self._rollbacks, "skipped": self._skipped}

    def judge(self, step: int, loss: float, first: int, rows: int) -> None:
        """Take note of a finite loss, of examples first … first + rows − 1; of a spike don't, but raise LossSpike."""
        if not self._policy.threshold:
            return
        if len(self._losses) == self._policy.window:
            middle = statistics.median(self._losses)
            spread = NORMAL * statistics.median(abs(value - middle) for value in self._losses)
            limit = middle + self._policy.threshold * max(spread, LEAST * abs(middle))
            if loss > limit:
                what = (
                    f"the loss of step {step}, {loss:.4f}, exceeds {limit:.4f}: the last {len(self._losses)} losses' "
                    f"median {middle:.4f} and {self._policy.threshold:g} robust deviations"
                )
                raise LossSpike(step, first + rows, what)
        self._losses.append(loss)

    def rolled_back(self, spike: LossSpike, record: dict[str, Any], first: int) -> "SpikeGuard":
        """The guard to go on with from a checkpoint of `record`, whose next example was `first` and now is spike.end.

        Raises TrainingError if no rollback is left.
        """
        if self._rollbacks == self._policy.rollbacks:
            raise TrainingError(
                f"{spike}; {self._rollbacks} of {self._policy.rollbacks} rollbacks are used up. The checkpoints are "
                "untouched. Try a lower config.schedule.peak_lr, or more: --config.spike.rollbacks=10"
            )
        guard = SpikeGuard(self._policy, record)
        guard._rollbacks = self._rollbacks + 1
        guard._skipped.append([first, spike.end])
        return guard
