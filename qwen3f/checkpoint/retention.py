"""Decides which checkpoints are kept."""

import dataclasses
import math
from collections.abc import Mapping

from qwen3f.errors import UserError


@dataclasses.dataclass(frozen=True)
class Retention:
    """A checkpoint is kept if any of these rules keeps it. The latest is always kept.

    keep: keep this many of the latest; 0 keeps all. every: keep those of steps that are a multiple of this; 0: none.
    best: keep this many with the best `metric`. metric: such as "val_loss"; checkpoints saved without it, or with a
    value that is not finite, are not among the best. mode: "min" if a lower metric is better, "max" if a higher one is.
    Raises UserError for a negative number or another mode.
    """

    keep: int
    every: int = 0
    best: int = 0
    metric: str = "val_loss"
    mode: str = "min"

    def __post_init__(self) -> None:
        for key, value in (("keep", self.keep), ("keep_every", self.every), ("keep_best", self.best)):
            if value < 0:
                raise UserError(f"config.checkpoint.{key} is {value}: write 0 or a positive number of checkpoints")
        if self.mode not in ("min", "max"):
            raise UserError(f"config.checkpoint.best_mode is {self.mode!r}: write min or max")

    def expired(self, saved: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps, ascending, that no rule keeps. saved: step -> its metrics, for all complete checkpoints."""
        steps = sorted(saved)
        if not self.keep:
            return []
        sign = 1 if self.mode == "min" else -1
        measured = {step: value for step in steps if math.isfinite(value := saved[step].get(self.metric, math.nan))}
        ranked = sorted(measured, key=lambda step: (sign * measured[step], step))  # of equal ones the earlier is better
        kept = {*steps[-self.keep :], *ranked[: self.best]}
        if self.every:
            kept |= {step for step in steps if step % self.every == 0}
        return [step for step in steps if step not in kept]
