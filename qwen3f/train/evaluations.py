"""Runs the stage's evaluators when they are due."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from qwen3f.params import Params
from qwen3f.train.logger import Logger
from qwen3f.train.stage import Evaluator, Interrupted


class Evaluations:
    """values: name in the log -> the last value of every evaluator."""

    def __init__(self, evaluators: Mapping[str, Evaluator], logger: Logger) -> None:
        self._evaluators, self._logger = evaluators, logger
        self.values: dict[str, float] = {}
        self._said = False

    def due(self, step: int, last: bool) -> list[str]:
        """The names of the evaluators to run after this step. last: it is the run's last step."""
        return [name for name, one in self._evaluators.items() if last or (one.every and step % one.every == 0)]

    def run(self, names: list[str], step: int, params: Params) -> dict[str, float]:
        """Run these evaluators; returns name in the log -> value. If one is interrupted, it and those after it return
        nothing."""
        found: dict[str, float] = {}
        answers: list[dict[str, Any]] = []
        for name in names:
            try:
                values = self._evaluators[name].run(params)
            except Interrupted:
                self._logger.write(f"step {step}: the evaluation was interrupted by a signal")
                break
            self._logger.write(f"step {step}: {self._evaluators[name].say(values)}")
            found |= {f"{name}_{key}": value for key, value in values.items()}
            answers += [{"evaluation": name, **answer} for answer in self._evaluators[name].answers()]
        if answers:
            self._logger.answers(step, answers)
        self.values |= found
        return found

    def say_lacking(self, options: ConfigDict, values: Mapping[str, float]) -> None:
        """Warn, once, that config.checkpoint.keep_best has no effect because nothing measures best_metric.

        options: config.checkpoint. values: name in the log -> value, of this step. A metric with the prefix of an
        evaluator is looked for after that evaluator has run, any other among the step's own values.
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
                f"no checkpoint is kept as one of the best: the run does not measure config.checkpoint.best_metric="
                f"{metric}; write one of {', '.join(there)}{others}, or --config.checkpoint.keep_best=0"
            )
