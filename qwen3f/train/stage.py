"""The interface between a stage and the training loop: data, an objective, evaluations, and hooks around the step.

A stage is a module with two functions. `check(setup)` raises UserError for a configuration that cannot run, before any
process starts. `make(run)` opens the stage's data and returns a Stage; it is called on every rank.
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
    """Raised by an evaluation that stops early because Run.stopping() is true. Its values are not logged."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The run that a stage is made for.

    Attributes:
      setup: the checked configuration. workdir: of the run. world: its ranks. progress: whether to draw bars on stderr.
      stopping: () -> whether any rank has received a signal to end the run. All ranks must call it together, e.g.
        between two batches of an evaluation, which then raises Interrupted.
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
    """One evaluation.

    every: steps between two runs; 0: only at the end. run: parameters -> {name: value}, called on all ranks together.
    say: values -> the line to print. answers: the questions and answers of the last run, as logger.answers takes them;
    empty for an evaluation without questions.
    """

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
    """What a stage gives the loop.

    Attributes:
      tokenizer: saved in the workdir.
      dataset: the examples that the Loader draws from.
      objective: what a step minimises.
      evaluators: name -> Evaluator. The name is a prefix of its values' names: "val" and "loss" are logged as
        "val_loss".
      prepare: (state, batch, more) -> the batch for the step (keys: sharding/sequence_split.py). more() returns the
        next examples. If the result has a key "consumed", that many examples count as used; else all examples that
        were given. Where ranks do different work in it, they must agree on the result before it returns (methods of
        World), because all of them run the step together.
      finish: (state, logger), called at the end of a run that reached its last step.
      save, load: save returns what the stage must remember, as JSON, for a checkpoint's meta. load gets it back before
        the first step of a run that resumes from a checkpoint ({} without one), and after a rollback to one.
      figures: batch -> values to log for it.
      texts: () -> texts to show in TensorBoard, at logged steps.
      lines: lines to print at the start.
      cross_documents: attention ignores document boundaries.
      samples: texts to show at the start, in the log and in TensorBoard.
      updates: optimizer updates per step; see StepOptions.
      microbatch_rows: rows of a micro-batch on a rank, if prepare decides how many there are; see StepOptions.
      complete: stage -> the stage that runs. All ranks call it once, together. Here a stage can do what needs several
        ranks at once, such as reading weights on a mesh. `make` cannot, because a host's first rank calls it before
        the others.
      next: arguments of launch.py to suggest after a complete run, one line each; {workdir} and {preset} are filled in.
      check_covers: number of examples that the run needs from the beginning of the data order to its last step -> None;
        raises UserError if there are fewer.
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
    check_covers: Callable[[int], None] = nothing


class StageModule(Protocol):
    def check(self, setup: Setup) -> None: ...
    def make(self, run: Run) -> Stage: ...


def find_stage(name: str) -> StageModule:
    """The stage that config.stage names: a file of qwen3f/stages, or the import path of any other module.

    Raises UserError if there is no such module, or it has no function check or make.
    """
    package = importlib.import_module(PACKAGE)
    place = name if "." in name else f"{PACKAGE}.{name}"
    try:
        there = importlib.util.find_spec(place) is not None
    except (ModuleNotFoundError, ValueError):
        there = False
    if not there:
        raise UserError(
            f"config.stage={name!r}: there is no module {place}; write one of {', '.join(package.names())}, or the "
            "import path of your own"
        )
    module = importlib.import_module(place)
    for function in ("check", "make"):
        if not callable(getattr(module, function, None)):
            raise UserError(f"config.stage={name!r}: {place} has no function {function}; see qwen3f/train/stage.py")
    return module
