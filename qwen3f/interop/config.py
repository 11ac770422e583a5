"""Hugging Face's config.json of Qwen3 and Qwen3-MoE, read into a ModelConfig and written from one.

Defaults of omitted keys: transformers 5.23, Qwen3Config and Qwen3MoeConfig. What a ModelConfig can't hold is an error.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from qwen3f.config import ModelConfig, RopeScaling
from qwen3f.errors import UserError
from qwen3f.finite import as_finite
from qwen3f.limits import MODEL_PARAMETERS, check_layers

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
CLASSIFIERS = {"qwen3": "Qwen3ForSequenceClassification", "qwen3_moe": "Qwen3MoeForSequenceClassification"}
ROPE_THETA = 1e4  # where a file names none
PLAIN = {"qk_norm": "rms", "moe_drop_tokens": False}  # all that can be written

# Named alike on both sides. An omitted head_dim of a MoE model is hidden_size / num_attention_heads.
_DENSE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
_MOE: dict[str, Any] = {
    **_DENSE,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "head_dim": None,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
    "mlp_only_layers": (),
}
_ONE_LABEL = {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
# Of the language model in Qwen3-VL (qwen3f.interop.vision_config), which says by itself whether its head is tied.
_VL = {key: 128000 if key == "max_position_embeddings" else v for key, v in _DENSE.items() if "tie_" not in key}
_VL_MOE = {
    **{key: v for key, v in _MOE.items() if "tie_" not in key and key != "norm_topk_prob"},
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 5632,
    "max_position_embeddings": 128000,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_experts": 60,
}
VL_TEXT = {"qwen3_vl": "qwen3_vl_text", "qwen3_vl_moe": "qwen3_vl_moe_text"}
_DEFAULTS = {"qwen3": _DENSE, "qwen3_moe": _MOE, "qwen3_vl_text": _VL, "qwen3_vl_moe_text": _VL_MOE}

# Read by name below, or of no effect on the function and its parameters.
_UNDERSTOOD = {
    "model_type", "architectures",
    "rope_theta", "rope_scaling", "rope_parameters",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "quantization_config",
}  # fmt: skip
_HARMLESS = {
    "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path", "use_cache", "tokenizer_class",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "output_router_logits", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version",
}  # fmt: skip

# Keys that mean nothing with this value or null. transformers 4 writes its own keys with their defaults, other programs
# those of other families. With any other value such a key would change the model, or what it generates.
_NEUTRAL: dict[str, Any] = {
    # of every model in transformers 4
    **dict.fromkeys(
        ("torchscript", "is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder"), False
    ),
    **dict.fromkeys(("use_bfloat16", "tf_legacy_loss", "output_scores", "return_dict_in_generate"), False),
    **dict.fromkeys(("remove_invalid_values", "do_sample", "early_stopping"), False),
    **dict.fromkeys(("cross_attention_hidden_size", "finetuning_task", "task_specific_params", "prefix"), None),
    **dict.fromkeys(("decoder_start_token_id", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id"), None),
    **dict.fromkeys(("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"), None),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty"), 1.0),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **{"pruned_heads": {}, "max_length": 20, "top_k": 50},
    # of other families
    **dict.fromkeys(("qkv_bias", "mlp_bias", "use_mrope", "use_logn_attn", "use_dynamic_ntk"), False),
    **dict.fromkeys(("use_qk_norm", "no_bias"), True),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "quantization"), None),
    **dict.fromkeys(("hidden_dropout", "resid_pdrop", "embd_pdrop", "router_jitter_noise"), 0.0),
    **dict.fromkeys(("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"), 0),
    **dict.fromkeys(("num_nextn_predict_layers", "first_k_dense_replace"), 0),
    **dict.fromkeys(("partial_rotary_factor", "routed_scaling_factor", "logit_scale", "pretraining_tp"), 1),
}
_NEUTRAL_OF = {  # more such keys, by family
    "qwen3": dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"), 0),
    "qwen3_moe": {},
    "qwen3_vl_text": {},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
}


def from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The ModelConfig that a config.json describes; `where` names the file in errors.

    Deviation from transformers: YaRN without original_max_position_embeddings is an error here (it would take
    max_position_embeddings, which is the length after scaling).

    Raises UserError that names the key: another family, sliding windows, quantised weights, a value of the wrong type,
    two rotary settings that disagree, or any key whose meaning is unknown.
    """
    family = values.get("model_type")
    if family not in list(ARCHITECTURES):  # a list: a value from JSON may not be hashable
        raise UserError(f"{where}: model_type is {family!r}; only {' and '.join(ARCHITECTURES)} can be read")
    check_architectures(values, (ARCHITECTURES[family], CLASSIFIERS[family]), where)
    score = _has_score(values, family)
    if score:
        _check_score(values, where)
    cfg = make_config({**text_fields(values, family, where), "scalar_head": score}, where)
    check_size(cfg, where)
    return cfg


