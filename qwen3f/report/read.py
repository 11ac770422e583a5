"""Reads the directory of a pipeline or a run into a Report. Missing or broken files are reported and never fatal."""

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3f.errors import UserError
from qwen3f.files import is_directory, is_file, read_bounded
from qwen3f.finite import as_finite
from qwen3f.report.asked import QUESTIONS, read_asked, read_pictures, results_table
from qwen3f.report.data import Measure, Report, Run, Stage, Texts
from qwen3f.report.marks import difference_in_run, difference_of_stages, measure
from qwen3f.report.metrics_file import NO_METRICS, read_metrics
from qwen3f.report.names import plain, purpose_of
from qwen3f.report.tried import T, tried
from qwen3f.strict_json import read_object

PIPELINE = "pipeline.json"
_PICTURES = {"The mesh": "mesh.png", "The pipeline's time": "timeline.png"}
_MOST_PICTURE = 2**19  # bytes of a picture, at most, so that the page stays small
_MOST_TEXTS = 2**25  # bytes of a file of answers or samples, at most


def read(workdir: Path) -> Report:
    """The report of a workdir. Raises UserError if it has neither a pipeline nor a run, or cannot be read."""
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    try:
        told = read_object(workdir / PIPELINE) if (workdir / PIPELINE).is_file() else None
    except OSError as error:
        raise UserError(f"{error.filename or workdir} cannot be read ({error.strerror or error})") from error
    if told is not None:
        return _pipeline(workdir, told, now)
    if not any((workdir / name).is_file() for name in ("metrics.jsonl", "config.json")):
        raise UserError(
            f"{workdir} has neither {PIPELINE} nor a run's config.json or metrics.jsonl; give the --workdir of a run"
        )
    return Report(plain(workdir.absolute().name), (_single(workdir),), written=now)


def read_run(workdir: Path) -> Run:
    problems: list[str] = []
    if not os.access(workdir, os.R_OK | os.X_OK):
        return Run(problems=(f"{workdir.name} cannot be read: it gives no access.",))

    def read_file(name: str, read: Callable[[], T], otherwise: T) -> T:
        return tried(problems, f"{name} cannot be read", read, otherwise)

    def there(name: str) -> Mapping[str, Any]:
        return read_file(name, lambda: read_object(workdir / name), {}) if (workdir / name).exists() else {}

    config, record = there("config.json"), there("run.json")
    results = tuple((name, _measure(one)) for name, one in results_table(workdir))
    counts = there("rejection_summary.json").get("counts")
    if not (config or results or counts or is_file(workdir / QUESTIONS)):
        problems.append("There is no config.json, so the configuration is not shown.")
    metrics = read_file("metrics.jsonl", lambda: read_metrics(workdir / "metrics.jsonl"), NO_METRICS)
    if metrics.broken:
        problems.append(f"{metrics.broken:,} lines of metrics.jsonl are left out: no JSON objects with a step.")
    answers = [
        read_file(path.name, lambda path=path: _texts(path), Texts(0, ()))
        for path in _numbered(workdir / "answers")
        if _step(path) <= metrics.last_step
    ]
    files = _numbered(workdir / "samples")
    samples = [
        read_file(path.name, lambda path=path: _texts(path), Texts(0, ()))
        for path in dict.fromkeys(files[:1] + files[-1:])
    ]
    pictures = {}
    for title, name in _PICTURES.items():
        path = workdir / "plan" / name
        if is_file(path) and path.stat().st_size <= _MOST_PICTURE:
            pictures[title] = read_file(name, path.read_bytes, b"")
    return Run(
        config, record, metrics, tuple(answers), tuple(samples), pictures, results,
        counts if isinstance(counts, dict) else {}, tuple(problems),
    )  # fmt: skip


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.jsonl")) if folder.is_dir() else []


def _step(path: Path) -> int:
    digits = path.stem.partition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _texts(path: Path) -> Texts:
    if path.stat().st_size > _MOST_TEXTS:
        raise UserError(f"{path} has more than {_MOST_TEXTS:,} bytes")
    lines = []
    for line in read_bounded(path).split(b"\n"):  # only \n ends a line: a text may hold U+2028
        try:
            found = json.loads(line.decode(errors="replace"))
        except (ValueError, RecursionError):
            continue  # the last line may be incomplete
        if isinstance(found, dict):
            lines.append(found)
    return Texts(_step(path), tuple(lines))


# -- a single run ------------------------------------------------------------------------------------------------------


