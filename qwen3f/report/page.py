"""Renders a Report as HTML: one file without scripts or external resources. Text of a run is escaped, never markup."""

import base64
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from qwen3f.report import charts, details, draw, names, overview, texts, words
from qwen3f.report.data import Report, Run, Stage
from qwen3f.report.tried import T, tried

TEMPLATES = Path(__file__).parent / "templates"
_DONE = {"done": "done", "running": "running", "waiting": "waiting", "failed": "failed", "skipped": "skipped",
         "stale": "stale: an earlier stage has changed since"}  # fmt: skip


def render(report: Report) -> str:
    page = _environment().get_template("report.html.j2")
    numbers = itertools.count(1)
    stages = [_stage(report, stage, place) for place, stage in enumerate(report.stages)]
    problems = list(report.problems)
    overviews = tried(problems, "The comparison of stages cannot be shown", lambda: _overviews(report), [])
    return page.render(
        report=report,
        title=report.title,
        lead=_lead(report),
        facts=_facts(report),
        overviews=overviews,
        stages=stages,
        figure_id=lambda svg: Markup(draw.named(svg, f"figure{next(numbers)}")),
        style=Markup((TEMPLATES / "style.css").read_text()),
        problems=problems,
    )


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters["breakable"] = _breakable
    return made


def _breakable(text: str) -> Markup:
    """A name that may break into a new line after an underscore, a dot or a slash."""
    return Markup(re.sub(r"([_/]|\.(?=\w))", r"\1<wbr>", str(escape(text))))


def _lead(report: Report) -> str:
    if report.pipeline:
        done = sum(stage.status == "done" for stage in report.stages)
        return (
            f"A language model of the Qwen3 family, trained in {len(report.stages)} stages, each from the weights of "
            f"one before it; {done} of them are done. This page says what each stage taught it, and what that cost."
        )
    [stage] = report.stages
    count, total = stage.run.record.get("parameters"), stage.run.config.get("steps")
    size = f" of {count:,} parameters" if isinstance(count, int) else ""
    if stage.run.results and not stage.run.metrics.lines:
        return "An evaluation of a language model of the Qwen3 family."
    far = f"trained for {stage.steps:,} steps"
    if isinstance(total, int) and stage.steps < total:
        far = f"trained for {stage.steps:,} of {total:,} steps so far"
    return f"A language model of the Qwen3 family{size}, {far}. This page says what it learnt, and what that cost."


def _facts(report: Report) -> list[tuple[str, str]]:
    seconds = sum(stage.seconds for stage in report.stages)
    budget = f" of {words.duration(report.budget_s)} planned" if report.budget_s else ""
    found = {
        "preset": report.preset,
        "seed": report.seed,
        "code": report.commit,
        "time so far": f"{words.duration(seconds)}{budget}" if seconds else "",
        "written": report.written,
    }
    return [(name, value) for name, value in found.items() if value]


def _overviews(report: Report) -> list[dict[str, Any]]:
    if not report.pipeline:
        return []
    out = []
    for name in overview.measured(report):
        meaning = names.find(name)
        rows = overview.rows_of(report, name)
        title = meaning.title[:1].upper() + meaning.title[1:]
        counts = {m.n for _, _, m in rows if m and m.n}
        asked = f" {min(counts):,} questions." if len(counts) == 1 else ""
        caption = (
            f"{meaning.meaning}{asked} Each row is a stage: the hollow dot is the model that it started from, the "
            "filled dot the model that it ended with, the bar its 95% interval."
        )
        out.append({"title": title, "svg": overview.dots(title, rows), "caption": caption})
    return out


# -- a stage -----------------------------------------------------------------------------------------------------------


def _stage(report: Report, stage: Stage, place: int) -> dict[str, Any]:
    run, problems = stage.run, list(stage.run.problems)

    def shown(what: str, make: Callable[[], T], otherwise: T) -> T:
        return tried(problems, f"{what} cannot be shown", make, otherwise)

    return {
        "id": f"stage-{place + 1}",
        "number": place + 1,
        "name": stage.name,
        "purpose": _sentence(stage.purpose),
        "status": _DONE.get(stage.status, stage.status),
        "error": stage.error,
        "origin": _origin(stage),
        "steps": f"{stage.steps:,} steps" if stage.steps else "",
        "meta": _meta(stage),
        "time": _time(stage),
        "experiment": stage.experiment,
        "results": _results(stage),
        "verdict": _verdict(report, stage),
        "before_words": f"step {stage.before_step:,}" if stage.before_step else "before",
        "quality": shown("How it learnt", lambda: _figures(run, "quality"), [])
        + shown("Experts", lambda: [_figure(chart) for chart in details.experts(run)], []),
        "cost": shown("What it cost", lambda: _figures(run, "cost"), []),
        "exchanges": shown("What it says", lambda: texts.exchanges(run) + _of_pipeline(report, stage), []),
        "rollouts": shown("What it tried", lambda: texts.rollouts(run), []),
        "data": details.data_lines(run),
        "lost": details.lost_lines(run),
        "mesh": shown("The mesh", lambda: details.mesh(run), ""),
        "pictures": [(title, _data_uri(png)) for title, png in run.pictures.items() if png],
        "tables": _tables(stage, shown),
        "read": _read(run),
        "problems": problems,  # the calls of `shown` above add to this list
    }


