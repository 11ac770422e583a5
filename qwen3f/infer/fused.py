"""A decoding pass of few GPU kernels per layer: what `passes.make_decode` computes, and drawing the next token.

A dense layer takes five kernels: norm and products for q, k and v; norm, rotation, cache write and attention; product
and residual; norm and SwiGLU; product and residual. With few rows attention takes a sixth, which merges its splits.
With more than one row, a product, the residual and the norm that follows are two kernels, and the next product has no
norm (kernels.residual_norm). Results differ from those of the training blocks by rounding
(kernels.row_product).

With tp, a rank has a share of the heads and of the MLP's columns. The two products with a residual then give partial
sums, which are added over the ranks; only rank 0 adds the residual.

B rows · D hidden · V vocabulary (v: this rank's) · P pages of a row
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dependent_launch
from kernels.decode_ends import Start, fed, pack, start
from kernels.head_sample import head_sample
from kernels.head_shards import choose, head_shard
from kernels.linear_residual import linear_residual
from kernels.norm_linear import norm_linear
from kernels.norm_swiglu import norm_swiglu
from kernels.paged_attention import MAX_GROUP, paged_attention
from kernels.residual_norm import residual_norm
from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.infer.passes import make_experts
from qwen3f.model.kv_cache import KVCache
from qwen3f.model.norm import rms_norm
from qwen3f.model.transformer import layer_stacks, unstack_layers
from sharding.axes import ONE, Axis
from sharding.collectives import stack_now, sum_now


class Places(NamedTuple):
    """Inputs of a decoding pass, by place of the batch.

    Attributes:
      tokens: int64 [B], the token to feed, or −1 − i for the token that place i of the pass before has drawn.
      positions: int64 [B], position of that token in its row; 0 for an idle place.
      rotary: int64 [B], its rotary position: smaller than `positions` behind a picture.
      uniform: float64 [B], the random number in [0, 1) that chooses the next token.
      inv_temperature: float32 [B], 1 / temperature; 0 is greedy.
      table: int32 [B, P], the pages of each row; 0 for an idle place.
    """

    tokens: Tensor
    positions: Tensor
    rotary: Tensor
    uniform: Tensor
    inv_temperature: Tensor
    table: Tensor


class Constants(NamedTuple):
    """Inputs that are the same in all passes.

    cos, sin: rope_tables of positions 0, 1, …, each [positions, d/2]. allowed: bool [V], ids to draw from; None: all.
    """

    cos: Tensor
    sin: Tensor
    allowed: Tensor | None


class Result(NamedTuple):
    """ids int64 [B], log_probs float32 [B], logits float32 [B, V] (with tp [B, v]), finite bool [B]; see
    kernels.head_sample. packed: float64 [3, B], ids, log_probs and finite in one tensor, for one copy to the host.
    """

    ids: Tensor
    log_probs: Tensor
    logits: Tensor
    finite: Tensor
    packed: Tensor


FusedDecode = Callable[..., tuple[Result, KVCache]]


def fits(cfg: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the kernels support this model and dtype."""
    size = cfg.head_dim
    return (
        cfg.qk_norm in ("rms", "none")
        and cfg.hidden_act == "silu"
        and 16 <= size <= 256
        and size & (size - 1) == 0
        and cfg.num_attention_heads // cfg.num_key_value_heads <= MAX_GROUP
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


def make_fused_decode(cfg: ModelConfig, execution: model.Execution, num_ids: int, tp: Axis = ONE.tp) -> FusedDecode:
    """decode(params, cache, places, last, constants) -> (result, the cache with the new tokens in it).

    last: ids that the pass before has drawn. tp: its ranks call this together, each with its shards. All get the same
    result, except logits, which each rank has for its own ids.
    """
    stacks = layer_stacks(cfg)
    experts = make_experts(cfg, execution) if cfg.sparse_layers else None

    @torch.no_grad()
    @dependent_launch.chain()
    def decode(
        params: P.Params, cache: KVCache, places: Places, last: Tensor, constants: Constants
    ) -> tuple[Result, KVCache]:
        x_BD, cos, sin, lengths_B = _start(places, last, params[P.EMBED], constants, tp)
        real_B = places.table[:, 0] > 0 if cfg.sparse_layers else None
        add = _adder(x_BD, cfg.rms_norm_eps, tp)
        layers = unstack_layers(params, stacks)
        norms = [layer["input_layernorm.weight"] for layer in layers.values()] + [params[P.FINAL_NORM]]
        stream = Stream(x_BD, x_BD, norms[0])
        for (number, layer), next_norm in zip(layers.items(), norms[1:]):
            attend = functools.partial(
                paged_attention, eps=cfg.rms_norm_eps, cos_BF=cos, sin_BF=sin, k_pages=cache.keys[number],
                v_pages=cache.values[number], table_BP=places.table, lengths_B=lengths_B,
            )  # fmt: skip
            stream = _attention(cfg, layer, stream, attend, add)
            if cfg.is_sparse(number):
                x_BD, h_BD, norm_D = stream
                h_BD = h_BD if norm_D is None else rms_norm(h_BD, norm_D, cfg.rms_norm_eps)
                x_BD = x_BD + sum_now(experts(layer, h_BD, real_B).contiguous(), tp)
                stream = Stream(x_BD, x_BD, next_norm)
            else:
                stream = _mlp(cfg, layer, stream, add, next_norm)
        return _chosen(cfg, params, stream, places, num_ids, constants.allowed, tp), cache

    return decode


class Stream(NamedTuple):
    """x_BD: the residual stream. The next product's input is h_BD, normed by norm_D; None: it is normed already."""

    x_BD: Tensor
    h_BD: Tensor
    norm_D: Tensor | None


Add = Callable[[Tensor, Tensor, Tensor, Tensor], Stream]


def _adder(like_BD: Tensor, eps: float, tp: Axis) -> Add:
    """add(h, weight, x, norm) = x + h · weightᵀ, where h and weight are this rank's shards over tp, and the norm of the
    product that follows."""
    if tp.size == 1 and len(like_BD) > 1:
        return lambda h, weight, x_BD, norm_D: Stream(*residual_norm(h, weight, x_BD, norm_D, eps), None)
    blank_BD = None if tp.size == 1 else torch.zeros_like(like_BD)

    def add(h: Tensor, weight: Tensor, x_BD: Tensor, norm_D: Tensor) -> Stream:
        x_BD = sum_now(linear_residual(h, weight, x_BD if tp.index == 0 else blank_BD), tp)
        return Stream(x_BD, x_BD, norm_D)

    return add


def _start(places: Places, last: Tensor, weight_vD: Tensor, constants: Constants, tp: Axis) -> Start:
    where = places.positions, places.rotary, weight_vD, constants.cos, constants.sin
    if tp.size == 1:
        return start(places.tokens, last, *where)
    own_B = fed(places.tokens, last) - tp.index * len(weight_vD)
    here_B = (own_B >= 0) & (own_B < len(weight_vD))
    at = start(torch.where(here_B, own_B, 0), last, *where)
    return at._replace(x_BD=sum_now(torch.where(here_B[:, None], at.x_BD, 0), tp))


def _chosen(
    cfg: ModelConfig,
    params: P.Params,
    stream: Stream,
    places: Places,
    num_ids: int,
    allowed_V: Tensor | None,
    tp: Axis,
) -> Result:
    """The next token of each row, from the last layer's hidden states."""
    head, normed = model.head_weight(cfg, params), (stream.h_BD, stream.norm_D, cfg.rms_norm_eps)
    if tp.size == 1:
        asked = head, num_ids, places.inv_temperature, places.uniform, allowed_V
        ids_B, log_probs_B, logits_BV, finite_B = head_sample(*normed, *asked)
        return Result(ids_B, log_probs_B, logits_BV, finite_B, pack(ids_B, log_probs_B, finite_B))
    own_ids = min(max(num_ids - tp.index * len(head), 0), len(head))
    own = None if allowed_V is None else allowed_V.chunk(tp.size)[tp.index]
    logits_Bv, sums = head_shard(*normed, head, own_ids, places.inv_temperature, own)
    drawn = choose(logits_Bv, stack_now(sums, tp), own_ids, places.inv_temperature, places.uniform, tp.index, own)
    packed = sum_now(pack(*drawn), tp)
    return Result(packed[0].long(), packed[1].to(logits_Bv.dtype), logits_Bv, packed[2] > 0, packed)


def _attention(cfg: ModelConfig, layer: P.Params, stream: Stream, attend: Callable[..., Tensor], add: Add) -> Stream:
    names = [f"self_attn.{part}_proj" for part in "qkv"]
    weights = tuple(layer[f"{name}.weight"] for name in names)
    biases = tuple(layer[f"{name}.bias"] for name in names) if cfg.attention_bias else None
    qkv = norm_linear(stream.h_BD, stream.norm_D, cfg.rms_norm_eps, weights, biases)
    out = attend(qkv, layer.get("self_attn.q_norm.weight"), layer.get("self_attn.k_norm.weight"))
    x_BD = stream.x_BD + layer["self_attn.o_proj.bias"] if cfg.attention_bias else stream.x_BD
    return add(out, layer["self_attn.o_proj.weight"], x_BD, layer["post_attention_layernorm.weight"])


def _mlp(cfg: ModelConfig, layer: P.Params, stream: Stream, add: Add, next_norm_D: Tensor) -> Stream:
    weights = (layer[f"mlp.{part}_proj.weight"] for part in ("gate", "up"))
    h_BF = norm_swiglu(stream.h_BD, stream.norm_D, cfg.rms_norm_eps, *weights)
    return add(h_BF, layer["mlp.down_proj.weight"], stream.x_BD, next_norm_D)
