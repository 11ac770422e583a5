"""The stage's evaluators, each in its turn."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from qwen3f.params import Params
from qwen3f.train.logger import Logger
from qwen3f.train.stage import Evaluator, Interrupted


class Evaluations:
    """values: what was found last, by the names in the log."""

    def __init__(self, evaluators: Mapping[str, Evaluator], logger: Logger) -> None:
        self._evaluators, self._logger = evaluators, logger
        self.values: dict[str, float] = {}
        self._said = False

    def due(self, step: int, last: bool) -> list[str]:
        """The evaluators whose turn it is."""
        return [name for name, one in self._evaluators.items() if last or (one.every and step % one.every == 0)]

    def run(self, names: list[str], step: int, params: Params) -> dict[str, float]:
        """What they find; of one that was asked to stop, and of those after it, nothing."""
        found: dict[str, float] = {}
        answers: list[dict[str, Any]] = []
        for name in names:
            try:
                values = self._evaluators[name].run(params)
            except Interrupted:
                self._logger.write(f"step {step}: the evaluation was broken off")
                break
            self._logger.write(f"step {step}: {self._evaluators[name].say(values)}")
            found |= {f"{name}_{key}": value for key, value in values.items()}
            answers += [{"evaluation": name, **answer} for answer in self._evaluators[name].answers()]
        if answers:
            self._logger.answers(step, answers)
        self.values |= found
        return found

    def say_lacking(self, options: ConfigDict, values: Mapping[str, float]) -> None:
        """A line in the log, once, where config.checkpoint.keep_best goes by a best_metric that nothing measures.

        options: config.checkpoint. values: of this step, by the names in the log. A name that begins as an evaluator's
        is judged when that one has run, any other by what is read of a step.
        """
        metric = options.best_metric
        if self._said or not options.keep_best or metric in values:
            return
        owner = max((name for name in self._evaluators if metric.startswith(f"{name}_")), key=len, default=None)
        there = [key for key in values if key.startswith(f"{owner}_")] if owner else list(values)
        if there and (owner or "loss" in values):
            others = "" if owner else "".join(f", or what {name}_… gives" for name in self._evaluators)
            self._said = True
            self._logger.write(
                f"no checkpoint is kept as one of the best: config.checkpoint.best_metric={metric} is nothing that the "
                f"run measures; write one of {', '.join(there)}{others}, or --config.checkpoint.keep_best=0"
            )
