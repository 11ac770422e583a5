"""The meaning of logged names, for readers who see them for the first time. A new metric is a line in metrics.tsv."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Better = Literal["higher", "lower", ""]


@dataclasses.dataclass(frozen=True)
class Meaning:
    """title: short name. meaning: a sentence. unit: of the values; "share": values in 0 … 1, shown as percent."""

    title: str
    meaning: str
    unit: str = ""
    better: Better = ""


def _read() -> dict[str, Meaning]:
    lines = (Path(__file__).parent / "metrics.tsv").read_text().splitlines()[1:]
    cells = (line.split("\t") for line in lines)
    return {name: Meaning(title, meaning, *(x.strip("-") for x in few)) for name, title, *few, meaning in cells}


METRICS = _read()  # by name; "STAGE:NAME" if a name has another meaning in a stage
MODES = {"thinking": "thinking first", "plain": "at once"}


def find(name: str, stage: str = "") -> Meaning | None:
    """The meaning of a logged name, or None if it is unknown. A "/GROUP" or "_MODE" in the name goes to its title."""
    base, _, group = name.partition("/")
    if base.startswith("bench_"):
        return dataclasses.replace(METRICS["bench"], title=f"{base.removeprefix('bench_')}: {group}")
    mode = ""
    if (known := _known(base, stage)) is None:
        base, _, mode = base.rpartition("_")
        if mode not in MODES:
            return None
        if (known := _known(base, stage)) is None:  # a benchmark, whatever its name
            known = dataclasses.replace(METRICS["answered"], title=f"{METRICS['answered'].title}, {base}")
    title = ", ".join(filter(None, (known.title, MODES.get(mode), group)))
    return dataclasses.replace(known, title=title)


def _known(base: str, stage: str) -> Meaning | None:
    return METRICS.get(f"{stage}:{base}") or METRICS.get(base)


def plain(name: object) -> str:
    """The name as a text that can be encoded; characters that cannot, such as lone surrogates, become "?"."""
    return str(name).encode(errors="replace").decode()


PURPOSES = {
    "sft": "Fine-tuning: the model learns to answer questions from worked examples.",
    "reward_model": "A reward model: it learns to score answers from pairs of a better and a worse one.",
    "dpo": "Preference training: of two answers to a question the better one becomes likelier.",
    "dpo_online": "Online preference training: the model learns from the best and the worst of its own answers.",
    "grpo": "Reinforcement learning: the model tries each question several times and learns from what was right.",
    "multimodal": "Training on pictures: the model learns to answer questions about images.",
}


def purpose_of(config: Mapping[str, Any]) -> str:
    """The purpose of a run, in a sentence."""
    kind = str(config.get("stage", ""))
    if kind == "pretrain":
        begun = "continues to learn" if config.get("init_from") else "learns"
        return f"Pretraining: the model {begun} to predict the next token of text."
    return PURPOSES.get(kind, f"A custom stage: {kind}." if kind else "A training run.")