def _single(workdir: Path) -> Stage:
    run = read_run(workdir)
    evaluated = [
        series.steps for name, series in run.metrics.series.items() if name.startswith("val_") and series.steps
    ]
    first, last = (min(s[0] for s in evaluated), max(s[-1] for s in evaluated)) if evaluated else (0, 0)
    sessions = _sessions(run.record)
    before, after = _measures(run, first) if first < last else {}, _measures(run, last)
    return Stage(
        name=plain(run.kind or workdir.absolute().name),
        purpose=purpose_of(run.config),
        run=run,
        before=before,
        after=after,
        differences={
            name: found for name in before.keys() & after.keys() if (found := difference_in_run(run, name, first, last))
        },
        before_step=first if first < last else 0,
        origin=str(run.config.get("init_from") or ""),
        workdir=workdir.absolute().name,
        seconds=sum(number(one.get("seconds"), 0.0) for one in sessions),
        steps=run.metrics.last_step,
    )


def _sessions(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    found = record.get("sessions")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


_MEASURES = (
    "val_accuracy", "val_accuracy_plain", "val_accuracy_thinking", "answers_accuracy", "val_exact", "answers_wins",
    "val_wins", "val_loss", "val_bpb",
)  # fmt: skip


def _measures(run: Run, step: int) -> dict[str, Measure]:
    """The measures of the evaluation at `step`."""
    return {name: measure(run, name, step) for name in _MEASURES if step in run.metrics.at(name).steps}


# -- a pipeline --------------------------------------------------------------------------------------------------------


def _pipeline(workdir: Path, told: Mapping[str, Any], now: str) -> Report:
    listed = told.get("stages")
    stages = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    measured = {plain(one.get("name")): _told(one.get("measures")) for one in stages}
    read = [_stage(workdir, one, measured) for one in stages]
    by_name = {stage.name: stage for stage in read}
    return Report(
        title=plain(workdir.absolute().name),
        stages=tuple(_compared(stage, by_name.get(stage.origin)) for stage in read),
        pipeline=True,
        preset=str(told.get("preset") or ""),
        seed=str(told.get("seed", "")),
        commit=str(told.get("commit") or ""),
        budget_s=number(told.get("budget_s"), 0.0),
        written=now,
        problems=() if stages else (f"{PIPELINE} names no stages.",),
    )


def _stage(workdir: Path, told: Mapping[str, Any], measured: Mapping[str, Mapping[str, Measure]]) -> Stage:
    place = workdir / str(told.get("workdir") or "")
    inside = is_directory(place) and place != workdir and place.resolve().is_relative_to(workdir.resolve())
    run = read_run(place) if inside else Run()
    origin = plain(told.get("from") or told.get("init_from") or "")
    overrides = told.get("overrides")
    trains = not (run.results or run.counts) or bool(run.metrics.lines)  # an evaluation changes nothing
    return Stage(
        name=plain(told.get("name") or "?"),
        purpose=str(told.get("purpose") or purpose_of(run.config)),
        run=run,
        before=measured.get(origin, {}) if trains else {},
        asked=(*read_asked(place), *read_pictures(place)) if inside else (),
        after=_told(told.get("measures")),
        origin=origin,
        workdir=str(told.get("workdir") or ""),
        experiment=str(told.get("experiment") or ""),
        overrides=overrides if isinstance(overrides, dict) else {},
        status=str(told.get("status") or ""),
        error=str(told.get("error") or ""),
        seconds=number(told.get("seconds"), 0.0),
        steps=int(number(told.get("steps"), 0.0)) or run.metrics.last_step,
    )


def _compared(stage: Stage, origin: Stage | None) -> Stage:
    """The stage with its differences from `origin`, for questions that both were asked."""
    found = {name: difference_of_stages(origin, stage, name) for name in stage.after} if origin else {}
    return dataclasses.replace(stage, differences={name: one for name, one in found.items() if one})


def _told(measures: object) -> dict[str, Measure]:
    found = {
        str(name): _measure(one)
        for name, one in (measures.items() if isinstance(measures, dict) else ())
        if isinstance(one, dict)
    }
    return {name: one for name, one in found.items() if math.isfinite(one.value)}


def _measure(told: Mapping[str, Any]) -> Measure:
    value, low, high = (number(told.get(key), math.nan) for key in ("value", "low", "high"))
    return Measure(value, low, high, int(number(told.get("n"), 0.0)))


def number(value: object, otherwise: float) -> float:
    """A JSON value as a finite number; `otherwise` for anything else."""
    found = as_finite(value)
    return otherwise if found is None else found
