"""VQAv2 (Goyal et al. 2017, arXiv:1612.00837): questions about photographs, each answered by ten people.

Source: lmms-lab-encoder/VQAv2, split validation. Columns: question_id, question, image, answers (ten records with
`answer`, and `answer_id`, by which people are told apart). Prompt: the question, and how to answer. Metric: soft
accuracy, all texts normalised. The official script normalises only where people disagree: metrics=official.
"""

from collections.abc import Mapping, Sequence

from qwen3f.data.sources.adapters.rows import Row, RowFault, list_of_dicts, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Generation, Item, Shots
from qwen3f.eval.benchmarks.vqa_answers import normalised, one_line, soft_accuracy

ASKED = "\nAnswer the question using a single word or phrase."


def read(row: Row) -> Item:
    people = tuple(list_of_dicts(row, "answers"))
    if not all(isinstance(person.get("answer"), str) for person in people):
        raise RowFault("invalid_rows", f"{row.name} has a record without 'answer' under 'answers': write a text.")
    return Item(row.name, text_of(row, "question") + ASKED, people, image=row.values["image"])


def score(item: Item, answers: Sequence[str]) -> dict[str, float]:
    """As lmms-eval: people whose records are equal, their answers normalised, are left out together."""
    people = [{**person, "answer": normalised(one_line(person["answer"]))} for person in item.gold]
    return {"accuracy": _accuracy(people, normalised(one_line(answers[0])))}


def official(item: Item, answers: Sequence[str]) -> dict[str, float]:
    """As the authors' vqaEval.py: texts are normalised only where people disagree."""
    given = one_line(answers[0])
    people = [{**person, "answer": one_line(person["answer"])} for person in item.gold]
    if len({person["answer"] for person in people}) > 1:
        given, people = normalised(given), [{**person, "answer": normalised(person["answer"])} for person in people]
    return {"accuracy": _accuracy(people, given)}


def _accuracy(people: Sequence[Mapping[str, object]], given: str) -> float:
    others = [[j for j, other in enumerate(people) if other != person] for person in people]
    return soft_accuracy(given, [str(person["answer"]) for person in people], others)


VQAV2 = Benchmark(
    name="vqav2",
    hub_id="lmms-lab-encoder/VQAv2",
    columns=("question_id", "question", "image", "answers"),
    split="validation",
    read=read,
    metrics=("accuracy",),
    shots=Shots(most=0),
    generation=Generation(max_new_tokens=16),
    score=score,
    official=official,
    vision=True,
)
