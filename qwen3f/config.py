"""ModelConfig: the static description of a Qwen3-family model.

Field names are Hugging Face's where one exists (Qwen3Config, Qwen3MoeConfig). The dataclass is frozen and hashable, so
it can key caches of meta skeletons and compiled functions.
"""

import dataclasses
import difflib
import json
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml

from qwen3f.errors import UserError

_BRIEF = reprlib.Repr()  # for errors: by aliases, a few lines of YAML can be a value that is larger than memory
_BRIEF.maxlevel = 2

HIDDEN_ACTS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
QK_NORMS = ("rms", "l2", "none")
REMAT_POLICIES = ("none", "full", "selective")
ROUTER_BALANCE = ("global", "global_exact", "micro", "hf")
VISION_MERGERS = ("mlp", "pool_linear")
VISION_DEEPSTACK = ("llm_inject", "vit_fuse")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters (Peng et al. 2023, arXiv:2309.00071), named as in Hugging Face's `rope_scaling`.

    `original_max_position_embeddings` has no default on purpose: guessing it from `max_position_embeddings` gives
    wrong frequencies without any error. `attention_factor=None` means 0.1·ln(factor) + 1.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RopeScaling | None":
        values = dict(values)
        if "type" in values:  # the older Hugging Face spelling
            values.setdefault("rope_type", values.pop("type"))
        if not values or values.get("rope_type") == "default":
            return None
        if values.get("rope_type") != "yarn":
            kind = _BRIEF.repr(values.get("rope_type"))
            raise UserError(f"config.model.rope_scaling: rope_type {kind} is unknown; use 'yarn' or null")
        _check_keys("config.model.rope_scaling", values, cls)
        for key in ("factor", "original_max_position_embeddings"):
            if values.get(key) is None:
                raise UserError(
                    f"config.model.rope_scaling.{key} is missing; YaRN needs its factor and the length before it"
                )
        return cls(**values)

    def __post_init__(self) -> None:
        _check_types("config.model.rope_scaling", self)
        for key in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, key)
            if value is not None and not 1e-9 <= value <= 1e18:  # else YaRN's logarithms overflow
                raise UserError(f"config.model.rope_scaling.{key} is {str(value)[:40]}; it must be from 1e-9 to 1e18")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a model's function and parameters; sizes in elements, lengths in tokens."""

    # core
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    intermediate_size: int = 688
    vocab_size: int = 32768
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    scalar_head: bool = False  # a head that gives one score for each token instead of logits: a reward model
    # attention
    attention_bias: bool = False
    attention_dropout: float = 0.0
    qk_norm: str = "rms"  # "rms": Qwen3's learned per-head RMSNorm; "l2": unit norm times a learned gain; "none"
    # rotary position embedding
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    # mixture of experts; layer l is sparse iff num_experts > 0, (l + 1) % decoder_sparse_step == 0, l not in mlp_only
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    router_balance: str = "global"  # one of ROUTER_BALANCE: what the balancing loss counts (qwen3f.train.balance)
    router_z_loss_coef: float = 0.0
    norm_topk_prob: bool = True
    moe_drop_tokens: bool = False
    moe_capacity_factor: float = 1.25
    # vision tower
    vision_enabled: bool = False
    vision_hidden_size: int = 1024
    vision_num_hidden_layers: int = 24
    vision_num_attention_heads: int = 16
    vision_intermediate_size: int = 4096
    vision_patch_size: int = 16
    vision_image_size: int = 768
    vision_num_channels: int = 3
    vision_deepstack_layers: tuple[int, ...] = (5, 11, 17)  # DeepStack's taps: layers of the tower, from 0
    vision_merger_spatial_factor: int = 2
    vision_temporal_patch_size: int = 2  # frames of a patch; an image is repeated
    vision_merger: str = "mlp"  # neighbouring patches to a token: "mlp" (Qwen3-VL), "pool_linear" (their mean)
    # "llm_inject" (Qwen3-VL): merged tap i is added to the output of layer i of the language model. "vit_fuse": taps
    # are added to the tower's own output.
    vision_deepstack_mode: str = "llm_inject"
    mrope_section: tuple[int, ...] = (24, 20, 20)  # rotary pairs that rotate by time, by height and by width
    # ids of <|image_pad|>, <|video_pad|>, <|vision_start|> and <|vision_end|> in the tokenizer
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    # training
    gradient_checkpointing: str = "none"  # "none", "full" (recompute a block), "selective" (keep matrix products)
    initializer_range: float = 0.02
    embed_initializer_range: float = 0.0  # for the embedding only; 0: initializer_range

    def __post_init__(self) -> None:
        # Config files and Hugging Face write booleans, dicts and lists where the frozen form needs names and tuples.
        normal = {
            "qk_norm": {True: "rms", False: "none", None: "none"},
            "gradient_checkpointing": {True: "full", False: "none", "True": "full", "False": "none", None: "none"},
        }
        for name, aliases in normal.items():
            given = getattr(self, name)
            object.__setattr__(self, name, aliases.get(given, given) if isinstance(given, str | bool | None) else given)
        for name in ("mlp_only_layers", "vision_deepstack_layers", "mrope_section"):
            given = getattr(self, name)
            numbers = () if given is None else given
            if not isinstance(numbers, list | tuple) or any(type(one) is not int for one in numbers):
                raise UserError(f"config.model.{name} is {_BRIEF.repr(given)}; write whole numbers, such as (0, 1)")
            object.__setattr__(self, name, tuple(numbers))
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(self.rope_scaling))
        _check_types("config.model", self)
        _validate(self)

    # -- layers ------------------------------------------------------------------------------------------------------

    def is_sparse(self, layer: int) -> bool:
        """Whether `layer` (0-based) holds experts rather than a dense MLP (transformers' Qwen3MoeDecoderLayer rule)."""
        on_step = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return on_step and layer not in self.mlp_only_layers

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_sparse(i))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if not self.is_sparse(i))

    # -- vision ------------------------------------------------------------------------------------------------------

    @property
    def vision_grid_side(self) -> int:
        """Rows, and columns, of the table of learned positions: vision_image_size in patches."""
        return self.vision_image_size // self.vision_patch_size

    @property
    def vision_patch_values(self) -> int:
        """Numbers of a flat patch: channels × frames × height × width."""
        return self.vision_num_channels * self.vision_temporal_patch_size * self.vision_patch_size**2

    @property
    def injected_taps(self) -> int:
        """The number of layers of the language model, the first ones, to whose outputs a tap is added."""
        inject = self.vision_enabled and self.vision_deepstack_mode == "llm_inject"
        return len(self.vision_deepstack_layers) if inject else 0

    # -- counts ------------------------------------------------------------------------------------------------------

    def total_params_estimate(self) -> int:
        """Number of parameters: exact, from the parameter table, despite the name."""
        from qwen3f import params  # the table is built from a config, so it imports this module

        return sum(spec.numel for spec in params.abstract_params(self).values())

    def active_params_estimate(self) -> int:
        """Parameters a token passes through: experts count num_experts_per_tok of num_experts. Exact."""
        from qwen3f import params

        return sum(params.active_numel(self, path, spec) for path, spec in params.abstract_params(self).items())

    def matmul_params(self) -> int:
        """Number of parameters in the matrix products of a token: the head counts, even if tied; the embedding lookup
        does not, nor does the vision tower, which processes patches."""
        from qwen3f import params

        table = params.abstract_params(self)
        apart = (params.EMBED, params.VISUAL)
        matrices = (path for path, spec in table.items() if spec.is_matrix and not path.startswith(apart))
        body = sum(params.active_numel(self, path, table[path]) for path in matrices)
        return body + (table[params.EMBED].numel if params.head_path(self) == params.EMBED else 0)

    # -- files -------------------------------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> "ModelConfig":
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only (tuples become lists), ready for JSON, YAML or a ConfigDict."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Raises UserError on an unknown key, naming the closest known one."""
        _check_keys("config.model", values, cls)
        return cls(**values)

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def to_yaml(self, path: str | Path) -> None:
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        return cls._from_file(path, json.loads)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "ModelConfig":
        return cls._from_file(path, yaml.safe_load)

    @classmethod
    def _from_file(cls, path: str | Path, parse: Any) -> "ModelConfig":
        path = Path(path)
        if not path.is_file():
            raise UserError(f"model config {path}: no such file")
        try:
            values = parse(path.read_text(encoding="utf-8-sig"))
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"model config {path}: cannot be parsed: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise UserError(f"model config {path}: expected a mapping of field names to values")
        return cls.from_dict(values)


