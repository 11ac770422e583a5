"""The task `code`: small generated programming problems, whose answer is a function that is run in the sandbox.

A problem is a pipeline of one to three steps over a list of integers or a word, said in words; its tests are calls with
the results that the steps give. A problem whose tests have few different answers is left out: a constant must not pass
for code.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwen3f.data.sources.documents import HOLDOUT, Split, distinct
from qwen3f.sandbox.confined import LIMITS, Limits
from qwen3f.sandbox.run import Case, run_tests
from qwen3f.tasks.answer_text import after_thinking
from qwen3f.tasks.fences import program
from qwen3f.tasks.task import Question

NUM_PROBLEMS = 8_192
CASES = 8
DIFFERENT = 5  # at least this many results of a problem's cases differ
LONGEST_CODE = 20_000  # characters; a longer answer is wrong


class Step(NamedTuple):
    """A step of a problem. words: what the question says, such as "keep …". run: what the step computes."""

    words: str
    run: Callable[[Any], Any]


_LISTS: tuple[Callable[[int], Step], ...] = (
    lambda n: Step(f"keep the numbers that {n + 1} divides", lambda xs: [x for x in xs if x % (n + 1) == 0]),
    lambda n: Step(f"keep the numbers greater than {n}", lambda xs: [x for x in xs if x > n]),
    lambda n: Step(f"add {n} to each number", lambda xs: [x + n for x in xs]),
    lambda n: Step(f"multiply each number by {n}", lambda xs: [x * n for x in xs]),
    lambda n: Step(f"drop the first {n} numbers", lambda xs: xs[n:]),
    lambda n: Step("square each number", lambda xs: [x * x for x in xs]),
    lambda n: Step("reverse the order", lambda xs: xs[::-1]),
    lambda n: Step("sort the numbers, the smallest first", sorted),
    lambda n: Step("drop every number that came before", lambda xs: list(dict.fromkeys(xs))),
    lambda n: Step(
        "replace each number by the sum of all up to it", lambda xs: [sum(xs[: i + 1]) for i in range(len(xs))]
    ),
)
_ENDS: tuple[Callable[[int], Step], ...] = (
    lambda n: Step("return the sum of the numbers", sum),
    lambda n: Step("return how many numbers there are", len),
    lambda n: Step("return the largest number, or 0 if there is none", lambda xs: max(xs, default=0)),
    lambda n: Step(f"return the number of those that are odd, times {n}", lambda xs: n * sum(x % 2 for x in xs)),
    lambda n: Step("return the list", lambda xs: xs),
)
_WORDS: tuple[Callable[[int], Step], ...] = (
    lambda n: Step("reverse the text", lambda s: s[::-1]),
    lambda n: Step("make all letters capital", str.upper),
    lambda n: Step(f"repeat the text {n} times", lambda s: s * n),
    lambda n: Step(f"move the first {n} characters to the end", lambda s: s[n:] + s[:n]),
    lambda n: Step("drop all vowels (a, e, i, o, u)", lambda s: "".join(c for c in s if c.lower() not in "aeiou")),
    lambda n: Step("sort its characters", lambda s: "".join(sorted(s))),
    lambda n: Step(f"keep every character whose index {n + 1} divides, counted from 0", lambda s: s[:: n + 1]),
    lambda n: Step("double each character", lambda s: "".join(c + c for c in s)),
)
_TEXT_ENDS: tuple[Callable[[int], Step], ...] = (
    lambda n: Step("return the text", lambda s: s),
    lambda n: Step("return its length", len),
    lambda n: Step("return how many different characters it has", lambda s: len(set(s))),
)


@dataclass(frozen=True)
class CodeTask:
    """Generated programming problems; a hash of the question decides what is held out, as in every stage.

    Attributes:
        seed: other seeds give other problems; a question stays in its split.
        num_problems: problems generated, both splits together and before any is dropped.
        limits: what the sandbox allows for one answer.
    """

    seed: int = 0
    num_problems: int = NUM_PROBLEMS
    limits: Limits = LIMITS
    name: str = "code"

    def questions(self, split: Split) -> Iterator[Question]:
        """As in `Task`, each question once."""
        made = filter(None, (problem(self.seed, index) for index in range(self.num_problems)))
        yield from distinct(made, lambda question: question.prompt.encode(), split, HOLDOUT, None, "repeated_questions")

    def judge(self, answer_text: str, gold: str) -> float:
        """1.0 if the function that the answer defines passes all tests of `gold` in the sandbox; else 0.0.

        Raises UserError where there is no sandbox.
        """
        tests = json.loads(gold)
        code = code_of(answer_text, tests["entry_point"])
        if code is None:
            return 0.0
        cases = [Case(arguments, expected) for arguments, expected in tests["cases"]]
        return float(run_tests(code, cases, tests["entry_point"], self.limits).passed)


def code_of(answer_text: str, name: str) -> str | None:
    """The block of Python in the answer that defines `name` (fences.program), or the whole answer if it has no block;
    None if there is no answer, or if it is longer than LONGEST_CODE."""
    answer = after_thinking(answer_text)
    if answer is None or len(answer) > LONGEST_CODE:
        return None
    block = program(answer, name)
    return (answer if block is None else block).strip() or None


def problem(seed: int, index: int) -> Question | None:
    """Problem number `index`; None if its tests have too few different results, so that a constant could pass most.

    gold is JSON: {"entry_point", "cases": [[arguments, expected], …]}.
    """
    draw = random.Random(f"code {seed} {index}")
    texts = index % 2 == 1
    middle, ends = (_WORDS, _TEXT_ENDS) if texts else (_LISTS, _ENDS)
    number = draw.randint(1, 3)
    steps = [draw.choice(middle)(draw.randint(2, 5)) for _ in range(number)] + [draw.choice(ends)(draw.randint(2, 5))]
    what = "a text s" if texts else "a list of integers xs"
    name, argument = ("solve", "s") if texts else ("solve", "xs")
    said = "; then ".join(step.words for step in steps)
    prompt = f"Write a Python function {name}({argument}) of {what}: {said}. Answer with the code in a ```python block."
    cases = []
    for place in range(CASES):
        given = _text(draw, place) if texts else _numbers(draw, place)
        value = given
        for step in steps:
            value = step.run(value)
        cases.append([[given], value])
    if len({json.dumps(expected) for _, expected in cases}) < DIFFERENT:
        return None
    gold = json.dumps({"entry_point": name, "cases": cases})
    return Question(prompt, gold, ("texts" if texts else "lists", f"{number} steps"))


def _numbers(draw: random.Random, place: int) -> list[int]:
    return [draw.randint(-9, 20) for _ in range(place * 2)]


def _text(draw: random.Random, place: int) -> str:
    return "".join(draw.choice("abcdefgioutxyz ") for _ in range(place * 3))
