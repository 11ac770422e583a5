r"""Rows of the verifiable math data sets as {"question", "answer"}: a text to ask and the answer to compare with.

* openai/gsm8k, configuration main: `question`, `answer`; the answer is what follows "####", without thousands' commas.
* lighteval/MATH, and its mirrors DigitalLearningGmbH/MATH-lighteval, EleutherAI/hendrycks_math,
  hendrycks/competition_math and HuggingFaceH4/MATH-500: `problem`, `solution` (with `level`, and `type` or `subject`,
  which are not read); the answer is the last balanced \boxed{…}.

A row whose solution has no answer to extract is left out and counted as `no_answer`.
"""

from collections.abc import Callable

from qwen3f.data.sources.adapters.answers import after_hashes, last_boxed
from qwen3f.data.sources.adapters.rows import LeftOut, Row, text_of

Query = dict[str, str]


def gsm8k(row: Row) -> Query:
    """Question and number. Raises RowFault, LeftOut."""
    return _query(text_of(row, "question"), after_hashes(text_of(row, "answer")))


def math(row: Row) -> Query:
    """Problem and boxed answer. Raises RowFault, LeftOut."""
    return _query(text_of(row, "problem"), last_boxed(text_of(row, "solution")))


def _query(question: str, answer: str | None) -> Query:
    if answer is None:
        raise LeftOut("no_answer")
    return {"question": question, "answer": answer}


ADAPTERS: dict[str, Callable[[Row], Query]] = {"gsm8k": gsm8k, "math": math}

DEFAULT = "gsm8k,math"
