"""One generated problem: a pure function of its kind, difficulty, seed and index."""

from collections.abc import Callable
from dataclasses import dataclass

from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning import algebra, arithmetic, logic, number_theory, sequences, stories
from qwen3f.data.sources.reasoning.draft import Draft
from qwen3f.errors import UserError

_MAKERS: dict[str, Callable[[Draws, int], Draft]] = {
    "arithmetic": arithmetic.make,
    "algebra": algebra.make,
    "number_theory": number_theory.make,
    "logic": logic.make,
    "word_problem": stories.make,
    "sequence": sequences.make,
}

KINDS = tuple(_MAKERS)
"""All kinds of problems."""

DIFFICULTIES = (1, 2, 3, 4, 5)
"""All difficulties; a higher one takes more steps."""


@dataclass(frozen=True)
class Problem:
    r"""A question with a worked solution.

    Attributes:
        question: the text of the question; complete in itself.
        solution: lines of a derivation (`draft.py` says how they are written), then "The answer is \boxed{…}."
        answer: what the box holds: an integer, a fraction a/b in lowest terms with b > 1, or a word.
        kind: one of KINDS.
        difficulty: one of DIFFICULTIES.
    """

    question: str
    solution: str
    answer: str
    kind: str
    difficulty: int


def problem(kind: str, difficulty: int, seed: int, index: int) -> Problem:
    """The problem number `index` of a kind, a difficulty and a seed; the same in every process and on every machine.

    Different indices may give the same question, most often at difficulty 1, where few exist: `ReasoningSource` drops
    repetitions.

    Raises:
        UserError: unknown kind or difficulty.
    """
    if kind not in _MAKERS:
        raise UserError(f"Unknown kind of problem {kind!r}; there are {', '.join(KINDS)}: write one of these.")
    if difficulty not in DIFFICULTIES:
        raise UserError(f"There is no difficulty {difficulty!r} of {kind} problems: write a number from 1 to 5.")
    question, steps, answer = _MAKERS[kind](Draws("reasoning", kind, difficulty, seed, index), difficulty)
    solution = "\n".join([*steps, f"The answer is \\boxed{{{answer}}}."])
    return Problem(question, solution, str(answer), kind, difficulty)
