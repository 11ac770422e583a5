"""Two models on the same questions: python -m qwen3f.eval.compare A/results.json B/results.json

Prints, for each metric that both have, B's mean less A's with its interval, McNemar's p, and which questions changed.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3f.errors import UserError
from qwen3f.eval.records import is_metrics
from qwen3f.eval.statistics import Paired, paired
from qwen3f.limits import RESULTS_BYTES
from qwen3f.strict_json import read_object

SHOWN = 20  # questions that changed, of each kind
_QUESTION = ("group", "question", "gold")
_SAMPLE = (*_QUESTION, "number", "name", "metrics")


@dataclasses.dataclass(frozen=True)
class Compared:
    """A metric of a benchmark: the comparison, and the numbers of questions that B answers better, and worse."""

    all: Paired
    better: tuple[int, ...]
    worse: tuple[int, ...]


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[tuple[str, str], Compared]:
    """(benchmark, metric) -> the comparison, for each metric that both have.

    a, b: as in results.json; their examples, form and settings may differ. Questions are paired by their number in the
    whole benchmark, and only those that both were asked count. Raises UserError if there are none, if a number means
    different questions in a and b (another group, text or right answer), or if the metrics are defined differently.
    """
    out: dict[tuple[str, str], Compared] = {}
    for name in sorted(a["benchmarks"].keys() & b["benchmarks"].keys()):
        first, second = ({r["number"]: r for r in x["benchmarks"][name]["samples"]} for x in (a, b))
        defined = [x["benchmarks"][name].get("settings", {}).get("metrics") for x in (a, b)]
        if defined[0] != defined[1]:
            raise UserError(
                f"{name} has the metrics of {defined[0]} in A and of {defined[1]} in B; ask one again with the other's "
                "--config.metrics"
            )
        both = sorted(first.keys() & second.keys())
        for number in both:
            if any(first[number][key] != second[number][key] for key in _QUESTION):
                raise UserError(
                    f"question {number} of {name} is another one in B ({second[number]['name']}) than in A "
                    f"({first[number]['name']}); compare runs on the same data"
                )
        have = [set(record[number]["metrics"]) for record in (first, second) for number in both]
        for metric in sorted(set.intersection(*have)) if have else ():
            values = [[record[n]["metrics"][metric] for n in both] for record in (first, second)]
            better = tuple(n for n, x, y in zip(both, *values) if y > x)
            worse = tuple(n for n, x, y in zip(both, *values) if y < x)
            out[name, metric] = Compared(paired(*values), better, worse)
    if not out:
        raise UserError("the two results have no benchmark and question in common; compare others")
    return out


def described(found: Mapping[tuple[str, str], Compared]) -> str:
    """Markdown: a row for each metric, then the questions that changed."""
    lines = ["| benchmark | metric | B − A, points | 95% interval | better | worse | questions | p |"]
    lines.append("|---|---|---:|---|---:|---:|---:|---:|")
    changed = []
    for (name, metric), compared in found.items():
        one = compared.all
        difference, low, high = (f"{100 * x:+.2f}" for x in (one.difference, one.low, one.high))
        row = (name, metric, difference, f"{low} … {high}", one.better, one.worse, f"{one.n:,}", f"{one.p:.3g}")
        lines.append(f"| {' | '.join(map(str, row))} |")
        for word, numbers in (("better", compared.better), ("worse", compared.worse)):
            if numbers:
                more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
                changed.append(f"- {name} {metric}, {word}: {', '.join(map(str, numbers[:SHOWN]))}{more}")
    return "\n".join([*lines, "", *changed]) + "\n"


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2:
        raise UserError("write python -m qwen3f.eval.compare A/results.json B/results.json")
    a, b = (_read(argument) for argument in arguments)
    print(described(compare(a, b)), end="")


def _read(argument: str) -> dict[str, Any]:
    path = Path(argument)
    if path.is_dir():
        raise UserError(f"{path} is a directory; write {path / 'results.json'}")
    if not path.exists():
        raise UserError(f"there is no file {path}; name the results.json of an evaluation")
    results = read_object(path, RESULTS_BYTES)
    try:
        found = results["benchmarks"].values()
        whole = all(
            record.keys() >= set(_SAMPLE) and type(record["number"]) is int and is_metrics(record["metrics"])
            for x in found
            for record in x["samples"]
        )
        whole = whole and all(len({one["number"] for one in x["samples"]}) == len(x["samples"]) for x in found)
        whole = whole and all(isinstance(x.get("settings", {}), dict) for x in found)
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{argument} holds no results as they are written here: name the results.json of an evaluation")
    return results


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
