"""Runs the stages of a pipeline one after the other, and resumes from the state in its directory."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from qwen3f.errors import TrainingError, UserError
from qwen3f.pipeline import chain, commands, foresee, measure, pictures, plan, record, table
from qwen3f.pipeline.chain import Step
from qwen3f.pipeline.choose import Standing, check_kept, choose, goes_on, survey
from qwen3f.pipeline.process import Command, Signals
from qwen3f.pipeline.record import Record
from qwen3f.pipeline.stages import MEASURE, differing
from qwen3f.rl.tasks import drawn_task
from qwen3f.tasks.visual import VisualTask
from qwen3f.train import checks, lock
from qwen3f.train.reporting import ReportWriter

_EVERY = 30.0  # seconds between two writes of the record while a stage runs
_SHARE = 0.02  # largest share of the time for writing the report while a stage runs
_PATIENCE = 120.0  # seconds to wait for a stage whose pipeline was killed to save and end


class Task(NamedTuple):
    """A command, with the name and configuration of the section of config.set that its errors refer to."""

    command: Command
    name: str
    config: ConfigDict


class Stopped(Exception):
    """A signal has stopped the pipeline."""


def run(config: ConfigDict, workdir: Path, progress: bool = True, chosen: Collection[str] = ()) -> None:
    """Run the stages that are not done, or those of config.stages; with config.plan only print what a mesh would do.

    chosen: keys that the user has set, such as "set.grpo.seed". A stage keeps these values, even if they equal the
      experiment's. For other keys it takes the seed, mesh, device and hardware of the pipeline.

    SIGTERM and SIGINT end the running stage after its current step, with a checkpoint; the same command then resumes.
    Raises UserError for settings that cannot run, before any stage starts or anything is moved; TrainingError for a
    stage that failed.
    """
    steps = chain.steps_of(config, chosen)
    if config.plan:
        plan.run(config, steps, workdir)
        return
    checks.check_workdir(workdir)
    with Signals().caught() as signals, lock.held(workdir):
        run_ = Pipeline(config, _questions(config, chosen), steps, workdir, signals, progress)
        try:
            run_.all()
        except Stopped:
            names = [step.name for step in steps if run_.record.stage(step.name).status == "waiting"]
            at = f" before {names[0]}" if names else ""
            at = f" in {run_.now}" if run_.now else at
            print(f"{signals.name}: stopped{at}; the same command resumes there", flush=True)
        except PermissionError as error:
            raise UserError(
                f"--workdir={workdir}: {error.filename} in it cannot be changed ({error.strerror}); make the whole "
                "directory writable, then run the same command"
            ) from error


class Pipeline:
    """A running pipeline.

    questions: configuration of experiments/eval.py for the shared questions. record: the contents of pipeline.json.
    now: name of the stage that runs.
    """

    def __init__(
        self,
        config: ConfigDict,
        questions: ConfigDict,
        steps: Sequence[Step],
        directory: Path,
        signals: Signals,
        progress: bool,
    ) -> None:
        self.config, self.questions, self.steps, self.directory = config, questions, steps, directory
        self.signals, self.progress, self.now = signals, progress, ""
        self.record = _opened(config, steps, directory)
        self._writer = ReportWriter(directory, _SHARE, partial(print, flush=True))

    def all(self) -> None:
        asked = chain.parse_names(self.config.stages, [step.name for step in self.steps], "--config.stages")
        left = choose(self.steps, self.record, self.directory, asked)
        self._check_kept(left)
        self._foresee(left)
        self._keep(asked=asked, left=left if asked else (), commit=record.commit())
        by_name = {step.name: step for step in self.steps}
        for number, name in enumerate(left):
            self._one(by_name[name], left[number + 1 :] if asked else ())
        self._check_kept()
        self._ask_of(self._unasked())
        self._keep(asked=())
        self._end(left)

    def _foresee(self, left: Collection[str]) -> None:
        """Raises UserError for settings that a stage of `left` would refuse when its turn comes."""
        if not left:
            return
        described = foresee.described(self.steps, left, self.questions, self.directory)
        failure = self.signals.run(commands.foreseeing(described))
        if self.signals.name:
            raise Stopped
        if failure and failure.code == 2:
            raise UserError(failure.error)
        if failure:
            raise TrainingError(f"the stages could not be checked: {failure.error or failure.code}")

    def _check_kept(self, left: Sequence[str] = ()) -> None:
        """Raises UserError if a needed checkpoint is gone: one that must still answer questions, or the last one.

        left: stages that are still to run.
        """
        needed = [step.name for step in self._unasked()]
        needed += [step.name for step in self._done() if step.kind == "training"][-1:]
        check_kept(self.steps, self.record, self.directory, needed, left)

    # -- one stage -----------------------------------------------------------------------------------------------------

    def _one(self, step: Step, left: tuple[str, ...]) -> None:
        standing = self._standing(step)
        self._make_place(step, standing)
        source = self.record.stage(step.source) if step.source else None
        init_from = chain.checkpoint_of(source) if source else None
        before = self.record.stage(step.name)
        self.now = step.name
        self._keep_stage(
            step,
            status="running",
            error="",
            inputs=standing.inputs,
            init_from=init_from or step.config.get("init_from") or None,
            start=step.source or None,
            overrides=json.loads(json.dumps(step.overrides)),
            started=before.started if before.seconds else time.time(),
            commit=self.record.commit,
        )
        said = f"--- {step.number} of {len(self.steps)}: {step.name}, {step.stage.purpose}"
        print(f"{said} (in {self.directory / step.workdir})", flush=True)
        place = str(self.directory / init_from) if init_from else step.config.get("init_from", "")
        found = self._work(step, place)
        self.now = ""
        steps = step.config.steps if step.kind == "training" else 0
        weights = chain.digest(step.checkpoint(self.directory)) if steps else ""
        self.record = self.record.with_stage(step.name, status="done", measures=found, steps=steps, weights=weights)
        self._keep(left=left)
        _say(step, found)
        self._report()

    def _work(self, step: Step, place: str) -> dict[str, measure.Measure]:
        """Runs the stage and returns its measures. With config.overlap the shared questions are asked later, beside the
        next stage."""
        if step.kind == "pictures":
            return self._show(step, place)
        if step.kind == "evaluation":
            folder = self.directory / step.workdir
            self._run_beside(step, _both_modes(step.name, step.config, place, folder))
            return measure.answered(folder)
        self._train(step, place)
        found = measure.logged(step, self.directory / step.workdir)
        if step.asks and not self.config.overlap:
            self._run(step, self._asking(step))
            found |= measure.answered(self.directory / step.workdir / measure.FOLDER)
        return found

    def _make_place(self, step: Step, standing: Standing) -> None:
        """Makes the stage's directory ready: waits for the end of a killed pipeline's stage, and moves the directory
        aside unless the stage resumes in it."""
        place = self.directory / step.workdir
        _wait_until_free(place)
        if goes_on(step, self.record, standing):
            return
        self._keep_stage(step, status="waiting", seconds=0.0, steps=0, weights="", measures={}, inputs="")
        if place.exists():
            aside = next(p for n in range(1, 10_000) if not (p := place.with_name(f"{place.name}.old-{n}")).exists())
            place.rename(aside)
            print(f"{place} moved aside, to {aside.name}", flush=True)

    def _train(self, step: Step, init_from: str) -> None:
        if step.trained(self.directory):  # the pipeline was stopped while it measured the stage
            return
        command = commands.training(step, init_from, self.directory / step.workdir, self.progress)
        self._run_beside(step, [Task(Command(command), step.name, step.config)])
        if not step.trained(self.directory):
            self._fail(step, f"it ended without {step.checkpoint(self.directory)}")

    def _show(self, step: Step, place: str) -> dict[str, measure.Measure]:
        folder = self.directory / step.workdir
        seen = next((one.config.data for one in self.steps if one.name == step.source), {})
        # pictures of the kinds and sizes that the model was trained on
        task = drawn_task(seen) if "picture_kinds" in seen else VisualTask()
        for number, (picture, prompt) in enumerate(pictures.draw(folder, task)):
            if pictures.answer(folder, number) is not None:  # the file is complete and cannot be written again
                continue
            out = pictures.place_of(folder, number)
            out.unlink(missing_ok=True)
            command = commands.showing(step, place, picture, prompt, out)
            self._run(step, [Task(Command(command, quiet=True), step.name, step.config)])
        for line in pictures.said(folder):
            print(line, flush=True)
        return {}

    def _asking(self, step: Step) -> list[Task]:
        """The tasks that ask the stage's checkpoint the shared questions."""
        folder = self.directory / step.workdir / measure.FOLDER
        measure.clear_other(folder, measure.settings_of(self.questions))
        return _both_modes(MEASURE, self.questions, str(step.checkpoint(self.directory)), folder)

    def _done(self) -> list[Step]:
        standing = survey(self.steps, self.record)
        return [step for step in self.steps if not step.skipped and standing[step.name].state == "done"]

    def _unasked(self) -> list[Step]:
        """Finished stages whose checkpoints have not answered the present shared questions."""
        settings, out = measure.settings_of(self.questions), []
        for step in self._done():
            folder, known = self.directory / step.workdir / measure.FOLDER, self.record.stage(step.name).measures
            if step.asks and not measure.is_answered(folder, settings, known):
                out.append(step)
        return out

    def _ask_of(self, steps: Sequence[Step]) -> None:
        """Asks the shared questions of these stages' checkpoints, one after the other."""
        for step in steps:
            self.now = step.name
            self._run(step, self._asking(step))
            self._take(step)
        self.now = ""

    def _take(self, step: Step) -> None:
        found = measure.answered(self.directory / step.workdir / measure.FOLDER)
        self._keep_stage(step, measures={**self.record.stage(step.name).measures, **found})
        _say(step, found)

    def _run_beside(self, step: Step, tasks: Sequence[Task]) -> None:
        """Runs tasks; with config.overlap, earlier checkpoints answer the shared questions at the same time."""
        others = self._unasked() if self.config.overlap else []
        self._run(step, [*tasks, *(task for other in others for task in self._asking(other))])
        for other in others:
            self._take(other)

    def _run(self, step: Step, tasks: Sequence[Task]) -> None:
        """Runs tasks at the same time. Records the outcome and raises Stopped after a signal, or as _fail."""
        begin, before = time.monotonic(), self.record.stage(step.name).seconds

        def seconds() -> float:
            return before + time.monotonic() - begin

        failure = None
        if not self.signals.name:
            failure = self.signals.run(*(task.command for task in tasks), meanwhile=self._meanwhile(step, seconds))
        if self.signals.name:
            self._end_stage(step, status="waiting", error=f"stopped by {self.signals.name}", seconds=seconds())
            raise Stopped
        if failure:
            code, failed = failure.code, tasks[failure.command]
            error = chain.in_pipeline(failure.error, failed.name, failed.config)
            self._fail(step, error or f"it ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}", code)
        self._keep_stage(step, seconds=seconds())

    def _fail(self, step: Step, error: str, code: int = 1) -> None:
        with contextlib.suppress(OSError):  # the disk may be full; the stage's own error is more useful
            self._end_stage(step, status="failed", error=error)
        words = f"stage {step.name} failed: {error} (the same command resumes there)"
        raise UserError(words) if code == 2 else TrainingError(words)

    def _meanwhile(self, step: Step, seconds: Callable[[], float]) -> Callable[[], None]:
        last = time.monotonic()

        def tick() -> None:
            nonlocal last
            if time.monotonic() - last < _EVERY:
                return
            last = time.monotonic()
            with contextlib.suppress(OSError):  # the stage will report the error itself
                self._keep_stage(step, seconds=seconds())
            if self._writer.due:
                self._report()

        return tick

    # -- what is kept and said -----------------------------------------------------------------------------------------

    def _standing(self, step: Step) -> Standing:
        return survey(self.steps, self.record)[step.name]

    def _keep_stage(self, step: Step, **changes: object) -> None:
        self.record = self.record.with_stage(step.name, **changes)
        self._keep()

    def _end_stage(self, step: Step, **changes: object) -> None:
        """Records that a stage ended early. A finished stage stays "done": only questions to its checkpoint ended."""
        if self.record.stage(step.name).status != "done":
            self._keep_stage(step, **changes)

    def _keep(self, **changes: object) -> None:
        """Updates the status of stages that have become stale, or are valid again, and writes the record."""
        self.record = dataclasses.replace(self.record, **changes)
        for name, found in survey(self.steps, self.record).items():
            if found.state != "open":
                self.record = self.record.with_stage(name, status=found.state)
        record.write(self.directory, self.record)

    def _report(self) -> None:
        if self.config.report:
            self._writer.write()

    def _end(self, ran: Sequence[str]) -> None:
        if not ran:
            print("nothing left to run; --config.stages=NAME,… runs stages again", flush=True)
        stale = [one.name for one in self.record.stages if one.status == "stale"]
        out = [*table.lines(self.record), *table.over_budget(self.record)]
        if stale:
            out.append(f"stale: {', '.join(stale)}; write --config.stages={','.join(stale)} to run them again")
        if (self.directory / "report.html").is_file():
            out.append(f"report: {self.directory / 'report.html'}")
        print("\n".join([*out, *table.next_commands(self.steps, self.record, self.directory)]), flush=True)


