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
# Logged by evaluations of a stage: those that say what it is for.
_LOGGED = {"pretrain": ("val_loss",), "multimodal": ("val_exact", "val_blind", "val_majority")}


def logged(step: Step, workdir: Path) -> dict[str, Measure]:
    """Of the last evaluation in metrics.jsonl. Losses by source, "val_loss/embedded": only those can be compared."""
    names, found = _LOGGED.get(step.config.stage, ()), dict[str, Measure]()
    if not names:
        return found
    last: dict[str, float] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    if "val_loss" in names and not any(key.startswith("val_loss/") for key in last):  # of one source
        source = step.config.data.mixture.partition("@")[0].partition("=")[0]
        last = {f"val_loss/{source}": value for key, value in last.items() if key == "val_loss"}
    for key, value in last.items():
        if key.startswith("val_loss/") if "val_loss" in names else key in names:
            found[key] = _of(value)
    return found


def answered(place: Path, mode: str) -> dict[str, Measure]:
    """Of an evaluation's results.json: "reasoning_thinking" for the benchmark reasoning, by its first metric."""
    results = json.loads((place / "results.json").read_text())
    return {
        f"{name}_{mode}": {key: next(iter(one["metrics"].values()))[key] for key in ("value", "low", "high", "n")}
        for name, one in results["benchmarks"].items()
    }


def clear_other(folder: Path, settings: Mapping[str, Any]) -> None:
    """Remove answers that were given to other questions or by other rules than `settings`; keep settings beside
    them."""
    path, text = folder / "settings.json", json.dumps(dict(settings), sort_keys=True, default=str)
    if folder.is_dir() and (not path.is_file() or path.read_text() != text):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def settings_of(config: Any) -> dict[str, Any]:
    return {key: value for key, value in usage.flat(config) if key not in ("device", "init_from")}


def _of(value: float) -> Measure:
    return {"value": value, "low": None, "high": None, "n": None}
