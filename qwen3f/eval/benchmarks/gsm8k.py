"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school problems with a number for an answer.

Source: openai/gsm8k, configuration main, split test (1,319 rows), 5 examples drawn from train. Columns: question,
answer (a solution that ends in "#### 42"). Prompt: "Question: …", "Answer:". Metrics: the first number after "####"
(strict), the last number at all (flexible), each equal to the solution's without commas, dollar signs and a full stop
at the end.
"""

import re
from collections.abc import Sequence

from qwen3f.data.sources.adapters.rows import Row, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Generation, Item, Shots

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s)\A.*#### ", r"\.$")
_NONE = "[invalid]"


def read(row: Row) -> Item:
    prompt, answer = f"Question: {text_of(row, 'question')}\nAnswer:", text_of(row, "answer")
    return Item(row.name, prompt, answer, (prompt, answer))


def score(item: Item, answers: Sequence[str]) -> dict[str, float]:
    text, gold = answers[0], _plain(item.gold)
    strict, flexible = _STRICT.search(text), [number or digits for number, digits in _FLEXIBLE.findall(text)]
    found = (strict[1].strip() if strict else _NONE), (flexible[-1].strip() if flexible else _NONE)
    return {name: float(_plain(x) == gold) for name, x in zip(("exact_match_strict", "exact_match_flexible"), found)}


def _plain(answer: str) -> str:
    for pattern in _IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


GSM8K = Benchmark(
    name="gsm8k",
    hub_id="openai/gsm8k",
    configs=("main",),
    folder="main",
    columns=("question", "answer"),
    read=read,
    metrics=("exact_match_strict", "exact_match_flexible"),
    shots=Shots(5),
    generation=Generation(until=("Question:", "</s>", "<|im_end|>")),
    score=score,
)
