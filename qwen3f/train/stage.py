"""What a stage gives the training loop: data, an objective, evaluations, and what happens around the pure step.

A stage is a module with two functions. `check(setup)` raises UserError for what cannot run, before any process starts.
`make(run)` opens its data and returns a Stage; it runs on every rank.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from qwen3f.data.loader import Dataset
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.params import Params
from qwen3f.processes.world import World
from qwen3f.train.logger import Logger
from qwen3f.train.objective import Objective
from qwen3f.train.setup import Setup
from qwen3f.train.state import TrainState

Batch = dict[str, Tensor]
More = Callable[[], Batch]
T = TypeVar("T")
PACKAGE = "qwen3f.stages"


class Interrupted(Exception):
    """Raised by an evaluation that was asked to stop (Run.stopping); its values are left out."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a stage is made for.

    Attributes:
      setup: the checked configuration. workdir: of the run. world: its ranks. progress: whether to draw bars on stderr.
      stopping: whether a rank has been asked to end the run. All ranks ask together, so between two batches of an
        evaluation, say, which then raises Interrupted.
    """

    setup: Setup
    workdir: Path
    world: World
    progress: bool
    stopping: Callable[[], bool]


def shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """every: steps between two runs; 0: only at the end. run: parameters -> {name: value}, on all ranks together.
    say: what to print of the values. answers: of the last run, what was asked and answered, as logger.answers takes
    it; none of an evaluation that asks nothing."""

    every: int
    run: Callable[[Params], dict[str, float]]
    say: Callable[[Mapping[str, float]], str] = shown
    answers: Callable[[], Sequence[Mapping[str, Any]]] = tuple


def keep(state: TrainState, batch: Batch, more: More) -> Batch:
    return batch


def nothing(*_: object) -> None:
    pass


def unchanged(stage: T) -> T:
    return stage


def no_figures(batch: Batch) -> dict[str, float]:
    return {}


def no_memory() -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Stage:
    """
    Attributes:
      tokenizer: kept in the workdir.
      dataset: what a Loader draws examples from.
      objective: what a step minimises.
      evaluators: by name, which goes before their values' names: "val" and "loss" are logged as "val_loss".
      prepare: (state, batch, more) -> the batch that the step gets, whose keys are those of contracts.md. more() gives
        the next examples. If it says "consumed", that many examples count as used, else all that were given. What ranks
        do differently in it must end with all of them agreed.
      finish: (state, logger), at the end of a run that reached its last step.
      save, load: what the stage must remember, JSON, in a checkpoint's meta; load is called before the first step of a
        run that goes on from one, and after going back to one.
      figures: a batch -> what to log of it.
      texts: what to show in TensorBoard beside the figures.
      lines: what to print at the start.
      cross_documents: attention ignores document boundaries.
      samples: texts to show at the start, in the log and in TensorBoard.
      updates: of the optimizer in a step; see StepOptions.
      microbatch_rows: rows of a micro-batch on a rank, where prepare decides how many there are; see StepOptions.
      complete: the stage -> the stage that runs, called once, by all ranks together: for what `make` cannot do, where a
        host's first rank goes before the others and none can wait for another, such as to read weights on a mesh.
      next: what launch.py can be given after a whole run, a line each; {workdir} and {preset} in them are filled in.
    """

    tokenizer: Tokenizer
    dataset: Dataset
    objective: Objective
    evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
    prepare: Callable[[TrainState, Batch, More], Batch] = keep
    finish: Callable[[TrainState, Logger], None] = nothing
    save: Callable[[], dict[str, Any]] = no_memory
    load: Callable[[dict[str, Any]], None] = nothing
    figures: Callable[[Batch], dict[str, float]] = no_figures
    texts: Callable[[], Sequence[str]] = tuple
    lines: tuple[str, ...] = ()
    cross_documents: bool = False
    samples: tuple[str, ...] = ()
    updates: int = 1
    microbatch_rows: int = 0
    complete: Callable[["Stage"], "Stage"] = unchanged
    next: tuple[str, ...] = ()


class StageModule(Protocol):
    def check(self, setup: Setup) -> None: ...
    def make(self, run: Run) -> Stage: ...


def find_stage(name: str) -> StageModule:
    """The stage that config.stage names: a file of qwen3f/stages, or the import path of a module of one's own.

    Raises UserError if there is none, or it lacks check or make.
    """
    package = importlib.import_module(PACKAGE)
    place = name if "." in name else f"{PACKAGE}.{name}"
    try:
        there = importlib.util.find_spec(place) is not None
    except (ModuleNotFoundError, ValueError):
        there = False
    if not there:
        raise UserError(f"config.stage={name!r}: there is no module {place}; write {', '.join(package.names())}")
    module = importlib.import_module(place)
    for function in ("check", "make"):
        if not callable(getattr(module, function, None)):
            raise UserError(f"config.stage={name!r}: {place} has no function {function}; see qwen3f/train/stage.py")
    return module
