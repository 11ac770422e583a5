"""The stages of a command line as steps: source, settings, and a hash of everything that a result depends on."""

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

# Keys that set how and where a stage runs. Changing them does not make its result stale.
NEUTRAL = frozenset({
    "device", "mesh", "hardware", "plan", "restarts", "watchdog", "collective_timeout", "wandb", "init_from", "resume",
    "log_every", "show_samples", "eval.every", "data.cache", "data.workers", "data.num_threads", "batch_tokens",
    "chunk", "report",
})  # fmt: skip
_KINDS = {"eval": "evaluation", "generate": "pictures"}  # config.stage -> kind; every other stage trains


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage of the pipeline with its present settings.

    Attributes:
        number: from 1; skipped stages count too.
        config: the stage's complete configuration.
        overrides: key -> value for keys that differ from the experiment, and for keys of the model that the user set.
        insisted: keys in `overrides` that the user set to the value that the experiment has anyway.
        shared: keys that take the value of the whole pipeline.
        source: the stage whose checkpoint it starts from; "" for the first stage, and for one with its own init_from.
        skipped: whether --config.skip names it.
        asks: whether its checkpoint answers the shared questions.
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
        """The checkpoint that it ends with."""
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
    """The steps of a pipeline's configuration. Imports no torch.

    chosen: keys that the user has set, such as "set.grpo.seed". Raises UserError for a bad config.skip, and for
    settings of a stage that cannot run.
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
                f"{stage.name} needs weights to start from, but every stage before it is skipped: write "
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
    """Whether a stage's checkpoint is asked. Models after pretraining cannot answer, so only the last of them is asked,
    for the "before" of the next stage."""
    return one.stage != "pretrain" or not after or configs[after[0]].stage != "pretrain"


def _insisted(name: str, one: ConfigDict, chosen: Collection[str], overrides: Collection[str]) -> tuple[str, ...]:
    """Keys of the model that the user has set to the experiment's own value. They matter: a stage that starts from
    weights takes the weights' model, except for keys that are written on its command line."""
    own = sorted(key for key in own_keys(name, chosen) if key.startswith("model.") and key not in overrides)
    return tuple(key for key in own if checks.get(one, key) is not None)


def _config(config: ConfigDict, stage: PipelineStage, chosen: Collection[str]) -> tuple[ConfigDict, tuple[str, ...]]:
    """(the stage's configuration, with the pipeline's values where it sets none; the keys of these values)."""
    one = config.set[stage.name].copy_and_resolve_references()
    shared = {"seed": config.seed, "device": config.device}
    shared |= {"mesh": config.mesh, "hardware": config.hardware} if one.stage not in _KINDS else {}
    return one, share(one, shared, {*differing(one, stage.experiment), *own_keys(stage.name, chosen)})


def share(one: ConfigDict, shared: dict[str, Any], own: Collection[str]) -> tuple[str, ...]:
    """Sets the pipeline's values for all keys that the configuration has, except its `own`; returns these keys."""
    given = {key: value for key, value in shared.items() if key in one and key not in own}
    with one.unlocked():
        one.update(given)
    return tuple(given)


def own_keys(name: str, chosen: Collection[str]) -> set[str]:
    """Keys of a stage that the user has set, default values included: "steps" for "set.grpo.steps"."""
    start = f"set.{name}."
    return {key.removeprefix(start) for key in chosen if key.startswith(start)}


def _check(name: str, one: ConfigDict, shared: Collection[str] = ()) -> None:
    """Raises UserError, with the pipeline's flags, for settings that launch.py would refuse before the stage starts."""
    known = one.copy_and_resolve_references()
    with known.unlocked():
        for key in checks.PLACES:
            if key in known:
                known[key] = known[key] or "W"  # a placeholder: the stage before will set it
    try:
        checks.check(known)
    except UserError as error:
        raise UserError(in_pipeline(str(error), name, one, shared)) from error


def in_pipeline(text: str, name: str, one: ConfigDict, shared: Collection[str] = ()) -> str:
    """An error of a stage, where the pipeline's flags replace its own: --config.set.grpo.steps for --config.steps.

    shared: keys that keep their names, as in Step.
    """
    keys = sorted((key for key, _ in usage.flat(one)), key=len, reverse=True)
    every = "|".join(re.escape(key) for key in keys if key not in shared)
    text = as_flags(text, keys)  # errors of a stage's own process have flags already
    return re.sub(rf"(?<![\w./-])--config\.({every})(?![\w-]|\.\w)", rf"--config.set.{name}.\1", text)


def parse_names(text: str, known: Sequence[str], flag: str) -> tuple[str, ...]:
    """Parses stage names such as "grpo,dpo". Raises UserError for an unknown name (and suggests the nearest), for a
    repeated name, and for names that are not in the order of the stages."""
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
    """A hash of everything that the stage's result depends on: its settings, and the checkpoint that it starts from.

    The stage that it starts from must be done.
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
    """sha256 of a checkpoint's manifest, which has the sha256 of all its files; "" if there is no manifest."""
    try:
        return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def lost(there: StageRecord, directory: Path) -> str:
    """What happened to the checkpoint that a stage ended with: "is gone", "has changed since", or "" for nothing.

    "" too for a stage that does not train.
    """
    place = checkpoint_of(there)
    if place is None or digest(directory / place) == there.weights:
        return ""
    return "has changed since" if (directory / place).exists() else "is gone"


def checkpoint_of(done: StageRecord) -> str | None:
    """A trained stage's last checkpoint, relative to the pipeline's directory; None for a stage that does not train."""
    return f"{done.workdir}/{CHECKPOINTS}/{done.steps}" if done.steps else None


def is_neutral(key: str) -> bool:
    return key in NEUTRAL or key.startswith("checkpoint.")


def flags_of(overrides: dict[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in overrides.items() if value is not None]


def shown(flags: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, flags))
