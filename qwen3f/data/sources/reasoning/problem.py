"""One generated problem: a pure function of its kind, difficulty, seed and index."""

from collections.abc import Callable
from dataclasses import dataclass

from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning import algebra, arithmetic, digits, letters, logic, number_theory, sequences, stories
from qwen3f.data.sources.reasoning.draft import Draft
from qwen3f.errors import UserError

_MAKERS: dict[str, Callable[[Draws, int], Draft]] = {
    "arithmetic": arithmetic.make,
    "algebra": algebra.make,
    "number_theory": number_theory.make,
    "logic": logic.make,
    "word_problem": stories.make,
    "sequence": sequences.make,
    "letters": letters.make,
    "sorting": digits.make_sorting,
    "addition": digits.make_addition,
    "multiplication": digits.make_multiplication,
}

KINDS = ("arithmetic", "algebra", "number_theory", "logic", "word_problem", "sequence")
"""The kinds of the family `reasoning`."""

PROCEDURES = ("letters", "sorting", "addition", "multiplication")
"""The kinds of the family `procedures`: steps that are easy one by one, and an answer that nobody guesses."""

FAMILIES = {"reasoning": KINDS, "procedures": PROCEDURES}
"""Family -> its kinds. A family is the name of a source and of a task."""

DIFFICULTIES = (1, 2, 3, 4, 5)
"""All difficulties; a higher one takes more steps."""


@dataclass(frozen=True)
class Problem:
    r"""A question with a worked solution.

    Attributes:
        question: the text of the question; complete in itself.
        solution: lines of a derivation (`draft.py` says how they are written), then "The answer is \boxed{…}."
        answer: what the box holds: an integer, a fraction a/b in lowest terms with b > 1, or a word; of procedures a
            row of letters or numbers with blanks between.
        kind: one of FAMILIES.
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
        raise UserError(f"Unknown kind of problem {kind!r}; there are {', '.join(_MAKERS)}: write one of these.")
    if difficulty not in DIFFICULTIES:
        raise UserError(f"There is no difficulty {difficulty!r} of {kind} problems: write a number from 1 to 5.")
    question, steps, answer = _MAKERS[kind](Draws("reasoning", kind, difficulty, seed, index), difficulty)
    solution = "\n".join([*steps, f"The answer is \\boxed{{{answer}}}."])
    return Problem(question, solution, str(answer), kind, difficulty)