def _questions(config: ConfigDict, chosen: Collection[str]) -> ConfigDict:
    """The configuration of the shared questions, on the pipeline's device unless they have their own."""
    one = config.set[MEASURE].copy_and_resolve_references()
    own = {*differing(one, commands.EVAL), *chain.own_keys(MEASURE, chosen)}
    chain.share(one, {"device": config.device}, own)
    return one


def _both_modes(name: str, config: ConfigDict, place: str, folder: Path) -> list[Task]:
    """Tasks that ask the questions of `config` to the weights in `place`, in each mode without answers yet.

    name: the section of config.set that has `config`.
    """
    left = [mode for mode in measure.MODES if not measure.has_answers(folder / mode)]
    for mode in left:
        measure.clear_unfit(folder / mode, config, place)
    return [
        Task(Command(commands.asking(config, place, mode, folder / mode), quiet=True), name, config) for mode in left
    ]


def _say(step: Step, found: Mapping[str, measure.Measure]) -> None:
    said = "; ".join(f"{table.word(name)} {table.say(name, one)}" for name, one in found.items())
    print(f"{step.name}: {said or 'done'}", flush=True)


def _opened(config: ConfigDict, steps: Sequence[Step], directory: Path) -> Record:
    """The record of `directory`, with the present settings. Raises UserError for the record of another pipeline."""
    fresh = tuple(step.fresh_record() for step in steps)
    there = record.read(directory)
    if there is None:
        if (directory / "config.json").exists():
            raise UserError(f"--workdir={directory} has a single run; choose another directory for the pipeline")
        return Record(config.preset, config.seed, fresh)
    if there.preset != config.preset or [one.name for one in there.stages] != [step.name for step in steps]:
        raise UserError(
            f"--workdir={directory} has the pipeline {there.preset!r}"
            f"{' with other stages' if there.preset == config.preset else ''}, not {config.preset!r}; choose another "
            "directory"
        )
    stages = []
    for one, step in zip(there.stages, steps):
        changes = {"purpose": step.stage.purpose, "budget_s": step.stage.seconds or None}
        if step.skipped:
            changes["status"] = "skipped"
        elif one.status == "skipped":
            changes["status"] = "stale" if one.steps or one.measures else "waiting"
        stages.append(one.replace(**changes))
    return dataclasses.replace(there, seed=config.seed, stages=tuple(stages))


def _wait_until_free(place: Path) -> None:
    """Waits until no process writes to `place`. Raises UserError if that takes longer than _PATIENCE."""
    until, said = time.monotonic() + _PATIENCE, False
    while place.exists():
        try:
            with lock.held(place):
                return
        except UserError as error:
            if not isinstance(error.__cause__, BlockingIOError) or time.monotonic() > until:
                raise  # waiting only helps if the directory is in use
            if not said:
                print(f"a stage whose pipeline has ended still writes to {place}: waiting for it", flush=True)
            said = True
            time.sleep(0.5)
