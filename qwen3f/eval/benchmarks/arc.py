"""ARC-Challenge (Clark et al. 2018, arXiv:1803.05457): science questions of three to five choices.

Source: allenai/ai2_arc, configuration ARC-Challenge, split test (1,172 rows), examples from train. Columns: question,
choices {text, label}, answerKey (a label: a letter or a digit). Prompt: "Question: …", "Answer:". Metrics: acc_norm,
acc.
"""

from collections.abc import Mapping

from qwen3f.data.sources.adapters.rows import Row, RowFault, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Item, texts


def read(row: Row) -> Item:
    choices = row.values["choices"]
    if not isinstance(choices, Mapping) or {"text", "label"} - choices.keys():
        raise RowFault("invalid_rows", f"{row.name} has no 'text' and 'label' under 'choices': write both lists.")
    options, labels = texts(row, "choices.text", choices["text"]), texts(row, "choices.label", choices["label"])
    key = text_of(row, "answerKey")
    if key not in labels or len(labels) != len(options):
        raise RowFault("invalid_rows", f"{row.name} has the answer {key!r}, labels {labels}: write one of the labels.")
    answer = labels.index(key)
    prompt = f"Question: {text_of(row, 'question')}\nAnswer:"
    return Item(row.name, prompt, answer, (prompt, options[answer]), choices=options)


ARC_CHALLENGE = Benchmark(
    name="arc_challenge",
    hub_id="allenai/ai2_arc",
    configs=("ARC-Challenge",),
    folder="ARC-Challenge",
    columns=("question", "choices", "answerKey"),
    read=read,
    metrics=("acc_norm", "acc"),
)
