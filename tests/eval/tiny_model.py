"""A model of two layers with the small tokenizer, whose weights are a function of the seed on every machine."""

import torch

from qwen3f import params, presets
from qwen3f.interop import hf
from tests.stages.toy_chats import SMALL, small_tokenizer

NEW_TOKENS = 12
# As many ids as the tokenizer has: we never generate an id beyond those, but the harness would.
CFG = presets.get("nano").replace(**{**SMALL, "vocab_size": 266}, max_position_embeddings=4096)


def weights(dtype=torch.float32):
    return {path: leaf.to(dtype) for path, leaf in params.init_params(CFG, 7).items()}


def tokenizer(place):
    return small_tokenizer(place)


def export(place):
    """Write the model as a Hugging Face directory; return its path."""
    hf.save_pretrained(place, CFG, weights(), tokenizer(place.parent / f"{place.name}.tok"))
    return str(place)