# Names of YaRN settings in other programs that look similar and mean something else.
_OTHER_YARN = {
    "attn_factor": "it multiplies the default; write attention_factor = attn_factor · (0.1·ln(factor) + 1)",
    "mscale": "of DeepSeek; write attention_factor, the factor of cosines and sines",
    "mscale_all_dim": "of DeepSeek; write attention_factor, the factor of cosines and sines",
    "extrapolation_factor": "only 1 is supported; leave it out",
}


def _check_keys(where: str, values: Mapping[str, Any], cls: type) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known and key in _OTHER_YARN and cls is RopeScaling:
            raise UserError(f"{where}: '{key}' has no key of the same meaning here: {_OTHER_YARN[key]}")
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
            raise UserError(f"{where}: unknown key '{key}'{hint}")


_TYPES = {
    NoneType: "null",
    RopeScaling: "dict, as {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768},",
}


def _check_types(where: str, values: "RopeScaling | ModelConfig") -> None:
    for field in dataclasses.fields(values):
        value, kind = getattr(values, field.name), field.type
        kinds = get_args(kind) if isinstance(kind, UnionType) else (get_origin(kind) or kind,)
        if type(value) not in kinds and not (float in kinds and type(value) is int):
            words = " or ".join(_TYPES.get(one, one.__name__) for one in kinds)
            raise UserError(f"{where}.{field.name} is {_BRIEF.repr(value)}; it must be of type {words}")


