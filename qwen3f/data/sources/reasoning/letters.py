"""Letters: a row of letters put through steps, one after the other; each step's result is a line of the working.

The working can be made from the question alone (`working`), so a derivation is checked line by line. An answer is a row
of at least three letters, which nobody guesses; the shortest kind of question has more than 10⁷ different ones.
"""

import re
import string
from collections.abc import Callable

from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning.draft import Draft

_QUESTION = re.compile(r"Take the letters ([a-z](?: [a-z])*), then (.+)\.")
_ALPHABET = string.ascii_lowercase

# step, its number as #: what it does with a row of letters and that number
_STEPS: dict[str, Callable[[str, int], str]] = {
    "reverse": lambda row, n: row[::-1],
    "shift by #": lambda row, n: "".join(_ALPHABET[(_ALPHABET.index(letter) + n) % 26] for letter in row),
    "rotate by #": lambda row, n: row[n:] + row[:n],
    "swap pairs": lambda row, n: "".join(row[i : i + 2][::-1] for i in range(0, len(row), 2)),
    "drop letter #": lambda row, n: row[: n - 1] + row[n:],
    "double letter #": lambda row, n: row[:n] + row[n - 1 :],
    "sort": lambda row, n: "".join(sorted(row)),
}
_EASY = ("reverse", "shift by #", "rotate by #", "swap pairs", "drop letter #", "double letter #")
_SIZES = ((5, 1), (5, 2), (6, 3), (8, 4), (10, 5))  # letters and steps by difficulty


def make(draws: Draws, difficulty: int) -> Draft:
    """From 5 letters and 1 step to 10 letters and 5 steps; from difficulty 3 on a step may be "sort"."""
    length, count = _SIZES[difficulty - 1]
    names = _EASY if difficulty <= 2 else tuple(_STEPS)
    row = " ".join(draws.choice(_ALPHABET) for _ in range(length))
    steps, last = [], ""
    for _ in range(count):
        last = draws.choice(
            [name for name in names if name != last]
        )  # twice the same step may undo itself, or be one step
        steps.append(last.replace("#", str(draws.between(1, 3))))
    question = f"Take the letters {row}, then {', '.join(steps)}."
    lines = working(question)
    return Draft(question, lines, lines[-1].partition(": ")[2])


def working(question: str) -> list[str] | None:
    """The lines of the derivation, such as "reverse: c b a"; None for a text that is no question of this kind."""
    found = _QUESTION.fullmatch(question)
    if not found:
        return None
    row, lines = found[1].replace(" ", ""), []
    for step in found[2].split(", "):
        number = re.search(r"\d", step)
        name = re.sub(r"\d", "#", step)
        if name not in _STEPS:
            return None
        row = _STEPS[name](row, int(number[0]) if number else 0)
        lines.append(f"{step}: {' '.join(row)}")
    return lines
