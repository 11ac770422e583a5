"""Which stages a command runs, and which results are stale: decided before anything starts or moves."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from qwen3f.errors import UserError
from qwen3f.pipeline.chain import CHECKPOINTS, Step, check_start, inputs_of, is_neutral
from qwen3f.pipeline.record import Record


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a stage stands. state: done; stale: done, from other inputs; open: not done. inputs: now, "" if unknown."""

    state: str
    inputs: str


def survey(steps: Sequence[Step], record: Record) -> dict[str, Standing]:
    """Of every stage that is not skipped, in order."""
    out: dict[str, Standing] = {}
    for step in steps:
        if step.skipped:
            continue
        known = not step.source or out[step.source].state == "done"
        inputs, there = inputs_of(step, record) if known else "", record.stage(step.name)
        state = "open"
        if there.status in ("done", "stale"):
            state = "done" if inputs and inputs == there.inputs else "stale"
        out[step.name] = Standing(state, inputs)
    return out


def choose(steps: Sequence[Step], record: Record, directory: Path, asked: Sequence[str]) -> tuple[str, ...]:
    """The stages to run, in order. asked: those of --config.stages, in order; none: all that are not done.

    A command with --config.stages that was stopped goes on with those that are left (record.left). Raises UserError
    for a stage without its inputs, and without --config.stages for results that are stale.
    """
    standing = survey(steps, record)
    if asked:
        if skipped := [step.name for step in steps if step.skipped and step.name in asked]:
            raise UserError(f"--config.stages names {skipped[0]}, which --config.skip leaves out; take it out of one")
        left = record.left if record.left and tuple(asked[-len(record.left) :]) == record.left else tuple(asked)
        _check_inputs(steps, standing, left)
        _check_starts(steps, record, directory, left)
        return left
    for step in steps:
        if step.name not in standing:
            continue
        found, there = standing[step.name], record.stage(step.name)
        if found.state == "stale" or (found.inputs and begun_otherwise(step, record, found.inputs, directory)):
            later = [name for name in list(standing)[list(standing).index(step.name) :]]
            again = [name for name in later if standing[name].state == "stale" or name == step.name]
            again += [name for name in later if standing[name].state == "open" and name != step.name]
            names = ",".join(name for name in standing if name in again)
            raise UserError(
                f"{step.name} {'ran' if found.state == 'stale' else 'began'} {_why(step, record)}, so what is in "
                f"{directory / there.workdir}, and what came from it, is stale: write --config.stages={names} to run "
                "that again (the old directories are moved aside), or put back what was changed"
            )
    left = tuple(name for name, found in standing.items() if found.state == "open")
    _check_starts(steps, record, directory, left)
    return left


def begun_otherwise(step: Step, record: Record, inputs: str, directory: Path) -> bool:
    """Whether a stage that is not done has trained from other inputs than it would go on with."""
    there = record.stage(step.name)
    began = any((directory / there.workdir / CHECKPOINTS).glob("[0-9]*"))
    return bool(there.inputs) and there.inputs != inputs and began


def _check_inputs(steps: Sequence[Step], standing: dict[str, Standing], left: Sequence[str]) -> None:
    by_name, changing = {step.name: step for step in steps}, set[str]()
    for name in standing:
        source = by_name[name].source
        if name in left:
            if source and source not in left and (source in changing or standing[source].state != "done"):
                before = "has not run" if standing[source].state == "open" else "would be stale by then"
                raise UserError(
                    f"--config.stages: {name} starts from {source}, which {before}; write --config.stages="
                    f"{','.join(n for n in standing if n in left or n == source)}, or --config.skip={source}"
                )
            changing.add(name)
        elif source in changing:
            changing.add(name)


def _check_starts(steps: Sequence[Step], record: Record, directory: Path, left: Sequence[str]) -> None:
    for step in steps:
        if step.name in left and step.source and step.source not in left:
            check_start(step, record, directory)


def _why(step: Step, record: Record) -> str:
    there = record.stage(step.name)
    now, before = json.loads(json.dumps(step.overrides)), there.overrides
    changes = [
        f"{key}: {before.get(key, 'its default')} -> {now.get(key, 'its default')}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and not is_neutral(key)
    ]
    if changes:
        return f"with other settings ({', '.join(changes)})"
    if (there.start or "") != step.source:
        return f"from {there.start or 'nothing'} instead of {step.source or 'its init_from'}"
    if step.source:
        return f"from another {step.source} than there is now, or by an experiment that was changed"
    return "by an experiment that was changed"
