"""Measures of a stage's checkpoint: held-out results that the stage logged, and answers to the shared questions, which
experiments/eval.py asks in its own process."""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen3f import usage
from qwen3f.errors import UserError
from qwen3f.finite import as_finite
from qwen3f.pipeline.chain import Step

Measure = dict[str, float | None]
FOLDER = "measures"  # in a stage's workdir
MODES = ("thinking", "plain")
_SETTINGS = "settings.json"  # beside the answers
_RECORDS = "records"  # in a mode's folder, written by qwen3f.eval.records
# config.stage -> {logged name: name of the measure}, for the logged results that show what the stage is for.
_LOGGED = {
    "pretrain": {"val_loss": "val_loss"},
    "multimodal": {name: name for name in ("val_exact", "val_blind", "val_majority")},
    "dpo": {"val_accuracy": "dpo:val_accuracy"},
    "dpo_online": {"val_wins": "dpo_online:val_wins"},
    "reward_model": {"val_accuracy": "reward_model:val_accuracy"},
}


def logged(step: Step, workdir: Path) -> dict[str, Measure]:
    """The stage's logged measures at its last evaluation in metrics.jsonl.

    Losses are by source, such as "val_loss/embedded": only these can be compared between stages. The value is None if
    it was not finite.
    """
    names, last = _LOGGED.get(step.config.stage, {}), dict[str, float | None]()
    for line in (workdir / "metrics.jsonl").read_text().split("\n") if names else ():
        with contextlib.suppress(ValueError, TypeError):  # a killed process may have left half a line
            last |= json.loads(line)
    if "val_loss" not in names:
        return {measure: _of(last[name]) for name, measure in names.items() if name in last}
    losses = {key: value for key, value in last.items() if key.startswith("val_loss/")}
    if not losses and "val_loss" in last:  # of one source
        losses = {f"val_loss/{step.config.data.mixture}": last["val_loss"]}
    short = {key: key.partition("@")[0] for key in losses}  # without the directory, if the name stays unique
    return {short[key] if list(short.values()).count(short[key]) == 1 else key: _of(x) for key, x in losses.items()}


def answered(folder: Path) -> dict[str, Measure]:
    """Measures from the results.json of both modes: "reasoning_thinking" is the first metric of the benchmark
    reasoning, with thinking. Raises FileNotFoundError if a file does not exist yet."""
    return {f"{name}_{mode}": one for mode in MODES for name, one in _answers(folder / mode).items()}


def has_answers(folder: Path) -> bool:
    """Whether the folder of a mode has a readable results.json, which is written once all questions are answered."""
    try:
        return bool(_answers(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def is_answered(folder: Path, settings: Mapping[str, Any], known: Mapping[str, Measure]) -> bool:
    """Whether the answers in `folder` belong to the present questions, and the known measures include them. Missing or
    damaged files count as no answers."""
    try:
        asked = (folder / _SETTINGS).read_text() == _text(settings)
    except (OSError, ValueError):
        return False
    return asked and all(has_answers(folder / mode) for mode in MODES) and answered(folder).items() <= known.items()


def clear_other(folder: Path, settings: Mapping[str, Any]) -> None:
    """Remove answers to other questions, or with other settings, than `settings`; write `settings` to the folder."""
    path, text = folder / _SETTINGS, _text(settings)
    if folder.is_dir() and (not path.is_file() or path.read_text() != text):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def clear_unfit(folder: Path, config: ConfigDict, place: str) -> None:
    """Remove the records of a stopped mode if they cannot be resumed: the checkpoint had another path (the pipeline's
    directory was renamed) or other weights, or the device used another dtype.

    config: of experiments/eval.py. place: of the weights.
    """
    heads = [_head(path) for path in (folder / _RECORDS).glob("*.jsonl")]
    if not heads:
        return
    from qwen3f.interop import source  # imports torch
    from qwen3f.train.choices import find_device, find_dtype

    try:
        dtype = str(find_dtype(config.dtype, find_device(config.device))).removeprefix("torch.")
        model = source.pinned(place)
        weights = source.weights_digest(place) if any("weights" in head for head in heads) else ""
    except UserError:  # the command that asks the questions will report it
        return
    for head in heads:
        same_weights = weights.startswith(str(head.get("weights", "")))
        if head.get("model") != model or head.get("dtype") != dtype or not same_weights:
            shutil.rmtree(folder / _RECORDS)
            return


def settings_of(config: Any) -> dict[str, Any]:
    return {key: value for key, value in usage.flat(config) if key not in ("device", "init_from")}


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True, default=str)


def _answers(folder: Path) -> dict[str, Measure]:
    """The measures of one mode, by benchmark."""
    out = {}
    for name, one in json.loads((folder / "results.json").read_text())["benchmarks"].items():
        metric = next(iter(one["metrics"].values()), {})
        out[name] = {key: _finite(metric[key]) for key in ("value", "low", "high", "n")}
    return out


def _head(path: Path) -> dict[str, Any]:
    """The first line of a file of records, which has everything that they depend on; {} if it cannot be read."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _of(value: float | None) -> Measure:
    return {"value": _finite(value), "low": None, "high": None, "n": None}


def _finite(value: float | None) -> float | None:
    """The value, or None if it is not finite: JSON has only finite numbers."""
    return None if as_finite(value) is None else value
