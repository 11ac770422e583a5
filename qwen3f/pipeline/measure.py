"""What a stage's checkpoint can do: the held-out loss that it logged, and the shared questions, asked by
experiments/eval.py in a process of its own."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3f import usage
from qwen3f.pipeline.chain import Step

Measure = dict[str, float | None]
FOLDER = "measures"  # in a stage's workdir
MODES = ("thinking", "plain")
_SETTINGS = "settings.json"  # beside the answers
# Logged by evaluations of a stage: those that say what it is for.
_LOGGED = {"pretrain": ("val_loss",), "multimodal": ("val_exact", "val_blind", "val_majority")}


def logged(step: Step, workdir: Path) -> dict[str, Measure]:
    """Of the last evaluation in metrics.jsonl. Losses by source, "val_loss/embedded": only those can be compared."""
    names, last = _LOGGED.get(step.config.stage, ()), dict[str, float]()
    for line in (workdir / "metrics.jsonl").read_text().splitlines() if names else ():
        last |= json.loads(line)
    if "val_loss" not in names:
        return {name: _of(last[name]) for name in names if name in last}
    losses = {key: value for key, value in last.items() if key.startswith("val_loss/")}
    if not losses and "val_loss" in last:  # of one source
        losses = {f"val_loss/{step.config.data.mixture}": last["val_loss"]}
    short = {key: key.partition("@")[0] for key in losses}  # without a directory, where that names it
    return {short[key] if list(short.values()).count(short[key]) == 1 else key: _of(x) for key, x in losses.items()}


def answered(folder: Path) -> dict[str, Measure]:
    """Of both modes' results.json: "reasoning_thinking" for the benchmark reasoning, by its first metric. Raises
    FileNotFoundError where one is not there yet."""
    out = {}
    for mode in MODES:
        results = json.loads((folder / mode / "results.json").read_text())
        for name, one in results["benchmarks"].items():
            metric = next(iter(one["metrics"].values()))
            out[f"{name}_{mode}"] = {key: metric[key] for key in ("value", "low", "high", "n")}
    return out


def is_answered(folder: Path, settings: Mapping[str, Any], known: Mapping[str, Measure]) -> bool:
    """Whether the answers in `folder` are to today's questions, and among the measures that are known. Files that are
    missing or damaged hold no answers."""
    try:
        return (folder / _SETTINGS).read_text() == _text(settings) and answered(folder).items() <= known.items()
    except (OSError, ValueError, LookupError, TypeError):
        return False


def clear_other(folder: Path, settings: Mapping[str, Any]) -> None:
    """Remove answers that were given to other questions or by other rules than `settings`; keep settings beside
    them."""
    path, text = folder / _SETTINGS, _text(settings)
    if folder.is_dir() and (not path.is_file() or path.read_text() != text):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def settings_of(config: Any) -> dict[str, Any]:
    return {key: value for key, value in usage.flat(config) if key not in ("device", "init_from")}


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True, default=str)


def _of(value: float) -> Measure:
    return {"value": value, "low": None, "high": None, "n": None}
