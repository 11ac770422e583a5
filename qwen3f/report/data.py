"""The data of a report: plain values, which `read` reads and `page` shows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qwen3f.eval.statistics import Estimate
from qwen3f.report.metrics_file import NO_METRICS, Metrics


@dataclasses.dataclass(frozen=True)
class Measure:
    """A value with the bounds of its 95% interval over n questions. Without an interval: low = high = nan and n = 0."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Questions and answers at a step: the lines of a file of answers/ or samples/."""

    step: int
    lines: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of a stage's workdir.

    Attributes:
      config, record: config.json and run.json; {} if there is none.
      metrics: metrics.jsonl.
      answers: of evaluations, in order. samples: of the first and the last step whose files are kept.
      pictures: title -> PNG, from a plan. results: (name, value) for each result of an evaluation. counts: of a
        rejection sampling. problems: a sentence for each file that could not be read.
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
    """A stage of a pipeline, or a single run.

    Attributes:
      before, after: measures by name, of the model that the stage started from and of the one that it ended with.
      differences: after − before, for measures on the same questions.
      asked: answers of its model to the pipeline's shared questions, lines as in answers/.
      before_step: in a single run, the step of the first evaluation, which gives `before`.
      origin: name of the stage, or path of the weights, that it started from.
      status: as in pipeline.json; "" for a single run.
    """

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
    """A report. pipeline: whether it shows a pipeline; else it has one stage. written: date and time."""

    title: str
    stages: tuple[Stage, ...]
    pipeline: bool = False
    preset: str = ""
    seed: str = ""
    commit: str = ""
    budget_s: float = 0.0
    written: str = ""
    problems: tuple[str, ...] = ()