def make_config(fields: Mapping[str, Any], where: str) -> ModelConfig:
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def text_fields(values: Mapping[str, Any], family: str, where: str, theta: float = ROPE_THETA) -> dict[str, Any]:
    """ModelConfig's fields of a language model, from its part of a config.json. theta: used if the file names none."""
    defaults = _DEFAULTS[family]
    _check_keys(values, family, where)
    _refuse_what_we_lack(values, where)
    fields = {key: typed(values.get(key, default), default, key, where) for key, default in defaults.items()}
    fields |= _experts(values, family, where)
    heads = fields["num_attention_heads"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // heads if heads else 0
    try:
        base, scaling = _rope(values, theta)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return {**fields, "rope_theta": base, "rope_scaling": scaling}


def check_size(cfg: ModelConfig, where: str) -> None:
    """Raises UserError for a model that is too large for any machine, before anything is allocated by its sizes."""
    check_layers(cfg, where)
    if (parameters := cfg.total_params_estimate()) > MODEL_PARAMETERS.value():
        raise UserError(f"{where}: the model has {parameters:,} parameters, {MODEL_PARAMETERS.exceeded('parameters')}")


def to_hf(cfg: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of `cfg`. Holds the old keys and the new ones, so that every transformers and vLLM reads it.

    dtype: that of the stored weights. Training-time fields (gradient_checkpointing, embed_initializer_range) are left
        out.
    Raises UserError, naming the field, for a model that transformers' Qwen3 and Qwen3-MoE can't express.
    """
    check_plain(cfg, {**PLAIN, "vision_enabled": False})
    family = "qwen3_moe" if cfg.num_experts else "qwen3"
    names = CLASSIFIERS if cfg.scalar_head else ARCHITECTURES
    head = _ONE_LABEL if cfg.scalar_head else {}
    return {"architectures": [names[family]], **head, **text_to_hf(cfg, family, dtype)}


def text_to_hf(cfg: ModelConfig, family: str, dtype: torch.dtype) -> dict[str, Any]:
    """A language model's part of config.json."""
    ours = cfg.to_dict()
    scaling = None if cfg.rope_scaling is None else _scaling_to_hf(cfg.rope_scaling)
    return {
        "model_type": family,
        # transformers refuses a whole number where it declares a float
        **{key: float(ours[key]) if isinstance(v, float) else ours[key] for key, v in _DEFAULTS[family].items()},
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": cfg.rope_theta},
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": cfg.num_hidden_layers,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def check_plain(cfg: ModelConfig, plain_values: Mapping[str, Any]) -> None:
    """Raises UserError for the first field that differs from `plain_values`, the only ones transformers can express."""
    for field, plain in plain_values.items():
        value = getattr(cfg, field)
        if value != plain:
            raise UserError(
                f"model.{field}={value!r} has no form in Hugging Face's Qwen3; only {plain!r} can be written"
            )


def _check_keys(values: Mapping[str, Any], family: str, where: str) -> None:
    known = {*_DEFAULTS[family], *_UNDERSTOOD}
    if "num_experts" in _DEFAULTS[family]:
        known.add("num_local_experts")
    check_keys(values, known, family, where, _NEUTRAL | _NEUTRAL_OF[family])


def check_keys(
    values: Mapping[str, Any],
    known: Collection[str],
    family: str,
    where: str,
    neutral: Mapping[str, Any] = _NEUTRAL,
) -> None:
    """Raises UserError for a key that is neither `known` nor harmless, and for one of `neutral` with another value."""
    for key, value in values.items():
        if key in known or key in _HARMLESS:
            continue
        if key not in neutral:
            raise UserError(f"{where}: the key '{key}' is not known for {family}, and may change the model; remove it")
        if value is not None and value != neutral[key]:
            raise UserError(
                f"{where}: {key} is {value!r}, which {family} has no form for here; only {neutral[key]!r} can be read"
            )


def check_architectures(values: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Raises UserError unless the file's architecture is one of `names`; a file without one means the first."""
    architectures = values.get("architectures") or [names[0]]
    if architectures not in ([name] for name in names):
        raise UserError(f"{where}: architectures is {architectures}; only one of {tuple(names)} can be read")


def _check_score(values: Mapping[str, Any], where: str) -> None:
    labels = values.get("id2label") or {"0": "", "1": ""}  # transformers' default
    if not isinstance(labels, Mapping) or len(labels) != 1:
        raise UserError(f"{where}: id2label is {labels}; only a classifier of one label, a score, can be read")


def _refuse_what_we_lack(values: Mapping[str, Any], where: str) -> None:
    # transformers ignores sliding_window unless use_sliding_window is true.
    if values.get("use_sliding_window") and values.get("sliding_window") is not None:
        raise UserError(f"{where}: use_sliding_window is true; models with sliding windows can't be read")
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{where}: layer_types is {kinds}; only 'full_attention' in every layer can be read")
    refuse_quantised(values, where)


def refuse_quantised(values: Mapping[str, Any], where: str) -> None:
    """Raises UserError if a part of a config.json says that weights are quantised."""
    if values.get("quantization_config") is not None:
        raise UserError(f"{where}: quantization_config is set; give the directory of the unquantised weights")


def _has_score(values: Mapping[str, Any], family: str) -> bool:
    """Whether it is a classifier: a reward model, by its architecture."""
    return values.get("architectures") == [CLASSIFIERS[family]]


def _experts(values: Mapping[str, Any], family: str, where: str) -> dict[str, int]:
    """num_experts from num_local_experts, as transformers 5 writes it; {} if that is missing."""
    new = values.get("num_local_experts")
    if "num_experts" not in _DEFAULTS[family] or new is None:
        return {}
    if values.get("num_experts", new) != new:
        raise UserError(
            f"{where}: num_experts is {values['num_experts']} and num_local_experts {new}; they must be the same number"
        )
    return {"num_experts": typed(new, 0, "num_local_experts", where)}


def typed(value: Any, default: Any, key: str, where: str) -> Any:
    """`value`, if it is of the type that `key` has."""
    if value is None and key in ("num_key_value_heads", "head_dim", "mlp_only_layers"):
        return () if key == "mlp_only_layers" else None
    if isinstance(default, tuple):
        fits, kind = isinstance(value, (list, tuple)) and all(type(v) is int for v in value), "a list of integers"
    elif isinstance(default, float):
        fits, kind = as_finite(value) is not None, "a finite number"
    else:
        wanted = int if default is None else type(default)
        fits, kind = type(value) is wanted, {int: "an integer", bool: "true or false", str: "a string"}[wanted]
    if not fits:
        raise UserError(f"{where}: {key} is {value!r}; it must be {kind}")
    return value


def _rope(values: Mapping[str, Any], default: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the old keys (rope_theta, rope_scaling), the new one (rope_parameters), or both alike."""
    bases = {"rope_theta": values.get("rope_theta")}
    scalings = {}
    for key in ("rope_scaling", "rope_parameters"):
        inner = values.get(key)
        if inner is None:
            continue
        if not isinstance(inner, Mapping) or any(isinstance(v, Mapping) for v in inner.values()):
            raise UserError(f"{key} is {inner!r}; it must be one flat object (one setting for all layers)")
        # transformers reads null as the default, too.
        inner = {k: v for k, v in inner.items() if v is not None}
        for name, value in inner.items():
            wanted = {"rope_type": (str,), "type": (str,), "truncate": (bool,)}.get(name, (int, float))
            if type(value) not in wanted:
                raise UserError(f"{key}.{name} is {value!r}; it must be of type {wanted[-1].__name__}")
        bases[f"{key}.rope_theta"] = inner.pop("rope_theta", None)
        scalings[key] = RopeScaling.from_dict(inner)
    bases = {key: base for key, base in bases.items() if base is not None}
    for key, base in bases.items():
        if as_finite(base) is None:
            raise UserError(f"{key} is {base!r}; it must be a finite number")
    for found, what in ((bases, "base"), (scalings, "scaling")):
        if len(set(found.values())) > 1:
            both = " and ".join(f"{key}={value}" for key, value in found.items())
            raise UserError(f"two different rotary {what}s are given: {both}; keep one")
    return float(next(iter(bases.values()), default)), next(iter(scalings.values()), None)


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    """The required keys, and others only if they differ from their defaults: older readers don't know every key."""
    required = ("rope_type", "factor", "original_max_position_embeddings")
    return {
        field.name: value
        for field in dataclasses.fields(scaling)
        if (value := getattr(scaling, field.name)) != field.default or field.name in required
    }
