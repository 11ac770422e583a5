"""An evaluation's results as a table, with the settings that decide the numbers."""

from collections.abc import Mapping
from typing import Any


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for each metric of each benchmark, then the settings of each. results: as in results.json."""
    lines = ["| benchmark | metric | % | 95% interval | questions |", "|---|---|---:|---|---:|"]
    for name, found in results["benchmarks"].items():
        for metric, one in found["metrics"].items():
            value, low, high = (100 * one[key] for key in ("value", "low", "high"))
            lines.append(f"| {name} | {metric} | {value:.2f} | {low:.2f} – {high:.2f} | {one['n']:,} |")
    lines += ["", f"Model: {results['model']}, {results['dtype']}.", ""]
    lines += [f"- {name}: {settings(found)}" for name, found in results["benchmarks"].items()]
    return "\n".join(lines) + "\n"


def settings(found: Mapping[str, Any]) -> str:
    """What decided a benchmark's numbers, and what was unusual, in words."""
    s = found["settings"]
    form = "raw prompt"
    if s["prompt"] == "chat":
        form = f"chat prompt, thinking {'on' if s['thinking'] else 'off'}"
        if not s["max_new_tokens"]:
            form = "chat prompt, choices at the answer's start without a thinking block"
    parts = [f"{s['shots']} shots", form, f"{s['split']} of {s['source']}"]
    if s["limit"]:
        parts.append(f"the first {s['limit']} questions of each subject")
    if s["max_new_tokens"]:
        drawn = f"temperature {s['temperature']:g}, {s['samples']} samples" if s["temperature"] else "greedy"
        parts += [f"at most {s['max_new_tokens']} new tokens, {drawn}"]
        parts.append(f"{found['ended']:,} of {found['answers']:,} answers ended")
    if "max_pixels" in s:
        parts.append(f"pictures of {s['min_pixels']:,} to {s['max_pixels']:,} pixels")
    parts.append(f"metrics of {s['metrics']}")
    for count, words in (
        (found["truncated"], "prompts cut on the left"),
        (found["alike"], "questions with equal choices"),
    ):
        if count:
            parts.append(f"{count:,} {words}")
    return ", ".join(parts)
