"""TextVQA (Singh et al. 2019, arXiv:1904.08920): questions about text in photographs, each answered by ten people.

Source: lmms-lab-encoder/textvqa, split validation (5,000 rows). Columns: question, image, answers (ten texts). Prompt:
the question with one capital at its beginning, and how to answer; no OCR tokens. Metric: soft accuracy.
"""

from collections.abc import Sequence

from qwen3f.data.sources.adapters.rows import Row, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Generation, Item, Shots, texts
from qwen3f.eval.benchmarks.vqa_answers import normalised, one_line, soft_accuracy, words_first
from qwen3f.eval.benchmarks.vqav2 import ASKED


def read(row: Row) -> Item:
    prompt = text_of(row, "question").capitalize() + ASKED
    return Item(row.name, prompt, texts(row, "answers", row.values["answers"]), image=row.values["image"])


def score(item: Item, answers: Sequence[str]) -> dict[str, float]:
    given = [_plain(text) for text in item.gold]
    others = [[j for j in range(len(given)) if j != i] for i in range(len(given))]
    return {"accuracy": soft_accuracy(_plain(answers[0]), given, others)}


def _plain(text: str) -> str:
    return normalised(one_line(words_first(text)))


TEXTVQA = Benchmark(
    name="textvqa",
    hub_id="lmms-lab-encoder/textvqa",
    columns=("question", "image", "answers"),
    split="validation",
    read=read,
    metrics=("accuracy",),
    shots=Shots(most=0),
    generation=Generation(until=("ASSISTANT:",)),
    score=score,
    vision=True,
)
