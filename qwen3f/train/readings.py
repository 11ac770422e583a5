"""The values that are logged for a step: its metrics, the speed, and the stage's figures of its batch."""

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qwen3f.errors import TrainingError
from qwen3f.train.metrics import Throughput, flops_per_token, peak_flops
from qwen3f.train.setup import Setup
from qwen3f.train.state import TrainState
from sharding.state import local_shards

_UNLOGGED = ("tokens", "finite")  # tokens_seen has the tokens; loss and grad_norm show what is finite


class Readings:
    """Reads a step's values, and measures the speed.

    start: steps done before. ranks: number of ranks. reports: the objective's figures, which must be finite. figures:
    the stage's function, batch -> values.
    """

    def __init__(
        self,
        setup: Setup,
        start: int,
        ranks: int,
        reports: tuple[str, ...],
        figures: Callable[[dict[str, Tensor]], dict[str, float]],
    ) -> None:
        self._device, self._reports, self._figures = setup.device, reports, figures
        self._tokens = setup.config.batch_size * setup.config.seq_len  # of a step
        self._flops = flops_per_token(setup.model, setup.config.seq_len) / (peak_flops(setup.device) * ranks)
        self.restart(start)

    def restart(self, step: int) -> None:
        """Don't count the time since the last reading in the speed, because it was not spent on training."""
        self._watch = Throughput(step * self._tokens, time.perf_counter())

    def read(
        self, step: int, metrics: Mapping[str, Tensor], state: TrainState, batch: dict[str, Tensor]
    ) -> dict[str, float]:
        """Name in the log -> value. Waits for the device. TrainingError if a figure of the objective is not finite."""
        names = [name for name, value in metrics.items() if value.dim() == 0 and name not in _UNLOGGED]
        values = {name: metrics[name].item() for name in names}
        for name in self._reports:
            if math.isfinite(values["loss"]) and not math.isfinite(values[name]):
                raise TrainingError(
                    f"step {step}: the objective's figure {name} is {values[name]}, though its loss is finite; the "
                    "checkpoints before it are untouched. Correct the token or document function of the stage's "
                    "Objective"
                )
        speed, self._watch = self._watch.advance(step * self._tokens, time.perf_counter())
        values |= {"tokens_per_sec": speed, "mfu": speed * self._flops, "tokens_seen": number(state.tokens_seen)}
        values |= self._figures(batch)
        if self._device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return values


def number(scalar: Tensor) -> int:
    """The value of a scalar: a plain tensor, or a replicated DTensor."""
    return local_shards(scalar).item()
