"""Judges completions by several rewards, in processes that can be killed; every failure is counted.

    "correct=1,format=0.2,my_package.rewards:brevity=0.1"

names three rewards with their weights. The last one is any function (Sample) -> a number, or None for a sample that it
cannot judge. The name reward_model stands for the score of a model (qwen3f.preference.judges.RewardModel), which is not
computed in these processes.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from qwen3f.data.mixture import parse_weights
from qwen3f.errors import UserError
from qwen3f.processes.killable import Killable, Outcome
from qwen3f.processes.killable_child import find
from qwen3f.rl.rewards import REWARDS, Sample, modules_for

MODEL = "reward_model"


def parse_rewards(text: str) -> dict[str, float]:
    """Name -> weight of config.rewards. Raises UserError for a reward that does not exist."""
    weights = dict(parse_weights(text, "--config.rewards"))
    for name in weights:
        if name in REWARDS or name == MODEL:
            continue
        if ":" not in name:
            raise UserError(
                f"--config.rewards names {name!r}: write one of {', '.join((*REWARDS, MODEL))}, or a function as "
                "module:function"
            )
        try:
            there = callable(find(name))
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--config.rewards names {name!r}, which cannot be imported: {error}") from error
        if not there:
            raise UserError(f"--config.rewards names {name!r}, which is not a function")
    return weights


@dataclasses.dataclass(frozen=True)
class Judged:
    """Rewards of samples.

    Attributes:
      values: name of the reward -> a number for each sample, NaN if it could not be judged.
      failures: "reward: reason" -> number of samples.
    """

    values: dict[str, list[float]]
    failures: dict[str, int]


class Judge:
    """Judges samples by several rewards; a context manager.

    weights: as parse_rewards returns them. processes: number of judging processes. deadline: seconds that one reward of
    one sample may take.
    """

    def __init__(self, weights: dict[str, float], processes: int, deadline: float) -> None:
        self.names, self.weights = tuple(weights), tuple(weights.values())
        self._killable = Killable(processes, deadline)

    def __call__(self, samples: Sequence[Sample]) -> Judged:
        """Computes each reward of each sample once. A reward is NaN, and counted as a failure, if it raises, takes
        longer than the deadline, or returns None or anything else than a number within ±BOUND."""
        plain = [dataclasses.asdict(sample) for sample in samples]
        calls = [{"name": name, "sample": sample} for name in self.names for sample in plain]
        modules = modules_for(self.names, {sample.task for sample in samples})
        outcomes = iter(self._killable.map("qwen3f.rl.rewards:run_reward", calls, modules))
        values: dict[str, list[float]] = {}
        failures: Counter[str] = Counter()
        for name in self.names:
            values[name] = []
            for _ in samples:
                value, why = _read(next(outcomes))
                values[name].append(value)
                if why:
                    failures[f"{name}: {why}"] += 1
        return Judged(values, dict(failures))

    def close(self) -> None:
        self._killable.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _read(outcome: Outcome) -> tuple[float, str]:
    if outcome.failure:
        return math.nan, " ".join(outcome.failure.split())  # in one line, for the log
    if outcome.value is None:
        return math.nan, "cannot be judged"
    return outcome.value, ""
