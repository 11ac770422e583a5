"""The table at the end of a pipeline: a row for each measure of a stage, before and after it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen3f import usage
from qwen3f.pipeline.chain import Step, checkpoint_of
from qwen3f.pipeline.measure import MODES
from qwen3f.pipeline.record import Record, StageRecord

_WORDS = {
    "val_exact": "pictures right",
    "val_blind": "with other pictures",
    "val_majority": "commonest answer",
    "dpo:val_accuracy": "held-out pairs ranked right",
    "dpo_online:val_wins": "answers better than before it",
    "reward_model:val_accuracy": "held-out pairs ranked right",
}


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def lines(record: Record) -> list[str]:
    """The lines of the table."""
    rows = [("stage", "measure", "before", "after", "time")]
    for stage in record.stages:
        before = record.stage(stage.start).measures if stage.start else {}
        name, took = stage.name, duration(stage.seconds)
        if stage.status != "done":
            rows.append((name, stage.status, "", "", ""))
            continue
        for measure, after in stage.measures.items():
            rows.append((name, word(measure), say(measure, before.get(measure)), say(measure, after), took))
            name = took = ""
        if name:
            rows.append((name, "", "", "", took))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    total = duration(sum(stage.seconds for stage in record.stages))
    budget = f" of a budget of {duration(record.budget_s)}" if record.budget_s else ""
    return [text[0], "  ".join("-" * width for width in widths), *text[1:], f"all stages: {total}{budget}"]


def word(measure: str) -> str:
    """The name of a measure in the table."""
    benchmark, _, mode = measure.rpartition("_")
    if mode in MODES:
        return f"{benchmark} right, {mode}"
    return _WORDS.get(measure, measure.replace("val_loss/", "held-out loss, "))


def over_budget(record: Record) -> list[str]:
    """A line for each stage that took longer than its budget."""
    slow = [one for one in record.stages if one.status == "done" and one.budget_s and one.seconds > one.budget_s]
    return [f"{one.name} took {duration(one.seconds)}, more than its budget of {one.budget_s} s" for one in slow]


def say(name: str, measure: Mapping[str, float | None] | None) -> str:
    """A share in percent with its 95% interval, or a loss. measure: None if there is none."""
    if measure is None:
        return "-"
    if measure["value"] is None:  # a loss that was NaN, or infinite
        return "no number"
    if name.startswith("val_loss"):
        return f"{measure['value']:.3f}"
    if measure["low"] is None:
        return f"{100 * measure['value']:.1f}%"
    low, high = (100 * measure[key] for key in ("low", "high"))
    return f"{100 * measure['value']:.1f}% ({low:.1f} to {high:.1f} of {measure['n']})"


def next_commands(steps: Sequence[Step], record: Record, directory: Path) -> list[str]:
    """Commands that use the last model."""
    trained = [record.stage(step.name) for step in steps if not step.skipped and step.kind == "training"]
    if not trained or trained[-1].status != "done":
        return []
    last: StageRecord = trained[-1]
    place = shlex.quote(str(directory / checkpoint_of(last)))
    stage = next(step for step in steps if step.name == last.name).config.stage
    generate = f"  python {shlex.quote(usage.launcher())} --config experiments/generate.py --config.init_from={place}"
    if stage == "multimodal":
        return ["what next:", f'{generate} --config.images=a.png --config.prompt="What is in the picture?"']
    if stage == "pretrain":
        return ["what next:", f'{generate} --config.chat=False --config.prompt="import "']
    return ["what next:", f'{generate} --config.prompt="What is 17 + 25?"', f"{generate}   # a chat"]
