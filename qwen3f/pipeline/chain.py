"""The stages as a command line has them: which starts from which, with which settings, and what those depend on."""

import dataclasses
import difflib
import hashlib
import json
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from qwen3f import usage
from qwen3f.errors import UserError
from qwen3f.flag_hints import as_flags
from qwen3f.pipeline.record import Record, StageRecord
from qwen3f.pipeline.stages import MEASURE, PipelineStage, differing
from qwen3f.train import checks

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"

# Keys that say how and where a stage runs. Its weights do not depend on them.
NEUTRAL = frozenset({
    "device", "mesh", "hardware", "plan", "restarts", "watchdog", "collective_timeout", "wandb", "init_from", "resume",
    "log_every", "show_samples", "eval.every", "data.cache", "data.workers", "data.num_threads", "batch_tokens",
    "chunk", "report",
})  # fmt: skip
_KINDS = {"eval": "evaluation", "generate": "pictures"}  # of config.stage; any other one trains


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage of the chain as it is set now.

    Attributes:
        number: from 1, skipped ones counted. config: of its experiment, complete.
        overrides: in what that differs from the experiment, and what of its model the user has set.
        insisted: of these the keys whose values are the experiment's own.
        shared: keys whose values are the whole pipeline's.
        source: the stage whose checkpoint it starts from; "" for the first, and one with an init_from of its own.
        asks: whether the shared questions are put to its checkpoint.
    """

    number: int
    stage: PipelineStage
    config: ConfigDict
    overrides: dict[str, Any]
    insisted: tuple[str, ...]
    shared: tuple[str, ...]
    source: str
    skipped: bool
    asks: bool

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def workdir(self) -> str:
        return f"{self.number:02d}_{self.name}"

    @property
    def kind(self) -> Literal["training", "evaluation", "pictures"]:
        return _KINDS.get(self.config.stage, "training")

    def checkpoint(self, directory: Path) -> Path:
        """Where its weights are, once it has trained."""
        return directory / self.workdir / CHECKPOINTS / str(self.config.steps)

    def trained(self, directory: Path) -> bool:
        return (self.checkpoint(directory) / MANIFEST).is_file()

    def fresh_record(self) -> StageRecord:
        return StageRecord(
            name=self.name,
            purpose=self.stage.purpose,
            experiment=self.stage.experiment,
            overrides=json.loads(json.dumps(self.overrides)),
            workdir=self.workdir,
            start=self.source or None,
            init_from=None if self.source else self.config.get("init_from") or None,
            status="skipped" if self.skipped else "waiting",
            budget_s=self.stage.seconds or None,
        )


def steps_of(config: ConfigDict, chosen: Collection[str] = ()) -> tuple[Step, ...]:
    """The chain. Raises UserError for config.skip and for what of a stage's settings cannot run; imports no torch.

    chosen: keys that the user has set, such as "set.grpo.seed".
    """
    names = [stage.name for stage in config.chain]
    skipped = set(parse_names(config.skip, names, "--config.skip"))
    made = {stage.name: _config(config, stage, chosen) for stage in config.chain}
    configs = {name: one for name, (one, _) in made.items()}
    asking = [name for name in names if name not in skipped]
    if config.set[MEASURE].benchmarks:
        _check(MEASURE, config.set[MEASURE])
    out, source = [], ""
    for number, stage in enumerate(config.chain, 1):
        one, skip = configs[stage.name], stage.name in skipped
        start = "" if one.init_from or skip else source
        if not (skip or start or one.init_from or number == 1):
            raise UserError(
                f"{stage.name} starts from weights, and every stage before it is skipped: write "
                f"--config.set.{stage.name}.init_from=W, or leave a stage out of --config.skip"
            )
        if not skip:
            _check(stage.name, one, made[stage.name][1])
        after = asking[asking.index(stage.name) + 1 :] if not skip else []
        kind = _KINDS.get(one.stage, "training")
        overrides = {k: v for k, v in differing(one, stage.experiment).items() if k not in ("init_from", "plan")}
        insisted = _insisted(stage.name, one, chosen, overrides)
        out.append(
            Step(
                number=number,
                stage=stage,
                config=one,
                overrides={**overrides, **{key: checks.get(one, key) for key in insisted}},
                insisted=insisted,
                shared=made[stage.name][1],
                source=start,
                skipped=skip,
                asks=kind == "training" and bool(config.set[MEASURE].benchmarks) and _asks(one, after, configs),
            )
        )
        if not skip and kind == "training":
            source = stage.name
    return tuple(out)


def _asks(one: ConfigDict, after: Sequence[str], configs: dict[str, ConfigDict]) -> bool:
    """A model that has only read text answers nothing; the last such is asked, for the next stage's "before"."""
    return one.stage != "pretrain" or not after or configs[after[0]].stage != "pretrain"


