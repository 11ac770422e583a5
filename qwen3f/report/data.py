"""What a report is made of: plain values, read by `read` and shown by `page`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qwen3f.eval.statistics import Estimate
from qwen3f.report.metrics_file import NO_METRICS, Metrics


@dataclasses.dataclass(frozen=True)
class Measure:
    """value and the bounds of its 95% interval, over n questions; without an interval low = high = nan and n = 0."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclasses.dataclass(frozen=True)
class Texts:
    """What was asked and answered at a step, an object each: lines of answers/ or samples/."""

    step: int
    lines: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """A stage's workdir.

    Attributes:
      config: config.json, {} where there is none. record: run.json, likewise.
      answers: of evaluations, in order. samples: of the first and the last step that are kept.
      pictures: title -> PNG, of a plan. results: of an evaluation, (what; its value with interval). counts: of a
        rejection sampling. problems: what could not be read, a sentence each.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Metrics = NO_METRICS
    answers: tuple[Texts, ...] = ()
    samples: tuple[Texts, ...] = ()
    pictures: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    results: tuple[tuple[str, Measure], ...] = ()
    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """config.stage: pretrain, sft, …"""
        return str(self.config.get("stage", ""))


@dataclasses.dataclass(frozen=True)
class Stage:
    """before, after: measures by name, of what it started from and of what it ends with; before_step: in a single run
    the step at which they were first taken. differences: after less before, where both are of the same questions.
    asked: what its model answered to the pipeline's questions, lines as of answers/. status: as pipeline.json's, "" in
    a single run."""

    name: str
    purpose: str
    run: Run
    before: Mapping[str, Measure] = dataclasses.field(default_factory=dict)
    after: Mapping[str, Measure] = dataclasses.field(default_factory=dict)
    differences: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
    asked: tuple[Mapping[str, Any], ...] = ()
    before_step: int = 0
    origin: str = ""
    workdir: str = ""
    experiment: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    status: str = ""
    error: str = ""
    seconds: float = 0.0
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """pipeline: whether the stages follow one another, as pipeline.json says; else there is one. written: when."""

    title: str
    stages: tuple[Stage, ...]
    pipeline: bool = False
    preset: str = ""
    seed: str = ""
    commit: str = ""
    budget_s: float = 0.0
    written: str = ""
    problems: tuple[str, ...] = ()