def _validate(cfg: ModelConfig) -> None:
    positive = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "decoder_sparse_step",
        "rms_norm_eps",
        "rope_theta",
        "initializer_range",
    ]
    for name in positive:
        if not 0 < getattr(cfg, name) <= sys.float_info.max:
            raise UserError(f"config.model.{name} must be positive and finite, got {str(getattr(cfg, name))[:40]}")
    for name, allowed in (
        ("hidden_act", HIDDEN_ACTS),
        ("qk_norm", QK_NORMS),
        ("gradient_checkpointing", REMAT_POLICIES),
        ("router_balance", ROUTER_BALANCE),
    ):
        if getattr(cfg, name) not in allowed:
            raise UserError(f"config.model.{name} must be one of {', '.join(allowed)}, got {getattr(cfg, name)!r}")
    if cfg.num_attention_heads % cfg.num_key_value_heads:
        raise UserError(
            f"config.model.num_attention_heads ({cfg.num_attention_heads}) must be a multiple of "
            f"config.model.num_key_value_heads ({cfg.num_key_value_heads})"
        )
    if cfg.head_dim % 2:
        raise UserError(f"config.model.head_dim must be even for rotary embeddings, got {cfg.head_dim}")
    if cfg.rope_scaling is not None and cfg.rope_theta <= 1:
        raise UserError(
            f"config.model.rope_theta must be above 1 where config.model.rope_scaling is set, got {cfg.rope_theta}"
        )
    if not 0.0 <= cfg.attention_dropout < 1.0:
        raise UserError(f"config.model.attention_dropout must be in [0, 1), got {cfg.attention_dropout}")
    if cfg.num_experts < 0:
        raise UserError(f"config.model.num_experts must be at least 0, got {cfg.num_experts}")
    if cfg.num_experts and not 1 <= cfg.num_experts_per_tok <= cfg.num_experts:
        raise UserError(
            f"config.model.num_experts_per_tok ({cfg.num_experts_per_tok}) must lie in 1..num_experts "
            f"({cfg.num_experts})"
        )
    if cfg.num_experts and cfg.moe_intermediate_size <= 0:
        raise UserError("config.model.moe_intermediate_size must be positive when num_experts > 0")
    for name in ("router_aux_loss_coef", "router_z_loss_coef", "embed_initializer_range"):
        if not 0 <= getattr(cfg, name) <= sys.float_info.max:
            raise UserError(f"config.model.{name} must be finite and at least 0, got {str(getattr(cfg, name))[:40]}")
    if any(not 0 <= layer < cfg.num_hidden_layers for layer in cfg.mlp_only_layers):
        raise UserError(
            f"config.model.mlp_only_layers ({list(cfg.mlp_only_layers)}) must be layers of the model, 0 … "
            f"{cfg.num_hidden_layers - 1}"
        )
    if cfg.vision_enabled:
        _validate_vision(cfg)
    if cfg.moe_drop_tokens and not 0 < cfg.moe_capacity_factor <= sys.float_info.max:
        raise UserError(f"config.model.moe_capacity_factor must be positive and finite, got {cfg.moe_capacity_factor}")


