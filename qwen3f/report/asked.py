"""Questions to a finished model and its answers: results.json of evaluations, and held-out pictures of a pipeline."""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen3f.errors import UserError
from qwen3f.eval.last_query import last_query
from qwen3f.files import is_file, read_bounded
from qwen3f.strict_json import read_object

RESULTS, QUESTIONS, MEASURES = "results.json", "questions.json", "measures"
MODES = ("thinking", "plain")
_MOST_PICTURE = 2**17  # bytes of a picture, at most


def read_asked(workdir: Path) -> tuple[Mapping[str, Any], ...]:
    """A line for each answer, as in answers/, from every mode in the workdir or its measures/. Files that cannot be
    read are left out: pipeline.json has the numbers too."""
    lines: list[Mapping[str, Any]] = []
    for folder in (workdir, workdir / MEASURES):
        for mode in MODES:
            if is_file(folder / mode / RESULTS):
                lines += _of_results(folder / mode / RESULTS, mode)
    return tuple(lines)


def read_pictures(workdir: Path) -> tuple[Mapping[str, Any], ...]:
    """A line for each question about a picture, with the model's answer, as in answers/."""
    return tuple(_of_pictures(workdir)) if is_file(workdir / QUESTIONS) else ()


def results_table(workdir: Path) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """("BENCHMARK, METRIC, MODE", {"value", "low", "high", "n"}) for each result in the workdir of an evaluation."""
    rows = []
    for place, mode in ((workdir, ""), *((workdir / mode, mode) for mode in MODES)):
        if is_file(place / RESULTS):
            for name, found in _benchmarks(place / RESULTS):
                metrics = found.get("metrics")
                for metric, one in metrics.items() if isinstance(metrics, dict) else ():
                    if isinstance(one, dict):
                        rows.append((", ".join(filter(None, (str(name), str(metric), mode))), one))
    return tuple(rows)


def _benchmarks(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        found = read_object(path).get("benchmarks")
    except (UserError, OSError):
        return []
    pairs = found.items() if isinstance(found, dict) else ()
    return [(str(name), one) for name, one in pairs if isinstance(one, dict)]


def _of_results(path: Path, mode: str) -> Iterator[Mapping[str, Any]]:
    for name, found in _benchmarks(path):
        samples = found.get("samples")
        for one in samples if isinstance(samples, list) else ():
            outputs, metrics = (one.get("outputs"), one.get("metrics")) if isinstance(one, dict) else (None, None)
            if not (isinstance(outputs, list) and outputs and isinstance(metrics, dict)):
                continue
            ended = one.get("ended")
            yield {
                "evaluation": name,
                "mode": mode,
                "number": one.get("number"),
                "prompt": last_query(str(one.get("prompt", ""))),
                "gold": str(one.get("gold", "")),
                "text": str(outputs[0]),
                "mark": next(iter(metrics.values()), None),
                "ended": bool(ended[0]) if isinstance(ended, list) and ended else True,
            }


def _of_pictures(workdir: Path) -> Iterator[Mapping[str, Any]]:
    try:
        rows = json.loads(read_bounded(workdir / QUESTIONS))
    except (OSError, UserError, ValueError, RecursionError):
        return
    for number, row in enumerate(rows if isinstance(rows, list) else ()):
        try:
            picture = (workdir / row["picture"]).resolve()
            inside = picture.is_relative_to(workdir.resolve()) and picture.suffix == ".png"
            if not inside or picture.stat().st_size > _MOST_PICTURE:
                continue
            lines = read_bounded(workdir / f"{number}.jsonl").strip(b"\n").split(b"\n")
            said = json.loads(lines[-1].decode(errors="replace"))
            text = str(said["answer"])
            uri = "data:image/png;base64," + base64.b64encode(read_bounded(picture)).decode()
            right = " ".join(text.split()).rstrip(".").lower() == " ".join(str(row["gold"]).split()).rstrip(".").lower()
            yield {"evaluation": "pictures", "mode": "plain", "number": number, "prompt": str(row["prompt"]),
                   "gold": str(row["gold"]), "text": text, "mark": float(right), "pictures": [uri]}  # fmt: skip
        except (OSError, UserError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            continue