def _of_pipeline(report: Report, stage: Stage) -> list[texts.Exchange]:
    """Shared questions of the pipeline, with the answers of the models before and after this stage."""
    before = next((one for one in report.stages if one.name == stage.origin), None)
    trained = before if before and stage.before else None
    return texts.of_stages((trained.name, trained.asked) if trained else None, (stage.name, stage.asked))


def _time(stage: Stage) -> str:
    if stage.status == "skipped" and not stage.seconds:
        return ""
    return "not run yet" if stage.status == "waiting" and not stage.seconds else words.duration(stage.seconds)


def _meta(stage: Stage) -> str:
    """Origin, steps and time, experiment, and status, in a line."""
    steps = f"{stage.steps:,} steps in " if stage.steps else ""
    parts = (_origin(stage), f"{steps}{_time(stage)}", stage.experiment, _DONE.get(stage.status, stage.status))
    return "; ".join(filter(None, parts))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".") if text else ""


def _figures(run: Run, part: str) -> list[dict[str, Any]]:
    return [_figure(chart) for chart in charts.charts_of(run, part)]


def _figure(chart: charts.Chart) -> dict[str, Any]:
    return {"title": chart.title, "svg": draw.svg(chart), "caption": chart.caption}


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _origin(stage: Stage) -> str:
    if not stage.origin:
        return "" if stage.status == "skipped" else "from nothing"
    *_, place, folder, last = ("", "", *(Path(stage.origin).parts or (stage.origin,)))
    return f"from {place}, step {last}" if folder == "checkpoints" else f"from {last}"


def _results(stage: Stage) -> list[dict[str, str]]:
    out = []
    for name, after in stage.after.items():
        meaning = names.find(name, stage.run.kind) or names.Meaning(name, "")
        before = stage.before.get(name)
        paired = stage.differences.get(name)
        kind, sentence = words.change(before, after, meaning, paired) if before else ("none", "")
        out.append({
            "title": meaning.title,
            "before": words.interval(before, meaning.unit) if before else "",
            "after": words.interval(after, meaning.unit),
            "kind": kind,
            "sentence": sentence,
        })  # fmt: skip
    return out


def _verdict(report: Report, stage: Stage) -> str:
    """A sentence about what the stage improved or worsened, or that no change can be shown."""
    changes = {name: _change(stage, name) for name in stage.after.keys() & stage.before.keys()}
    if not changes:
        return ""
    sized = [name for name in changes if _has_intervals(stage, name)]
    told = sized or list(changes)
    gains, losses = (
        _titles(stage, [n for n in stage.after if n in told and changes[n] == what]) for what in ("gain", "loss")
    )
    since = f"since step {stage.before_step:,}" if stage.before_step else "by this stage"
    if gains and not losses:
        return f"Better {since}: {gains}."
    if losses and not gains:
        return f"Worse {since}: {losses}."
    if gains:
        return f"Better {since}: {gains}. Worse: {losses}."
    if sized:
        return f"No gain {since} that this number of questions can show: the interval of the difference includes zero."
    changed = [name for name in stage.after if name in told and stage.before[name].value != stage.after[name].value]
    if changed:
        return f"Changed {since}, without an interval that could call it a gain or a loss: {_titles(stage, changed)}."
    return f"Unchanged {since}: {_titles(stage, [name for name in stage.after if name in told])}."


def _change(stage: Stage, name: str) -> str:
    meaning = names.find(name, stage.run.kind) or names.Meaning(name, "")
    return words.change(stage.before[name], stage.after[name], meaning, stage.differences.get(name))[0]


def _has_intervals(stage: Stage, name: str) -> bool:
    return name in stage.differences or (stage.before[name].has_interval and stage.after[name].has_interval)


def _titles(stage: Stage, logged: Sequence[str]) -> str:
    found = ((names.find(name, stage.run.kind), name) for name in logged)
    return ", ".join(meaning.title if meaning else name for meaning, name in found)


def _tables(stage: Stage, shown: Callable[..., Any]) -> list[tuple[str, details.Table]]:
    """The tables of a stage that have rows, with titles. shown: the function of `_stage`."""
    changed = tuple((f"--config.{key}", str(value)) for key, value in stage.overrides.items())
    made: dict[str, Callable[[Run], details.Table | None]] = {
        "Benchmarks": details.results,
        "Answers sampled": details.counts,
        "Results by kind of question": details.groups,
        "Every logged number": details.every_number,
        "What the pipeline sets": lambda _: details.Table(("key", "value"), changed),
        "Configuration": details.changed_keys,
        "Mesh and placement of parameters": details.placement,
        "Machine, versions, time": details.machine,
    }
    found = [(title, shown(title, functools.partial(make, stage.run), None)) for title, make in made.items()]
    return [(title, table) for title, table in found if table and table.rows]


def _read(run: Run) -> str:
    """A sentence about how many lines of metrics.jsonl the curves show."""
    metrics = run.metrics
    if not metrics.lines:
        return "" if run.results or run.counts or not run.config else "Nothing has been logged yet."
    if metrics.parsed < metrics.lines:
        return (
            f"Curves show {metrics.parsed:,} of the {metrics.lines:,} lines of metrics.jsonl: evenly spread ones, and "
            "evaluations."
        )
    return f"Curves show all {metrics.lines:,} lines of metrics.jsonl."
