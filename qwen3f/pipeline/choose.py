"""Decides which stages a command runs and which results are stale, before anything starts or moves."""

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from qwen3f.errors import UserError
from qwen3f.pipeline.chain import CHECKPOINTS, Step, checkpoint_of, in_pipeline, inputs_of, is_neutral, lost
from qwen3f.pipeline.record import Record
from qwen3f.train import checks


@dataclasses.dataclass(frozen=True)
class Standing:
    """The state of a stage.

    state: "done"; "stale" (done, but from other inputs than now); or "open" (not done). inputs: the hash of its present
    inputs (chain.inputs_of); "" if unknown.
    """

    state: str
    inputs: str


def survey(steps: Sequence[Step], record: Record) -> dict[str, Standing]:
    """The Standing of every stage that is not skipped, in order."""
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
    """The stages to run, in order. asked: the names of --config.stages, in order; empty: all stages that are not done.

    The same --config.stages again resumes with the stages that are left, see Record. Raises UserError for a stage whose
    inputs are missing, and, without --config.stages, for stale results.
    """
    standing = survey(steps, record)
    if asked:
        if skipped := [step.name for step in steps if step.skipped and step.name in asked]:
            raise UserError(
                f"--config.stages names {skipped[0]}, which --config.skip leaves out; remove it from one of them"
            )
        left = _left(standing, record, directory, tuple(asked))
        _check_inputs(steps, standing, record, directory, left)
    else:
        _check_sound(steps, standing, record, directory)
        left = tuple(name for name, found in standing.items() if found.state == "open")
    _check_starts(steps, record, directory, left)
    for step in steps:
        if step.name in left and step.config.get("init_from"):
            _check_own_start(step, goes_on(step, record, standing[step.name]), directory)
    return left


def check_kept(
    steps: Sequence[Step], record: Record, directory: Path, needed: Collection[str], left: Collection[str] = ()
) -> None:
    """Raises UserError unless each needed stage still has the checkpoint that it ended with.

    left: stages that are still to run; they, and stages that come from them, are not checked.
    """
    changing = set(left) | _after(steps, left)
    gone = [name for name in needed if name not in changing and lost(record.stage(name), directory)]
    if gone:
        there = record.stage(gone[0])
        raise UserError(
            f"{directory / checkpoint_of(there)}, the checkpoint of {gone[0]}, {lost(there, directory)}: write "
            f"--config.stages={','.join(_again(steps, record, directory, gone))} to train it again, or restore it"
        )


def goes_on(step: Step, record: Record, standing: Standing) -> bool:
    """Whether a stage resumes in its directory. If not, the directory is moved aside and the stage begins again."""
    there = record.stage(step.name)
    return there.status not in ("done", "stale") and there.inputs == standing.inputs


def begun_otherwise(step: Step, record: Record, inputs: str, directory: Path) -> bool:
    """Whether a stage that is not done has already trained, from other inputs than the present ones."""
    there = record.stage(step.name)
    began = any((directory / there.workdir / CHECKPOINTS).glob("[0-9]*"))
    return bool(there.inputs) and there.inputs != inputs and began


