"""Learning-rate schedules as pure functions of the step, usable on the device inside a compiled update.

Step s counts updates from 0. Warm-up: peak·(s+1)/warmup, so that the first update does not have rate 0.
"""

import dataclasses
import math

import torch
from torch import Tensor

from qwen3f.errors import UserError

KINDS = ("cosine", "wsd", "constant")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule; call it with a step.

    kind: "cosine" decays from the end of warm-up to `total_steps`; "wsd" (warmup-stable-decay, arXiv:2404.06395)
    holds `peak` and decays over the last `decay_steps`, along `decay_shape` "linear" or "cosine"; "constant" holds
    `peak`. After total_steps the rate stays at `min_lr` (constant: at `peak`).
    """

    kind: str
    peak: float
    total_steps: int
    warmup_steps: int = 0
    min_lr: float = 0.0
    decay_steps: int = 0
    decay_shape: str = "linear"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"config.schedule.kind={self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if self.decay_shape not in ("linear", "cosine"):
            raise UserError(f"config.schedule.decay_shape={self.decay_shape!r} is unknown; use linear or cosine")
        if not 0.0 <= self.min_lr <= self.peak:
            raise UserError(
                f"the schedule's min_lr ({self.min_lr}) must lie between 0 and the peak rate ({self.peak}); write "
                "config.schedule.peak_lr of at least 0 and config.schedule.min_ratio from 0 to 1"
            )
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise UserError(
                f"the schedule's warmup_steps ({self.warmup_steps}) + decay_steps ({self.decay_steps}) exceed the "
                f"{self.total_steps} steps of the run; lower config.schedule.warmup or config.schedule.decay"
            )

    def __call__(self, step: Tensor) -> Tensor:
        """The rate at `step` (integer scalar tensor), float64 on the same device."""
        s = step.to(torch.float64)
        rate = self._after_warmup(s)
        if self.warmup_steps:
            rate = torch.where(s < self.warmup_steps, self.peak * (s + 1) / self.warmup_steps, rate)
        return rate

    def _after_warmup(self, s: Tensor) -> Tensor:
        if self.kind == "constant":
            return torch.full_like(s, self.peak)
        length = self.decay_steps if self.kind == "wsd" else self.total_steps - self.warmup_steps
        start = self.total_steps - length
        done = ((s - start) / max(length, 1)).clamp(0.0, 1.0)
        if self.kind == "cosine" or self.decay_shape == "cosine":
            left = 0.5 * (1.0 + torch.cos(math.pi * done))
        else:
            left = 1.0 - done
        return self.min_lr + (self.peak - self.min_lr) * left
