"""Two models on the same questions: python -m qwen3f.eval.compare A/results.json B/results.json

Prints, for each metric that both have, B's mean less A's with its interval, McNemar's p, and which questions changed.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3f.errors import UserError
from qwen3f.eval.statistics import Paired, paired
from qwen3f.strict_json import read_object

SHOWN = 20  # questions that changed, of each kind


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, tuple[Paired, list[int], list[int]]]]:
    """benchmark -> metric -> (the comparison, numbers of questions that B answers better, and worse).

    a, b: as in results.json. Only questions that both were asked count. Raises UserError where there are none, and
    where a question of one number was another text.
    """
    out: dict[str, dict[str, tuple[Paired, list[int], list[int]]]] = {}
    for name in a["benchmarks"].keys() & b["benchmarks"].keys():
        first, second = ({r["number"]: r for r in x["benchmarks"][name]["samples"]} for x in (a, b))
        both = sorted(first.keys() & second.keys())
        for number in both:
            if (one := first[number]["prompt"]) != (other := second[number]["prompt"]):
                raise UserError(
                    f"question {number} of {name} was not the same, {str(one)[-60:]!r} in A, {str(other)[-60:]!r} in B; "
                    "compare runs with the same shots, prompts and data"
                )
        metrics = (
            sorted(set.intersection(*(set(r["metrics"]) for n in both for r in (first[n], second[n])))) if both else []
        )
        for metric in metrics:
            values = [[x[n]["metrics"][metric] for n in both] for x in (first, second)]
            better = [n for n, x, y in zip(both, *values) if y > x]
            worse = [n for n, x, y in zip(both, *values) if y < x]
            out.setdefault(name, {})[metric] = (paired(*values), better, worse)
    if not out:
        raise UserError("the two results have no benchmark and question in common; compare others")
    return dict(sorted(out.items()))


def described(found: Mapping[str, Mapping[str, tuple[Paired, list[int], list[int]]]]) -> str:
    """Markdown: a row for each metric, then the questions that changed."""
    lines = ["| benchmark | metric | B − A, points | 95% interval | better | worse | questions | p |"]
    lines.append("|---|---|---:|---|---:|---:|---:|---:|")
    changed = []
    for name, metrics in found.items():
        for metric, (one, better, worse) in metrics.items():
            points = [f"{100 * x:+.2f}" for x in (one.difference, one.low, one.high)]
            row = (
                name,
                metric,
                points[0],
                f"{points[1]} … {points[2]}",
                one.better,
                one.worse,
                f"{one.n:,}",
                f"{one.p:.3g}",
            )
            lines.append(f"| {' | '.join(map(str, row))} |")
            for word, numbers in (("better", better), ("worse", worse)):
                if numbers:
                    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
                    changed.append(f"- {name} {metric}, {word}: {', '.join(map(str, numbers[:SHOWN]))}{more}")
    return "\n".join([*lines, "", *changed]) + "\n"


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2:
        raise UserError("write python -m qwen3f.eval.compare A/results.json B/results.json")
    a, b = (read_object(Path(argument)) for argument in arguments)
    for argument, results in zip(arguments, (a, b)):
        if "benchmarks" not in results:
            raise UserError(f"{argument} holds no results: name the results.json of an evaluation")
    print(described(compare(a, b)), end="")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