def _insisted(name: str, one: ConfigDict, chosen: Collection[str], overrides: Collection[str]) -> tuple[str, ...]:
    """Keys of the model that the user has set as the experiment has them: beside weights to start from, only what is
    written on a stage's command line counts."""
    own = sorted(key for key in own_keys(name, chosen) if key.startswith("model.") and key not in overrides)
    return tuple(key for key in own if checks.get(one, key) is not None)


def _config(config: ConfigDict, stage: PipelineStage, chosen: Collection[str]) -> tuple[ConfigDict, tuple[str, ...]]:
    """The stage's own settings, with those of the whole pipeline where it has none; and the keys of these."""
    one = config.set[stage.name].copy_and_resolve_references()
    shared = {"seed": config.seed, "device": config.device}
    shared |= {"mesh": config.mesh, "hardware": config.hardware} if one.stage not in _KINDS else {}
    return one, share(one, shared, {*differing(one, stage.experiment), *own_keys(stage.name, chosen)})


def share(one: ConfigDict, shared: dict[str, Any], own: Collection[str]) -> tuple[str, ...]:
    """Gives a configuration the pipeline's values of the keys that it has, but for its `own`; returns these keys."""
    given = {key: value for key, value in shared.items() if key in one and key not in own}
    with one.unlocked():
        one.update(given)
    return tuple(given)


def own_keys(name: str, chosen: Collection[str]) -> set[str]:
    """ "steps" for "set.grpo.steps" of the stage grpo: what the user has set of it, its default too."""
    start = f"set.{name}."
    return {key.removeprefix(start) for key in chosen if key.startswith(start)}


def _check(name: str, one: ConfigDict, shared: Collection[str] = ()) -> None:
    """Raises UserError in the pipeline's words for what launch.py would refuse before the stage starts."""
    known = one.copy_and_resolve_references()
    with known.unlocked():
        for key in checks.PLACES:
            if key in known:
                known[key] = known[key] or "W"  # as a later stage's is, once the one before it has run
    try:
        checks.check(known)
    except UserError as error:
        raise UserError(in_pipeline(str(error), name, one, shared)) from error


def in_pipeline(text: str, name: str, one: ConfigDict, shared: Collection[str] = ()) -> str:
    """An error of a stage with its keys as the pipeline's: --config.set.grpo.steps for --config.steps. shared: keys
    that keep their names, as Step's."""
    keys = sorted((key for key, _ in usage.flat(one)), key=len, reverse=True)
    every = "|".join(re.escape(key) for key in keys if key not in shared)
    text = as_flags(text, keys)  # what a stage's own process says has them already
    return re.sub(rf"(?<![\w./-])--config\.({every})(?![\w-]|\.\w)", rf"--config.set.{name}.\1", text)


def parse_names(text: str, known: Sequence[str], flag: str) -> tuple[str, ...]:
    """ "grpo,dpo" as a tuple. Raises UserError for an unknown name, with the nearest, a repeated one, and another
    order than the chain's."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"stages: {', '.join(known)}"
            raise UserError(f"{flag}={text}: there is no stage {name!r}; {hint}")
    in_order = tuple(name for name in known if name in names)
    if names != in_order:
        what = "names a stage twice" if len(set(names)) < len(names) else "is not in the order of the stages"
        raise UserError(f"{flag}={text} {what}; write {flag}={','.join(in_order)}")
    return names


def inputs_of(step: Step, record: Record) -> str:
    """Hash of what the stage's result depends on: its settings, and the stage and checkpoint that it starts from.

    The stage it starts from must be done.
    """
    values = {key: value for key, value in usage.flat(step.config) if not is_neutral(key)}
    parts: list[Any] = [step.stage.experiment, values]
    if step.source:
        before = record.stage(step.source)
        parts += [before.inputs, before.weights]
    else:
        parts.append(step.config.init_from)
    if step.insisted and (step.source or step.config.init_from):
        parts.append(step.insisted)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def digest(checkpoint: Path) -> str:
    """sha256 of a checkpoint's manifest, which has those of all its files; "" without one."""
    try:
        return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def lost(there: StageRecord, directory: Path) -> str:
    """What has become of the checkpoint that a stage ended with: "is gone", "has changed since", or "" if it is there.

    Of a stage that trains nothing: "".
    """
    place = checkpoint_of(there)
    if place is None or digest(directory / place) == there.weights:
        return ""
    return "has changed since" if (directory / place).exists() else "is gone"


def checkpoint_of(done: StageRecord) -> str | None:
    """A trained stage's last checkpoint, relative to the pipeline's directory; None of one that trains nothing."""
    return f"{done.workdir}/{CHECKPOINTS}/{done.steps}" if done.steps else None


def is_neutral(key: str) -> bool:
    return key in NEUTRAL or key.startswith("checkpoint.")


def flags_of(overrides: dict[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in overrides.items() if value is not None]


def shown(flags: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, flags))
