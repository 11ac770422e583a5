"""pipeline.json: the record of all stages. Each write replaces the file atomically, so it is always valid."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

from qwen3f import usage
from qwen3f.errors import UserError
from qwen3f.files import write_atomically
from qwen3f.strict_json import read_object

NAME = "pipeline.json"
STATUSES = ("waiting", "running", "done", "failed", "skipped", "stale")


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """The state of a stage.

    Attributes:
        name, purpose, experiment: as in PipelineStage.
        overrides: key -> value for keys that differ from the experiment.
        workdir: relative to the pipeline's directory.
        start: the stage whose checkpoint it starts from, or None.
        init_from: the checkpoint that it starts from: relative if it is of `start`, else the stage's own init_from.
        inputs: hash of everything that its result depends on (chain.inputs_of); "" before it has started.
        status: one of STATUSES.
        error: why it failed or stopped, in one line.
        commit: of the code with which it last ran.
        started: seconds since 1970; None: never.
        seconds: time that it ran, over all attempts.
        budget_s: its time budget in seconds, or None.
        steps: training steps, once it is done.
        weights: sha256 of the manifest of the checkpoint that it ended with.
        measures: {name: {"value", "low", "high", "n"}} of the checkpoint that it ended with; low, high and n may be
            None.
    """

    name: str
    purpose: str
    experiment: str
    overrides: dict[str, Any]
    workdir: str
    start: str | None = None
    init_from: str | None = None
    inputs: str = ""
    status: str = "waiting"
    error: str = ""
    commit: str = ""
    started: float | None = None
    seconds: float = 0.0
    budget_s: int | None = None
    steps: int = 0
    weights: str = ""
    measures: dict[str, dict[str, float | None]] = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> "StageRecord":
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Record:
    """The whole pipeline.

    Attributes:
        asked: the --config.stages of the command that runs or was stopped; () if it had none, or once it has ended
            (with the questions after its stages).
        left: the stages of `asked` that are still to run, in order.
    """

    preset: str
    seed: int
    stages: tuple[StageRecord, ...]
    asked: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    commit: str = ""

    @property
    def budget_s(self) -> int | None:
        return sum(stage.budget_s or 0 for stage in self.stages) or None

    def stage(self, name: str) -> StageRecord:
        return next(stage for stage in self.stages if stage.name == name)

    def with_stage(self, name: str, **changes: Any) -> "Record":
        stages = tuple(one.replace(**changes) if one.name == name else one for one in self.stages)
        return dataclasses.replace(self, stages=stages)


def write(directory: Path, record: Record) -> None:
    """Write pipeline.json atomically. Raises OSError if the disk fails; the old file then stays."""
    head = {"preset": record.preset, "seed": record.seed, "commit": record.commit, "budget_s": record.budget_s}
    stages = []
    for stage in record.stages:
        values = dataclasses.asdict(stage)
        values["seconds"] = round(stage.seconds, 1)
        stages.append({("from" if key == "start" else key): value for key, value in values.items()})
    content = {**head, "asked": list(record.asked), "left": list(record.left), "stages": stages}
    write_atomically(directory / NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read(directory: Path) -> Record | None:
    """The record in a directory, or None if there is none. Raises UserError for a file that is not a valid record."""
    path = directory / NAME
    if not path.exists():
        return None
    try:
        content = read_object(path)
        stages = [
            {("start" if key == "from" else key): value for key, value in one.items()} for one in content["stages"]
        ]
        records = tuple(StageRecord(**values) for values in stages)
        if unknown := {one.status for one in records} - set(STATUSES):
            raise UserError(f"there is no status {unknown.pop()!r}")
        asked, left = tuple(content.get("asked", ())), tuple(content["left"])
        return Record(content["preset"], content["seed"], records, asked, left, content["commit"])
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a pipeline's record ({error!r}): restore it, or choose another --workdir"
        ) from error


def commit() -> str:
    """The short hash of the code's commit; "" outside a git repository."""
    command = ["git", "-C", str(usage.ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
