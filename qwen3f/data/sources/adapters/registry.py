"""The data sets by name: Hub id, columns, and where their files lie.

A name may be written as the short one or the Hub's ("gsm8k", "openai/gsm8k"), and with a local copy after it
("gsm8k@DIR"). A mixture lists several with weights: "fineweb=0.7,slimpajama@DIR=0.3".
"""

import difflib
from dataclasses import dataclass, replace

from qwen3f.data.mixture import parse_weights
from qwen3f.errors import UserError
from qwen3f.files import user_path


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hub.

    Attributes:
        name: the short name.
        hub_id: "owner/name" on the Hub.
        use: the stage that reads it: pretrain, sft, grpo, dpo or multimodal.
        columns: the columns that its adapter needs.
        optional: columns that its adapter reads where they are.
        split: the split that training reads.
        config: the configuration on the Hub, "" for the only one.
        folder: where that configuration's files lie in the repository; a local copy may have it or lack it.
        files: glob of the files to read where the Hub's own list cannot be used: the repository has a loading script
            (never run here), or files that repeat each other. A local copy reads the files that match, or all files if
            none does.
    """

    name: str
    hub_id: str
    use: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    split: str = "train"
    config: str = ""
    folder: str = ""
    files: str = ""


DATASETS = (
    HubDataset("fineweb", "HuggingFaceFW/fineweb", "pretrain", ("text",), config="sample-10BT", folder="sample/10BT"),
    HubDataset("slimpajama", "cerebras/SlimPajama-627B", "pretrain", ("text",)),
    HubDataset("open-web-math", "open-web-math/open-web-math", "pretrain", ("text",)),
    # Its third subset, open-web-math, is the data set above.
    HubDataset(
        "proof-pile-2-arxiv",
        "EleutherAI/proof-pile-2",
        "pretrain",
        ("text",),
        folder="arxiv",
        files="arxiv/train/*.jsonl.zst",
    ),
    HubDataset(
        "proof-pile-2-algebraic-stack",
        "EleutherAI/proof-pile-2",
        "pretrain",
        ("text",),
        folder="algebraic-stack",
        files="algebraic-stack/train/*.jsonl.zst",
    ),
    HubDataset("pg19", "emozilla/pg19", "pretrain", ("text",)),
    HubDataset(
        "openmathinstruct-2",
        "nvidia/OpenMathInstruct-2",
        "sft",
        ("problem", "generated_solution", "expected_answer"),
    ),
    HubDataset("numinamath-cot", "AI-MO/NuminaMath-CoT", "sft", ("problem", "solution")),
    HubDataset("ultrachat", "HuggingFaceH4/ultrachat_200k", "sft", ("messages",), split="train_sft"),
    HubDataset(
        "openhermes-2.5",
        "teknium/OpenHermes-2.5",
        "sft",
        ("conversations",),
        optional=("system_prompt",),
        files="openhermes2_5.json",
    ),
    HubDataset("gsm8k", "openai/gsm8k", "grpo", ("question", "answer"), config="main", folder="main"),
    HubDataset("math", "lighteval/MATH", "grpo", ("problem", "solution")),
    HubDataset("ultrafeedback", "openbmb/UltraFeedback", "dpo", ("instruction", "completions")),
    HubDataset(
        "llava-instruct-150k",
        "liuhaotian/LLaVA-Instruct-150K",
        "multimodal",
        ("image", "conversations"),
        files="llava_instruct_150k.json",
    ),
)

# Other copies on the Hub with the same columns (some more), by Hub id.
_MIRRORS = {
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "EleutherAI/hendrycks_math": "math",
    "hendrycks/competition_math": "math",
    "HuggingFaceH4/MATH-500": "math",
}


@dataclass(frozen=True)
class Part:
    """One data set of a mixture: the local copy ("" for the Hub) and its weight."""

    dataset: HubDataset
    root: str
    weight: float = 1.0


def names(use: str = "") -> list[str]:
    """Short names of all data sets, or of those of one use."""
    return [dataset.name for dataset in DATASETS if use in ("", dataset.use)]


def find(name: str, use: str = "") -> HubDataset:
    """The data set of a short name or a Hub id; a mirror's id gives the data set with that id.

    Raises:
        UserError: there is none (a near miss is suggested), there are several, or it is for another use.
    """
    wanted = _MIRRORS.get(name, name).lower()
    found = [dataset for dataset in DATASETS if wanted in (dataset.name, dataset.hub_id.lower())]
    if len(found) > 1:
        raise UserError(f"{name!r} has several parts: write one of {', '.join(dataset.name for dataset in found)}.")
    if found and use not in ("", found[0].use):
        raise UserError(f"The data set {name!r} is for {found[0].use}, not {use}: write one of {_listed(use)}.")
    if found:
        return replace(found[0], hub_id=name) if name in _MIRRORS else found[0]
    known = {key.lower(): key for key in (*names(use), *(d.hub_id for d in DATASETS if use in ("", d.use)))}
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {known[near[0]]!r}?" if near else f"write one of {_listed(use)}."
    raise UserError(f"Unknown data set {name!r}: {hint}")


def parse_mixture(mixture: str, root: str = "", use: str = "") -> list[Part]:
    """The parts of "name[@DIR][=weight],…".

    Args:
        mixture: as above; a weight that is not written is 1.
        root: directory of the local copies: each is its subdirectory of the short name. A single data set may also
            be the directory itself. A part with a directory of its own does not look at it.
        use: the stage that reads them, "" for any.

    Raises:
        UserError: unknown name, one named twice, or a weight that is not a positive number.
    """
    if not mixture.strip():
        raise UserError(_unclear(mixture, use))
    parts = []
    weights = parse_weights(mixture)
    for spec, weight in weights:
        name, at, directory = spec.partition("@")
        if at and not directory:
            raise UserError(f"{spec!r} names no directory after the @: write {name}@DIR.")
        dataset = find(name, use)
        if not at and root:
            own = user_path(root, "config.data.root") / dataset.name
            directory = str(own) if len(weights) > 1 or own.is_dir() else root
        parts.append(Part(dataset, directory, weight))
    if len({part.dataset.name for part in parts}) < len(parts):  # one by two of its names
        raise UserError(_unclear(mixture, use))
    return parts


def _unclear(mixture: str, use: str) -> str:
    return f"The mixture {mixture!r} must name one or more different data sets: {_listed(use)}."


def _listed(use: str) -> str:
    return ", ".join(names(use))
