"""Hugging Face's config.json of Qwen3-VL and Qwen3-VL-MoE: a language model's keys (qwen3f.interop.config), and those
of a vision tower.

Defaults of omitted keys: transformers 5.24. Released files write rope_theta and rope_scaling with mrope_section in it,
newer ones rope_parameters; both are read, and both are written.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.interop import config as C
from qwen3f.vision.preprocess import MAX_PIXELS, MIN_PIXELS

ARCHITECTURES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
ROPE_THETA = 5e5  # where a file names none
SECTIONS = (24, 20, 20)

# Their name -> ours, and the default.
_TOWER: dict[str, tuple[str, Any]] = {
    "depth": ("vision_num_hidden_layers", 27),
    "hidden_size": ("vision_hidden_size", 1152),
    "intermediate_size": ("vision_intermediate_size", 4304),
    "num_heads": ("vision_num_attention_heads", 16),
    "in_channels": ("vision_num_channels", 3),
    "patch_size": ("vision_patch_size", 16),
    "spatial_merge_size": ("vision_merger_spatial_factor", 2),
    "temporal_patch_size": ("vision_temporal_patch_size", 2),
    "deepstack_visual_indexes": ("vision_deepstack_layers", (8, 16, 24)),
}
_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
# Read by name, or of no effect.
_UNDERSTOOD = {"model_type", "architectures", "initializer_range", "quantization_config"}
_OTHER = {"hidden_act", "out_hidden_size", "num_position_embeddings", "rope_parameters"}  # of the tower
_TOP = {"text_config", "vision_config", "tie_word_embeddings", *_IDS}


def from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The ModelConfig that a config.json describes. Raises UserError that names the key, as config.from_hf does."""
    family = values["model_type"]
    C.check_architectures(values, (ARCHITECTURES[family],), where)
    _check_keys(values, _TOP, where)
    parts = {}
    for name in ("text_config", "vision_config"):
        if not isinstance(values.get(name), Mapping):
            raise UserError(f"{where}: {name} is {values.get(name)!r}; it must be an object")
        parts[name] = dict(values[name])
    text, sections = _without_sections(parts["text_config"], where)
    kind = C.VL_TEXT[family]
    if text.setdefault("model_type", kind) not in (kind, family):
        raise UserError(f"{where}: text_config.model_type is {text['model_type']!r}; only {kind!r} can be read")
    text.pop("tie_word_embeddings", None)  # the top level decides
    fields = C.text_fields(text, kind, f"{where}: text_config", ROPE_THETA)
    fields |= _tower(parts["vision_config"], fields["hidden_size"], f"{where}: vision_config")
    fields |= {key: C.typed(values.get(key, default), default, key, where) for key, default in _IDS.items()}
    tie = C.typed(values.get("tie_word_embeddings", False), False, "tie_word_embeddings", where)
    cfg = C.make_config(
        {**fields, "vision_enabled": True, "mrope_section": sections, "tie_word_embeddings": tie}, where
    )
    C.check_size(cfg, where)
    return cfg


def to_hf(cfg: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of `cfg`, as config.to_hf.

    Raises UserError, naming the field, for a model that transformers' Qwen3-VL can't express, and if a tensor of
    experts would be square: readers decide by its shape whether to transpose it.
    """
    family = "qwen3_vl_moe" if cfg.num_experts else "qwen3_vl"
    plain = {**C.PLAIN, "scalar_head": False, "vision_merger": "mlp", "vision_deepstack_mode": "llm_inject"}
    C.check_plain(cfg, plain | ({"norm_topk_prob": True} if cfg.num_experts else {}))
    if cfg.num_experts and cfg.hidden_size in (cfg.moe_intermediate_size, 2 * cfg.moe_intermediate_size):
        raise UserError(
            f"model.moe_intermediate_size={cfg.moe_intermediate_size} with model.hidden_size={cfg.hidden_size} makes "
            "square matrices, which Hugging Face's readers may transpose without a word; use another width"
        )
    text = C.text_to_hf(cfg, C.VL_TEXT[family], dtype)
    interleaved = {"mrope_section": list(cfg.mrope_section), "mrope_interleaved": True}
    text["rope_parameters"] |= interleaved
    text["rope_scaling"] = {**(text["rope_scaling"] or {"rope_type": "default"}), **interleaved}
    ours = cfg.to_dict()
    tower = {theirs: ours[name] for theirs, (name, _) in _TOWER.items()}
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "text_config": text,
        "vision_config": {
            "model_type": family,
            **tower,
            "hidden_act": "gelu_pytorch_tanh",
            "initializer_range": text["initializer_range"],
            "num_position_embeddings": cfg.vision_grid_side**2,
            "out_hidden_size": cfg.hidden_size,
        },
        **{key: ours[key] for key in _IDS},
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "torch_dtype": text["torch_dtype"],
    }


def preprocessor(cfg: ModelConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json, which describes what image_patches does by default."""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": cfg.vision_patch_size,
        "temporal_patch_size": cfg.vision_temporal_patch_size,
        "merge_size": cfg.vision_merger_spatial_factor,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _tower(values: Mapping[str, Any], hidden: int, where: str) -> dict[str, Any]:
    _check_keys(values, {*_TOWER, *_OTHER}, where)
    fields = {name: C.typed(values.get(key, default), default, key, where) for key, (name, default) in _TOWER.items()}
    if (act := values.get("hidden_act", "gelu_pytorch_tanh")) != "gelu_pytorch_tanh":
        raise UserError(f"{where}: hidden_act is {act!r}; only 'gelu_pytorch_tanh' can be read")
    if (out := values.get("out_hidden_size", 3584)) != hidden:
        raise UserError(f"{where}: out_hidden_size is {out!r}, but the language model's hidden_size {hidden}")
    places = C.typed(values.get("num_position_embeddings", 2304), 2304, "num_position_embeddings", where)
    side = math.isqrt(max(places, 0))
    if side**2 != places or not side:
        raise UserError(f"{where}: num_position_embeddings is {places}; it must be the square of a number")
    rope = values.get("rope_parameters") or {}
    plain = {"rope_type": "axial", "rope_theta": 10000.0}
    if not isinstance(rope, Mapping) or any(rope.get(key, value) != value for key, value in plain.items()):
        raise UserError(f"{where}: rope_parameters is {rope!r}; only {plain} can be read")
    return {**fields, "vision_image_size": side * fields["vision_patch_size"]}


def _without_sections(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """(the text's keys without MRoPE's, mrope_section). MRoPE's keys stand in rope_scaling, rope_parameters or both."""
    out, found = dict(values), []
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(out.get(key), Mapping):
            continue
        inner = dict(out[key])
        if inner.pop("mrope_interleaved", True) is not True:
            raise UserError(f"{where}: text_config.{key}.mrope_interleaved is false; only true can be read")
        if (sections := inner.pop("mrope_section", None)) is not None:
            found.append(C.typed(sections, (), f"text_config.{key}.mrope_section", where))
        out[key] = inner
    if any(list(sections) != list(found[0]) for sections in found):
        raise UserError(f"{where}: two different mrope_sections are given: {found}; keep one")
    return out, tuple(found[0]) if found else SECTIONS


def _check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    C.check_keys(values, _UNDERSTOOD | known, "qwen3_vl", where)
    C.refuse_quantised(values, where)