def _validate_vision(cfg: ModelConfig) -> None:
    sizes = "hidden_size num_hidden_layers num_attention_heads intermediate_size patch_size image_size num_channels"
    for name in (f"vision_{size}" for size in f"{sizes} merger_spatial_factor temporal_patch_size".split()):
        if getattr(cfg, name) < 1:
            raise UserError(f"config.model.{name} must be positive, got {getattr(cfg, name)}")
    for name, allowed in (("vision_merger", VISION_MERGERS), ("vision_deepstack_mode", VISION_DEEPSTACK)):
        if getattr(cfg, name) not in allowed:
            raise UserError(f"config.model.{name} must be one of {', '.join(allowed)}, got {getattr(cfg, name)!r}")
    if cfg.vision_hidden_size % (4 * cfg.vision_num_attention_heads):
        raise UserError(
            f"config.model.vision_hidden_size ({cfg.vision_hidden_size}) must be a multiple of 4 · "
            f"config.model.vision_num_attention_heads ({cfg.vision_num_attention_heads}): half of a head's rotary "
            "pairs is for height, half for width"
        )
    if cfg.vision_image_size % cfg.vision_patch_size:
        raise UserError(
            f"config.model.vision_image_size ({cfg.vision_image_size}) must be a multiple of "
            f"config.model.vision_patch_size ({cfg.vision_patch_size})"
        )
    taps, layers = cfg.vision_deepstack_layers, cfg.vision_num_hidden_layers
    if list(taps) != sorted(set(taps)) or (taps and not 0 <= taps[0] <= taps[-1] < layers):
        raise UserError(
            f"config.model.vision_deepstack_layers ({list(taps)}) must be in ascending order, and layers of the tower, "
            f"0 … {layers - 1}"
        )
    if cfg.injected_taps > cfg.num_hidden_layers:
        raise UserError(
            f"config.model.vision_deepstack_layers has {len(taps)} layers, more than config.model.num_hidden_layers "
            f"({cfg.num_hidden_layers}), to whose outputs they are added; write fewer"
        )
    sections = cfg.mrope_section
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != cfg.head_dim // 2:
        raise UserError(
            f"config.model.mrope_section ({list(sections)}) must be three numbers of rotary pairs whose sum is half of "
            f"config.model.head_dim ({cfg.head_dim})"
        )
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    for name in ids:
        if not 0 <= getattr(cfg, name) < cfg.vocab_size:
            raise UserError(
                f"config.model.{name} ({getattr(cfg, name)}) must be below config.model.vocab_size ({cfg.vocab_size})"
            )
    if len({getattr(cfg, name) for name in ids}) < len(ids):
        raise UserError(f"config.model.{', config.model.'.join(ids)} must differ")
