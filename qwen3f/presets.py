"""Named model configurations: sizes for tests and laptops, small to large, and the released Qwen3 and Qwen3-VL models.

Sizes of the released models are from the Qwen3 technical report (arXiv:2505.09388), tables 1 and 2. `debug*` have
head_dim 128 and an untied vocabulary of 32,768. `large` has experts of width 1,536 (with 12,288, the dense width, it
would have 1.8T parameters). `medium` and `large` reach 131,072 tokens by YaRN over 32,768, as Qwen3 does at inference.
qwen3f/README.md says why they differ from what was described.
"""

import difflib
from typing import Any

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError

_YARN_4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
_QWEN3 = {"head_dim": 128, "vocab_size": 151936, "rope_theta": 1e6, "max_position_embeddings": 40960}
_MOE = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}


def _dense(layers: int, hidden: int, heads: int, kv_heads: int, width: int, tie: bool, **more: Any) -> dict[str, Any]:
    return {
        **_QWEN3,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "tie_word_embeddings": tie,
        **more,
    }


_DEBUG = {**_dense(6, 256, 8, 2, 688, False), "vocab_size": 32768, "max_position_embeddings": 2048}
_SMALL = _dense(28, 2048, 16, 8, 5504, True, max_position_embeddings=32768)
_8B = _dense(36, 4096, 32, 8, 12288, False)
_30B = _dense(48, 2048, 32, 4, 6144, False, **_MOE, moe_intermediate_size=768)
_235B = _dense(94, 4096, 64, 4, 12288, False, **_MOE, moe_intermediate_size=1536)

# Learns on two CPU cores in minutes: small enough to train on 5M tokens. Its embedding starts large, since a token
# occurs too rarely for its vector to grow: with 0.09 everywhere, runs of a minute ended at 1.99 bits a byte instead of
# 1.84. It has two heads of 64: normalised attention scores are at most √head_dim, so heads of 32 attend less sharply
# and learn to copy later. The rotary base is that before ABF.
_NANO = {
    **_dense(3, 128, 2, 2, 352, False),
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "rope_theta": 1e4,
    "initializer_range": 0.09,
    "embed_initializer_range": 0.45,
}


def _tower(layers: int, hidden: int, width: int, taps: tuple[int, ...], heads: int = 16) -> dict[str, Any]:
    """Fields of a vision tower like Qwen3-VL's."""
    return {
        "vision_enabled": True,
        "vision_num_hidden_layers": layers,
        "vision_hidden_size": hidden,
        "vision_num_attention_heads": heads,
        "vision_intermediate_size": width,
        "vision_deepstack_layers": taps,
    }


_VL = {"rope_theta": 5e6, "max_position_embeddings": 262144}
_VL_300M = {**_tower(24, 1024, 4096, (5, 11, 17)), **_VL}
_VL_400M = {**_tower(27, 1152, 4304, (8, 16, 24)), **_VL}
_TINY_TOWER = {
    **_tower(3, 128, 256, (0, 1), heads=4),
    "vision_patch_size": 8,
    "vision_image_size": 128,
    "vision_temporal_patch_size": 1,
    # ids in tokenizers that this project trains (sentencepiece_tokenizer.SPECIAL_TOKENS)
    **dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), (6, 7, 9, 10))),
}

PRESETS: dict[str, dict[str, Any]] = {
    "nano": _NANO,
    "debug": _DEBUG,
    "debug_moe": {**_DEBUG, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 688},
    "small": _SMALL,
    "medium": {**_8B, "max_position_embeddings": 131072, "rope_scaling": _YARN_4},
    "large": {**_235B, "max_position_embeddings": 131072, "rope_scaling": _YARN_4},
    "qwen3-0.6b": _dense(28, 1024, 16, 8, 3072, True),
    "qwen3-1.7b": _dense(28, 2048, 16, 8, 6144, True),
    "qwen3-4b": _dense(36, 2560, 32, 8, 9728, True),
    "qwen3-8b": _8B,
    "qwen3-14b": _dense(40, 5120, 40, 8, 17408, False),
    "qwen3-32b": _dense(64, 5120, 64, 8, 25600, False),
    "qwen3-30b-a3b": _30B,
    "qwen3-235b-a22b": _235B,
    "qwen3-vl-2b": {**_dense(28, 2048, 16, 8, 6144, True), **_VL_300M},
    "qwen3-vl-4b": {**_dense(36, 2560, 32, 8, 9728, True), **_VL_300M},
    "qwen3-vl-8b": {**_8B, **_VL_400M},
    "qwen3-vl-30b-a3b": {**_30B, **_VL_400M},
    "qwen3-vl-235b-a22b": {**_235B, **_VL_400M},
    "debug_vl": {**_DEBUG, **_TINY_TOWER},
    "nano_vl": {**_NANO, **_TINY_TOWER, "vocab_size": 1024, "mrope_section": (12, 10, 10)},
    # another tower: patches of 14 pixels, layers 4, 8, …, 24 fused within it, tokens as means of patches
    "seed_vl": {
        **_SMALL,
        **_tower(24, 1024, 4096, (3, 7, 11, 15, 19, 23)),
        "vision_patch_size": 14,
        "vision_image_size": 672,
        "vision_temporal_patch_size": 1,
        "vision_merger": "pool_linear",
        "vision_deepstack_mode": "vit_fuse",
    },
}


def get(name: str) -> ModelConfig:
    """The preset `name`. Raises UserError with the closest name when there is none."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"presets: {', '.join(PRESETS)}"
        raise UserError(f"unknown model preset '{name}'; {hint}")
    return ModelConfig.from_dict(PRESETS[name])
