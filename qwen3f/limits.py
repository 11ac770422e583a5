"""Limits on sizes in files, checked before the work begins: a file of a few kilobytes can ask for hours and all memory.

Each limit is far above the needs of real data. An environment variable can raise it for all processes of a run.
"""

import os
from dataclasses import dataclass

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError


@dataclass(frozen=True)
class Limit:
    """The largest number that is allowed: the environment variable's, else `default`."""

    variable: str
    default: int

    def value(self) -> int:
        """The limit. Raises UserError if the environment variable is not a positive integer."""
        text = os.environ.get(self.variable, "") or str(self.default)
        if not text.isdecimal() or len(text) > 18 or int(text) < 1:
            raise UserError(f"the environment variable {self.variable} is {text!r}: write a positive integer")
        return int(text)

    def exceeded(self, unit: str) -> str:
        """The end of an error message: the limit, and how to raise it."""
        return f"over the limit of {self.value():,} {unit}; if you trust the file, set {self.variable} higher"


FILE_BYTES = Limit("QWEN3F_MAX_FILE_BYTES", 2**26)
"""Size of a file that is read whole: JSON, a tokenizer. The index of the largest Qwen3 has 4 MB, its tokenizer 11."""

RESULTS_BYTES = Limit("QWEN3F_MAX_RESULTS_BYTES", 2**31)
"""Size of an evaluation's results with all prompts. Those of MMLU with five examples have about 70 MB."""

ROW_BYTES = Limit("QWEN3F_MAX_ROW_BYTES", 2**26)
"""Size of one decompressed row of a data set. A book has one or two MB."""

EXPANSION = Limit("QWEN3F_MAX_EXPANSION", 250)
"""Largest ratio of decompressed to compressed size of a file of rows. Text has 5 to 20."""

EXPANSION_BYTES = 2**28
"""Decompressed size from which EXPANSION is checked."""

PIXELS = Limit("QWEN3F_MAX_PIXELS", 2**26)
"""Pixels of an image: 8,192 × 8,192, which take 192 MiB."""

MODEL_TENSORS = Limit("QWEN3F_MAX_MODEL_TENSORS", 2**18)
"""Layers times experts, and layers of a vision tower. Qwen3-235B-A22B has 12,032, Qwen3-VL's towers have 24 or 27."""

MODEL_PARAMETERS = Limit("QWEN3F_MAX_MODEL_PARAMETERS", 2**44)


COLDEST, HOTTEST = 1e-3, 1e3
"""Temperatures that answers to train on may have. Below, they would all be the same, and the loss, which divides by the
temperature, would overflow."""


def check_layers(cfg: ModelConfig, where: str) -> None:
    """Raises UserError for a model with more than MODEL_TENSORS tensors. where: name of the model, for the error."""
    counts = {"num_hidden_layers × num_experts": cfg.num_hidden_layers * max(1, cfg.num_experts)}
    if cfg.vision_enabled:
        counts["vision_num_hidden_layers"] = cfg.vision_num_hidden_layers
    for name, tensors in counts.items():
        if tensors > MODEL_TENSORS.value():
            raise UserError(f"{where}: {name} is {tensors:,}, {MODEL_TENSORS.exceeded('tensors')}")
