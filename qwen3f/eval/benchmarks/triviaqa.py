"""TriviaQA (Joshi et al. 2017, arXiv:1705.03551), without documents: questions with the many names of an answer.

Source: mandarjoshi/trivia_qa, configuration rc.nocontext, split validation (17,944 rows), examples from train. Columns:
question, answer {aliases, …}. Prompt: "Question: …?", "Answer:" (a question mark is added even if there is one).
Metric: equality with any alias, small letters, without ASCII punctuation; articles stay, unlike in the official script.
"""

import string
from collections.abc import Mapping, Sequence

from qwen3f.data.sources.adapters.rows import Row, RowFault, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Generation, Item, Shots, texts

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def read(row: Row) -> Item:
    answer = row.values["answer"]
    if not isinstance(answer, Mapping) or "aliases" not in answer:
        raise RowFault("invalid_rows", f"{row.name} has no 'aliases' under 'answer': write a list of texts.")
    aliases = texts(row, "answer.aliases", answer["aliases"], 1)
    prompt = f"Question: {text_of(row, 'question')}?\nAnswer:"
    return Item(row.name, prompt, aliases, (prompt, aliases[0]))


def score(item: Item, answers: Sequence[str]) -> dict[str, float]:
    (given,) = _plain([answers[0].strip()])
    return {"exact_match": float(given in _plain(item.gold))}


def _plain(texts: Sequence[str]) -> list[str]:
    # The harness compares numpy strings: these drop NUL characters at their end, and lower() does not make them longer
    # than the longest of the texts, which cuts a text with "İ", whose lower case has two characters.
    room = max(map(len, texts))
    return [text.rstrip("\0").lower()[:room].translate(_PUNCTUATION).rstrip("\0") for text in texts]


TRIVIAQA = Benchmark(
    name="triviaqa",
    hub_id="mandarjoshi/trivia_qa",
    configs=("rc.nocontext",),
    folder="rc.nocontext",
    columns=("question", "answer"),
    split="validation",
    shots=Shots(spare=1),
    read=read,
    metrics=("exact_match",),
    generation=Generation(until=("\n", ".", ",")),
    score=score,
)
