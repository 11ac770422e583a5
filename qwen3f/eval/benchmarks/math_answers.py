r"""Final answers of MATH: found, normalised and compared as Minerva does (arXiv:2206.14858, appendix D).

The form is that of the harness 0.4.13 (lm_eval/tasks/minerva_math/utils.py, version 3.1), with its repairs: unit words
are removed before blanks are, \left keeps its "ft", and commas are removed only between thousands.
"""

import contextlib
import importlib.metadata
import re
import signal
import threading
from collections.abc import Iterator
from functools import partial

from qwen3f.errors import UserError

SECONDS = 5  # for sympy to decide
ANTLR = "4.11"  # the only one that sympy's LaTeX parser works with

_SAID = "Final Answer: The final answer is"
_CLOSED = re.compile("(.*?). I hope it is correct.")
_NONE = "[invalidanswer]"
_UNIT_WORDS = """square ways integers dollars mph inches ft hours km units sue points feet minutes digits cents degrees
cm gm pounds meters meals edges students childrentickets multiples"""
_UNITS = _UNIT_WORDS.split()
# In Minerva's order, in which the units stand among the other texts.
_REMOVED = [
    *_UNITS[:10], r"\ldots", *_UNITS[10:],
    r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}",
    r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots",
]  # fmt: skip
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text"),
    (r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}"),
)  # fmt: skip
# Where the closing sign is missing, the rest of the line is matched without a group and stays: so no part of a text is
# searched again and again.
_SHORTHAND = tuple(
    (re.compile(pattern, re.MULTILINE), after)
    for pattern, after in (
        (r"^(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),
        (r"\\text\{(?:(.*?)\}|.*)", r"\1"),
        (r"\\textbf\{(?:(.*?)\}|.*)", r"\1"),
        (r"\\overline\{(?:(.*?)\}|.*)", r"\1"),
        (r"\\boxed\{(?:(.*)\}|.*)", r"\1"),
        (r"(frac)([^{])(.)", r"frac{\2}{\3}"),
        (r"(sqrt)(\[[^\]]*\])(\w)|sqrt\[[^\]]*\]?", r"\1\2{\3}"),
        (r"(sqrt)(?!\[)([^{])", r"sqrt{\2}"),
    )
)


def boxed(solution: str) -> str | None:
    r"""The content of the last \boxed{…}, else of the last \fbox{…}; after "\boxed " the text up to a dollar sign.

    None if there is none of these.

    The harness stops at \fbox{…}, which no solution of MATH has alone; here it counts.
    """
    if r"\boxed " in solution:
        return solution.rpartition(r"\boxed ")[2].partition("$")[0]
    start = solution.rfind(r"\boxed") if r"\boxed" in solution else solution.rfind(r"\fbox")
    if start < 0:
        return None
    depth, opened = 0, 0
    for place in range(start, len(solution)):
        if solution[place] == "{":
            depth, opened = depth + 1, opened or place + 1
        elif solution[place] == "}":
            depth -= 1
            if depth == 0:
                return solution[opened:place]
    return None


def final_answer(text: str) -> str:
    """The answer in the closing sentence, as it stands; without that sentence _NONE, which equals no answer."""
    for line in f"{text}I hope it is correct.".split("\n"):
        closed = _CLOSED.match(line.partition(_SAID)[2])
        if closed:
            return closed[1].strip()
    return _NONE


def normalised(answer: str) -> str:
    answer = answer.rpartition("=")[2]
    for unit in _UNITS:
        answer = re.sub(rf"(?<!\\)\b{unit}\b", "", answer)
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for removed in _REMOVED:
        answer = _outside_commands(answer, removed) if removed in _UNITS else answer.replace(removed, "")
    for pattern, after in _SHORTHAND:
        answer = pattern.sub(partial(_shortened, after), answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer) else answer


def equal(given: str, gold: str) -> bool:
    """Whether two normalised answers are the same text, or differ by what sympy simplifies to 0 within SECONDS."""
    if given and given == gold:
        return True
    check_packages()
    import sympy
    from sympy.parsing.latex import parse_latex

    try:
        with time_limit(SECONDS):
            return bool(sympy.simplify(parse_latex(given) - parse_latex(gold)) == 0)
    except Exception:  # sympy raises whatever its parts do for text that is no formula: not equal, as in the harness
        return False


def verified(solution: str, answer: str) -> bool:
    """Whether math_verify finds the solution's answer in `answer`."""
    check_packages()
    import math_verify

    return bool(math_verify.verify(gold=math_verify.parse(solution), target=math_verify.parse(answer)))


def check_packages() -> None:
    """Raises UserError if a package for comparing answers is missing, or sympy's parser would fail on all of them."""
    try:
        importlib.metadata.version("math-verify")
        found = importlib.metadata.version("antlr4-python3-runtime")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"math needs packages that are not installed; {_INSTALL}") from error
    if not found.startswith(ANTLR):
        raise UserError(
            f"math needs antlr4-python3-runtime {ANTLR}, which sympy reads LaTeX by, not {found}; {_INSTALL}"
        )


_INSTALL = "write pip install 'math-verify==0.9.0' 'antlr4-python3-runtime==4.11.0'"


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the block after `seconds`. Only in the main thread: signals interrupt no other."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("answers of math are judged in the main thread, which can be interrupted")

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _shortened(after: str, found: re.Match[str]) -> str:
    """What replaces a match of _SHORTHAND; the match itself where its closing sign is missing."""
    return found.expand(after) if found.lastindex else found[0]


def _outside_commands(answer: str, word: str) -> str:
    """The answer without `word`, except where it is a part of a LaTeX command's name."""
    parts = re.split(r"(\\[a-zA-Z]+)", answer)
    return "".join(part if i % 2 else part.replace(word, "") for i, part in enumerate(parts))
