"""ChartQA (Masry et al. 2022, arXiv:2203.10244): questions about charts, by people and made from their captions.

Source: lmms-lab-encoder/ChartQA, split test (2,500 rows). Columns: type (human_test or augmented_test), question,
answer, image. Prompt: the question, and how to answer. Metric: relaxed accuracy: a number within 5% of the right one,
"12%" being 0.12; any other text equal but for capitals. A right answer of 0 is a text: nothing is within 5% of it.
"""

from collections.abc import Sequence

from qwen3f.data.sources.adapters.rows import Row, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Generation, Item, Shots

ASKED = "\nAnswer the question with a single word."
TOLERANCE = 0.05


def read(row: Row) -> Item:
    prompt = text_of(row, "question") + ASKED
    return Item(row.name, prompt, text_of(row, "answer"), group=text_of(row, "type"), image=row.values["image"])


def score(item: Item, answers: Sequence[str]) -> dict[str, float]:
    given, gold = _number(answers[0]), _number(item.gold)
    if given is not None and gold:
        return {"relaxed_accuracy": float(abs(given - gold) / abs(gold) <= TOLERANCE)}
    return {"relaxed_accuracy": float(answers[0].lower() == item.gold.lower())}


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


CHARTQA = Benchmark(
    name="chartqa",
    hub_id="lmms-lab-encoder/ChartQA",
    columns=("type", "question", "answer", "image"),
    read=read,
    metrics=("relaxed_accuracy",),
    shots=Shots(most=0),
    generation=Generation(max_new_tokens=16),
    score=score,
    vision=True,
)
