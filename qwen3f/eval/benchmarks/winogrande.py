"""WinoGrande (Sakaguchi et al. 2020, arXiv:1907.10641): which of two names fills a sentence's gap.

Source: allenai/winogrande, configuration winogrande_xl, split validation (1,267 rows), examples from train. Columns:
sentence (with one "_"), option1, option2, answer ("1" or "2"). Prompt: the sentence up to the gap with an option in it;
what is scored is the sentence's rest, the same after both. Metric: acc.
"""

from qwen3f.data.sources.adapters.rows import Row, RowFault, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Item, Shots


def read(row: Row) -> Item:
    before, gap, after = text_of(row, "sentence").partition("_")
    if not gap or not after.strip():
        raise RowFault("invalid_rows", f"{row.name} has no '_' with a text after it under 'sentence': write one.")
    options = text_of(row, "option1"), text_of(row, "option2")
    answer = str(row.values["answer"])
    if answer not in ("1", "2"):
        raise RowFault("invalid_rows", f"{row.name} has {answer!r} under 'answer': write 1 or 2.")
    prompts, ending = tuple(before + option for option in options), after.strip()
    gold = int(answer) - 1
    return Item(row.name, prompts, gold, (prompts[gold], ending), choices=options, continuations=(ending, ending))


WINOGRANDE = Benchmark(
    name="winogrande",
    hub_id="allenai/winogrande",
    configs=("winogrande_xl",),
    folder="winogrande_xl",
    columns=("sentence", "option1", "option2", "answer"),
    split="validation",
    shots=Shots(spare=1),
    read=read,
    metrics=("acc",),
)
