"""The parameter table: one record for each path, and the pytree of tensors made from it.

Parameters are a flat `dict[str, Tensor]`. Paths are Hugging Face's names without the layer index: the layers of a kind
are stacked on a leading axis, e.g. `model.layers.self_attn.q_proj.weight: [L, Hq·d, D]`. In a model that mixes dense
and sparse layers the two kinds of MLP make two stacks, and `ParamSpec.layers` says which layer each row belongs to.

L layers of the stack · D hidden · Hq, Hkv heads · d head_dim · I, F MLP and expert width · E experts · V vocabulary
"""

import dataclasses
import math

import torch
from torch import Tensor

from qwen3f import rng
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError

Params = dict[str, Tensor]

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"  # the scalar head, instead of the vocabulary's
LAYERS = "model.layers."  # the stack of transformer blocks

VISUAL = "model.visual."  # the vision tower, with the mergers that turn patches into tokens
PATCH_EMBED = VISUAL + "patch_embed.proj."
POSITIONS = VISUAL + "pos_embed.weight"
VISUAL_BLOCKS = VISUAL + "blocks."  # the stack of its blocks
MERGER = VISUAL + "merger."
TAP_MERGERS = VISUAL + "deepstack_merger_list."  # a stack: one for each tap (vision_deepstack_mode=llm_inject)
TAP_FUSIONS = VISUAL + "deepstack_fusion_list."  # a stack: one for each tap below the last layer (vit_fuse)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The description of a parameter.

    shape: global shape, with the layer axis first when stacked. mean, std: of the normal distribution of initial
    values; std 0 means the constant mean. decay: whether weight decay applies (matrices and the head; not embeddings,
    norms, biases). stack: prefix of the stack that it belongs to, such as LAYERS; "" when it is not stacked. layers:
    the layer of each row of the leading axis when stacked, else None.
    """

    shape: tuple[int, ...]
    mean: float
    std: float
    decay: bool
    layers: tuple[int, ...] | None = None
    stack: str = ""
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def pipelined(self) -> bool:
        """Whether pp cuts it: only stacks of the language model. Stage 0 runs the tower, whose parameters are
        replicated like the embedding."""
        return self.stack == LAYERS

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) - (self.layers is not None) >= 2


def abstract_params(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """path -> ParamSpec, in the order of the forward pass. Costs no memory."""
    d_q, d_kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    dim, width, experts = cfg.hidden_size, cfg.intermediate_size, cfg.num_experts
    every = tuple(range(cfg.num_hidden_layers))

    embed_std = cfg.embed_initializer_range or cfg.initializer_range

    table = {EMBED: ParamSpec((cfg.vocab_size, dim), 0.0, embed_std, decay=False)}
    if cfg.vision_enabled:
        table |= _tower(cfg)

    def stack(layers: tuple[int, ...], name: str, *shape: int, constant: float | None = None) -> None:
        mean, std = (0.0, cfg.initializer_range) if constant is None else (constant, 0.0)
        if layers:
            full, decay = (len(layers), *shape), len(shape) >= 2
            table[LAYERS + name] = ParamSpec(full, mean, std, decay, layers, stack=LAYERS)

    stack(every, "input_layernorm.weight", dim, constant=1.0)
    for name, rows, cols in (("q", d_q, dim), ("k", d_kv, dim), ("v", d_kv, dim), ("o", dim, d_q)):
        stack(every, f"self_attn.{name}_proj.weight", rows, cols)
        if cfg.attention_bias:
            stack(every, f"self_attn.{name}_proj.bias", rows, constant=0.0)
    if cfg.qk_norm != "none":
        # A unit vector needs the gain √d to start where RMSNorm starts, since RMSNorm(x) = √d · x/‖x‖.
        gain = 1.0 if cfg.qk_norm == "rms" else math.sqrt(cfg.head_dim)
        stack(every, "self_attn.q_norm.weight", cfg.head_dim, constant=gain)
        stack(every, "self_attn.k_norm.weight", cfg.head_dim, constant=gain)
    stack(every, "post_attention_layernorm.weight", dim, constant=1.0)
    stack(cfg.dense_layers, "mlp.gate_proj.weight", width, dim)
    stack(cfg.dense_layers, "mlp.up_proj.weight", width, dim)
    stack(cfg.dense_layers, "mlp.down_proj.weight", dim, width)
    stack(cfg.sparse_layers, "mlp.gate.weight", experts, dim)
    stack(cfg.sparse_layers, "mlp.experts.gate_proj.weight", experts, cfg.moe_intermediate_size, dim)
    stack(cfg.sparse_layers, "mlp.experts.up_proj.weight", experts, cfg.moe_intermediate_size, dim)
    stack(cfg.sparse_layers, "mlp.experts.down_proj.weight", experts, dim, cfg.moe_intermediate_size)

    table[FINAL_NORM] = ParamSpec((dim,), 1.0, 0.0, decay=False)
    if cfg.scalar_head:
        table[SCORE] = ParamSpec((1, dim), 0.0, cfg.initializer_range, decay=True)
    elif not cfg.tie_word_embeddings:
        table[HEAD] = ParamSpec((cfg.vocab_size, dim), 0.0, cfg.initializer_range, decay=True)
    return table


def fused_taps(cfg: ModelConfig) -> tuple[int, ...]:
    """The tower's layers whose outputs vit_fuse adds to the output of the last layer. The last layer is not one of
    them: its own output needs no fusion."""
    if cfg.vision_deepstack_mode != "vit_fuse":
        return ()
    return tuple(layer for layer in cfg.vision_deepstack_layers if layer < cfg.vision_num_hidden_layers - 1)


def _tower(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """The vision tower's part of the table. Names are Hugging Face's, with two exceptions: q, k and v are separate
    here, and the patch embedding is a matrix for flat patches, no convolution. All products have biases."""
    width, inner, std = cfg.vision_hidden_size, cfg.vision_intermediate_size, cfg.initializer_range
    table: dict[str, ParamSpec] = {}

    def add(path: str, *shape: int, stack: str = "", height: int = 0, constant: float | None = None) -> None:
        layers = tuple(range(height)) if stack else None
        full = (height, *shape) if stack else shape
        mean, spread = (0.0, std) if constant is None else (constant, 0.0)
        if not stack or height:
            table[stack + path] = ParamSpec(full, mean, spread, len(shape) >= 2 and path != POSITIONS, layers, stack)

    def linear(path: str, rows: int, columns: int, constant: float | None = None, **where: str | int) -> None:
        add(path + "weight", rows, columns, constant=constant, **where)
        add(path + "bias", rows, constant=0.0, **where)

    def norm(path: str, size: int, **where: str | int) -> None:
        add(path + "weight", size, constant=1.0, **where)
        add(path + "bias", size, constant=0.0, **where)

    linear(PATCH_EMBED, width, cfg.vision_patch_values)
    add(POSITIONS, cfg.vision_grid_side**2, width)
    block = {"stack": VISUAL_BLOCKS, "height": cfg.vision_num_hidden_layers}
    norm("norm1.", width, **block)
    for name in ("attn.q_proj.", "attn.k_proj.", "attn.v_proj.", "attn.proj."):
        linear(name, width, width, **block)
    norm("norm2.", width, **block)
    linear("mlp.linear_fc1.", inner, width, **block)
    linear("mlp.linear_fc2.", width, inner, **block)
    fusion = {"stack": TAP_FUSIONS, "height": len(fused_taps(cfg))}
    norm("norm.", width, **fusion)
    linear("linear.", width, width, constant=0.0, **fusion)  # zero at first, so that the taps change nothing
    joined = width * cfg.vision_merger_spatial_factor**2
    if cfg.vision_merger == "mlp":
        norm(MERGER + "norm.", width)
        linear(MERGER + "linear_fc1.", joined, joined)
        linear(MERGER + "linear_fc2.", cfg.hidden_size, joined)
    else:
        linear(MERGER + "linear.", cfg.hidden_size, width)
    tap = {"stack": TAP_MERGERS, "height": cfg.injected_taps}
    if cfg.vision_merger == "mlp":
        norm("norm.", joined, **tap)
        linear("linear_fc1.", joined, joined, **tap)
        linear("linear_fc2.", cfg.hidden_size, joined, **tap)
    else:
        linear("linear.", cfg.hidden_size, width, **tap)
    return table


def head_path(cfg: ModelConfig) -> str:
    """Path of the parameter that maps the last hidden states to the outputs."""
    return SCORE if cfg.scalar_head else EMBED if cfg.tie_word_embeddings else HEAD


def decays(cfg: ModelConfig) -> dict[str, bool]:
    """path -> whether weight decay applies, from the table."""
    return {path: spec.decay for path, spec in abstract_params(cfg).items()}


def active_numel(cfg: ModelConfig, path: str, spec: ParamSpec) -> int:
    """Number of elements of this parameter that one token uses: a share top-k/E of the experts, all of others."""
    if ".experts." in path:
        return spec.numel * cfg.num_experts_per_tok // cfg.num_experts
    return spec.numel


def init_params(
    cfg: ModelConfig, seed: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Params:
    """Initial parameters. Element i of a layer's parameter depends only on (seed, path, layer, i).

    So any mesh, pipeline split or order of creation gives the same numbers. Values are drawn in float32 and then cast,
    so a float64 model starts from the values of the float32 model. Raises UserError as rng.check_seed.
    """
    rng.check_seed(seed)
    return {path: _init_one(path, spec, seed, device, dtype) for path, spec in abstract_params(cfg).items()}


def _init_one(path: str, spec: ParamSpec, seed: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    if spec.std == 0.0:
        return torch.full(spec.shape, spec.mean, device=device, dtype=dtype)
    out = torch.empty(spec.shape, device=device, dtype=dtype)
    rows = [(None, out)] if spec.layers is None else list(zip(spec.layers, out))
    for layer, row in rows:
        row.copy_(init_layer(path, spec, seed, layer, device))
    return out


def init_layer(path: str, spec: ParamSpec, seed: int, layer: int | None, device: torch.device | str) -> Tensor:
    """Initial values of one row of a stack, or (layer None) of an unstacked parameter, as in init_params; float32."""
    shape = spec.shape if layer is None else spec.shape[1:]
    if spec.std == 0.0:
        return torch.full(shape, spec.mean, device=device)
    stream = rng.key(seed, path, "" if layer is None else layer)
    return rng.normal(stream, 0, math.prod(shape), device).mul_(spec.std).add_(spec.mean).view(shape)


def check_params(cfg: ModelConfig, params: Params) -> None:
    """Raises UserError naming the first parameter that is missing, unknown or has another shape than in the table."""
    table = abstract_params(cfg)
    for path in [*table, *params]:
        if path not in params:
            raise UserError(f"parameter {path} is missing; the model has {len(table)} parameters, got {len(params)}")
        if path not in table:
            raise UserError(f"parameter {path} is unknown to this model config")
        if tuple(params[path].shape) != table[path].shape:
            raise UserError(
                f"parameter {path} has shape {tuple(params[path].shape)}, the config needs {table[path].shape}"
            )
