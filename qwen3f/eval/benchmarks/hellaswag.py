"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which of four endings continues a scene.

Source: Rowan/hellaswag, split validation (10,042 rows), examples from train. Columns: ctx_a, ctx_b, endings (4 texts),
activity_label, label ("0" to "3"). Prompt: the label, a colon, the scene; WikiHow's marks are taken out. Metrics:
acc_norm, acc.
"""

import re

from qwen3f.data.sources.adapters.rows import Row, check_text, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Item, Shots, integer, texts


def read(row: Row) -> Item:
    first, second = (check_text(row.values[name], row.name, name, may_be_empty=True) for name in ("ctx_a", "ctx_b"))
    endings = tuple(map(cleaned, texts(row, "endings", row.values["endings"])))
    prompt = cleaned(f"{text_of(row, 'activity_label')}: {first} {second.capitalize()}")
    answer = integer(row, "label", len(endings))
    return Item(row.name, prompt, answer, (prompt, endings[answer]), choices=endings)


def cleaned(text: str) -> str:
    """The text without WikiHow's "[title]" and other brackets; in one pass, each two blanks become one."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


HELLASWAG = Benchmark(
    name="hellaswag",
    hub_id="Rowan/hellaswag",
    columns=("ctx_a", "ctx_b", "endings", "activity_label", "label"),
    split="validation",
    shots=Shots(spare=1),
    read=read,
    metrics=("acc_norm", "acc"),
)
