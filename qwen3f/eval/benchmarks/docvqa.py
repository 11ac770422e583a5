"""DocVQA (Mathew et al. 2021, arXiv:2007.00398): questions about scanned documents.

Source: lmms-lab-encoder/DocVQA, configuration DocVQA, split validation (5,349 rows). Columns: questionId, question,
image, answers (texts). Prompt: the question, and how to answer. Metric: ANLS (Biten et al. 2019, arXiv:1905.13648):
1 − edits / the longer text's length, for the right answer that is nearest; 0 below a half. In the paper it is 0 at a
half too: metrics=official.
"""

from collections.abc import Sequence

from qwen3f.data.sources.adapters.rows import Row, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Generation, Item, Shots, texts
from qwen3f.eval.benchmarks.vqav2 import ASKED

THRESHOLD = 0.5


def read(row: Row) -> Item:
    answers = texts(row, "answers", row.values["answers"], 1)
    return Item(row.name, text_of(row, "question") + ASKED, answers, image=row.values["image"])


def score(item: Item, answers: Sequence[str]) -> dict[str, float]:
    value = similarity(answers[0], item.gold)
    return {"anls": value if value >= THRESHOLD else 0.0}


def official(item: Item, answers: Sequence[str]) -> dict[str, float]:
    value = similarity(answers[0], item.gold)
    return {"anls": value if value > THRESHOLD else 0.0}


def similarity(given: str, gold: Sequence[str]) -> float:
    """1 − the least share of edits. Texts are compared in small letters with single blanks, but measured as written."""
    shares = []
    for answer in gold:
        length = max(len(answer.upper()), len(given.upper()))
        shares.append(edits(_plain(answer), _plain(given)) / length if length else 0.0)
    return 1 - min(shares)


def edits(a: str, b: str) -> int:
    """Levenshtein's distance: letters to insert, delete or replace."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
        before = row
    return before[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


DOCVQA = Benchmark(
    name="docvqa",
    hub_id="lmms-lab-encoder/DocVQA",
    configs=("DocVQA",),
    folder="DocVQA",
    columns=("questionId", "question", "image", "answers"),
    split="validation",
    read=read,
    metrics=("anls",),
    shots=Shots(most=0),
    generation=Generation(max_new_tokens=32),
    score=score,
    official=official,
    vision=True,
)
