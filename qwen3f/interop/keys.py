"""Where each Hugging Face tensor lives in our parameter tree.

Ours are stacked: a leaf [L, …] holds a kind of layer, an expert leaf [L, E, …] its experts too. Theirs are apart:
`model.layers.3.mlp.experts.5.up_proj.weight`. Derived from the parameter table, so a new parameter needs no line here.
"""

import re
from typing import NamedTuple

from qwen3f.config import ModelConfig
from qwen3f.params import EMBED, HEAD, abstract_params

_EXPERTS = "mlp.experts."
# Buffers that old versions of transformers stored; they follow from the config.
_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class Slot(NamedTuple):
    """One Hugging Face tensor of ours: params[path][index], of `shape`."""

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


def slots(cfg: ModelConfig) -> dict[str, Slot]:
    """Hugging Face key -> its place, layer by layer in the order of the forward pass, experts in theirs."""
    table = abstract_params(cfg)
    before, after = {EMBED: Slot(EMBED, (), table.pop(EMBED).shape)}, {}
    by_layer: list[dict[str, Slot]] = [{} for _ in range(cfg.num_hidden_layers)]
    for path, spec in table.items():
        if spec.layers is None:
            after[path] = Slot(path, (), spec.shape)
            continue
        stack, name = spec.stack, path.removeprefix(spec.stack)
        for row, layer in enumerate(spec.layers):
            if name.startswith(_EXPERTS):
                rest = name.removeprefix(_EXPERTS)
                for expert in range(cfg.num_experts):
                    key = f"{stack}{layer}.{_EXPERTS}{expert}.{rest}"
                    by_layer[layer][key] = Slot(path, (row, expert), spec.shape[2:])
            else:
                by_layer[layer][f"{stack}{layer}.{name}"] = Slot(path, (row,), spec.shape[1:])
    return {key: slot for part in (before, *by_layer, after) for key, slot in part.items()}


def count(cfg: ModelConfig) -> int:
    """How many keys `slots` has, without making them."""
    table = abstract_params(cfg)
    return sum(
        len(spec.layers or ("",)) * (cfg.num_experts if path.removeprefix(spec.stack).startswith(_EXPERTS) else 1)
        for path, spec in table.items()
    )


def is_ignored(cfg: ModelConfig, key: str) -> bool:
    """Whether a stored tensor has no place of its own: a buffer of old files, or a tied head beside the embedding."""
    return bool(_BUFFER.fullmatch(key)) or is_tied_head(cfg, key)


def is_tied_head(cfg: ModelConfig, key: str) -> bool:
    return cfg.tie_word_embeddings and key == HEAD