def _left(standing: dict[str, Standing], record: Record, directory: Path, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The stages of `asked` to run. If the last command had the same --config.stages and was stopped, and the results
    of its finished stages are sound, these are only the rest."""
    ran = asked[: len(asked) - len(record.left)]
    if asked != record.asked or asked != ran + record.left:
        return asked
    sound = all(standing[name].state == "done" and not lost(record.stage(name), directory) for name in ran)
    return record.left if sound else asked


def _check_sound(steps: Sequence[Step], standing: dict[str, Standing], record: Record, directory: Path) -> None:
    """Raises UserError for stale results, and for an unfinished stage that began from other inputs."""
    for step in steps:
        if step.name not in standing:
            continue
        found, there = standing[step.name], record.stage(step.name)
        if found.state == "stale" or (found.inputs and begun_otherwise(step, record, found.inputs, directory)):
            undone = [name for name, one in standing.items() if one.state != "done"]
            names = ",".join(_again(steps, record, directory, undone))
            raise UserError(
                f"{step.name} {'ran' if found.state == 'stale' else 'began'} {_why(step, record)}, so what is in "
                f"{directory / there.workdir}, and what came from it, is stale: write --config.stages={names} to run "
                "these stages again (the old directories are moved aside), or undo the change"
            )


def _check_inputs(
    steps: Sequence[Step], standing: dict[str, Standing], record: Record, directory: Path, left: Sequence[str]
) -> None:
    by_name, changing = {step.name: step for step in steps}, set[str]()
    for name in standing:
        source = by_name[name].source
        if name in left:
            if source and source not in left and (source in changing or standing[source].state != "done"):
                before = "has not run" if standing[source].state == "open" else "would be stale by then"
                sound = {one for one, found in standing.items() if found.state == "done"} - changing | {*left}
                skip = _without(steps, name, sound)
                raise UserError(
                    f"--config.stages: {name} starts from {source}, which {before}; write --config.stages="
                    f"{','.join(_again(steps, record, directory, [source, *left]))}"
                    + (f", or --config.skip={','.join(skip)}" if skip else "")
                )
            changing.add(name)
        elif source in changing:
            changing.add(name)


def _without(steps: Sequence[Step], name: str, sound: Collection[str]) -> list[str]:
    """The names for --config.skip with which the stage would start from the nearest stage of `sound` before it, in
    order; [] if there is no such stage."""
    out, there = [step.name for step in steps if step.skipped], [step.name for step in steps]
    for step in reversed(steps[: there.index(name)]):
        if step.skipped or step.kind != "training":
            continue
        if step.name in sound:
            return [one for one in there if one in out]
        out.append(step.name)
    return []


def _check_starts(steps: Sequence[Step], record: Record, directory: Path, left: Sequence[str]) -> None:
    """Raises UserError unless every stage to run finds the checkpoint of its source, unchanged."""
    for step in steps:
        if step.name in left and step.source and step.source not in left:
            there = record.stage(step.source)
            if what := lost(there, directory):
                names = ",".join(_again(steps, record, directory, [step.source, *left]))
                raise UserError(
                    f"{step.name} starts from {directory / checkpoint_of(there)}, which {what}: write "
                    f"--config.stages={names} to train from there again, or restore it"
                )


def _check_own_start(step: Step, goes_on: bool, directory: Path) -> None:
    """Raises UserError if the stage's own init_from does not exist or has no weights. A run that has begun does not
    need it any more."""
    if goes_on and (directory / step.workdir / "config.json").is_file():
        return
    from qwen3f.interop import source  # imports torch

    try:
        checks.check(step.config, directory / step.workdir / "new")  # a directory without a run
        source.pinned(step.config.init_from)
    except UserError as error:
        raise UserError(in_pipeline(str(error), step.name, step.config, step.shared)) from error


def _again(steps: Sequence[Step], record: Record, directory: Path, names: Collection[str]) -> list[str]:
    """`names`, and the stages before and between them that must run too, in order: what --config.stages must name."""
    again, standing = set(names), survey(steps, record)
    for step in reversed(steps):
        source = step.source if step.name in again else ""
        if source and (standing[source].state != "done" or lost(record.stage(source), directory)):
            again.add(source)
    between, before = _after(steps, again), set(again)
    for step in reversed(steps):
        if step.name in before and step.source:
            before.add(step.source)
    return [step.name for step in steps if step.name in again | (between & before)]


def _after(steps: Sequence[Step], names: Collection[str]) -> set[str]:
    """The stages that come from `names`, directly or through other stages."""
    out = set[str]()
    for step in steps:
        if step.source in names or step.source in out:
            out.add(step.name)
    return out


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
