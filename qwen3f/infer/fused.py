"""A decoding pass of a few kernels a layer: one new token a row, as `passes.make_decode` has it, and its choice.

Five launches a dense layer: norm and products for q, k and v; norm, rotation, cache write and attention; product and
residual; norm and SwiGLU; product and residual. Rounding differs from the blocks that train (kernels.row_product).

B rows · D hidden · V vocabulary · P pages of a row
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.head_sample import head_sample
from kernels.linear_residual import linear_residual
from kernels.norm_linear import norm_linear
from kernels.norm_swiglu import norm_swiglu
from kernels.paged_attention import MAX_GROUP, paged_attention
from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.infer.passes import fed
from qwen3f.model.kv_cache import KVCache
from qwen3f.model.moe import SparseMLP
from qwen3f.model.norm import rms_norm
from qwen3f.model.transformer import layer_stacks, unstack_layers


class Places(NamedTuple):
    """One decoding pass, a place of the batch each.

    Attributes:
      tokens: int64 [B], the token to feed, or −1 − i: the one that place i of the pass before has drawn.
      positions: int64 [B], of that token in its row; 0 for an idle place.
      uniform: float64 [B] in [0, 1), what the token is drawn by.
      inv_temperature: float32 [B]; 0 is greedy.
      table: int32 [B, P], the pages of each row; 0 for an idle place.
    """

    tokens: Tensor
    positions: Tensor
    uniform: Tensor
    inv_temperature: Tensor
    table: Tensor


class Result(NamedTuple):
    """ids int64 [B], log_probs float32 [B], logits float32 [B, V], finite bool [B]; see kernels.head_sample.

    packed: float64 [3, B], ids, log_probs and finite in one, for the host.
    """

    ids: Tensor
    log_probs: Tensor
    logits: Tensor
    finite: Tensor
    packed: Tensor


def pack(ids_B: Tensor, log_probs_B: Tensor, finite_B: Tensor) -> Tensor:
    return torch.stack([ids_B.double(), log_probs_B.double(), finite_B.double()])


FusedDecode = Callable[..., tuple[Result, KVCache]]


def fits(cfg: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the kernels take this model."""
    size = cfg.head_dim
    return (
        cfg.qk_norm in ("rms", "none")
        and cfg.hidden_act == "silu"
        and 16 <= size <= 256
        and size & (size - 1) == 0
        and cfg.num_attention_heads // cfg.num_key_value_heads <= MAX_GROUP
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


def make_fused_decode(cfg: ModelConfig, execution: model.Execution, num_ids: int) -> FusedDecode:
    """decode(params, cache, places, last, angles) -> (result, the cache with the new tokens in it).

    last: ids that the pass before has drawn. angles: rope_tables of positions 0, 1, …, each [positions, d/2].
    """
    cfg = cfg.replace(moe_drop_tokens=False)
    stacks = layer_stacks(cfg)
    with torch.device("meta"):
        experts = SparseMLP(cfg, execution.experts) if cfg.sparse_layers else None

    @torch.no_grad()
    def decode(
        params: P.Params, cache: KVCache, places: Places, last: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Result, KVCache]:
        x_BD = F.embedding(fed(places.tokens, last), params[P.EMBED])
        cos, sin = (table[places.positions] for table in angles)
        lengths_B = places.positions.to(torch.int32)
        real_B = places.table[:, 0] > 0 if cfg.sparse_layers else None
        for number, layer in unstack_layers(params, stacks).items():
            attend = functools.partial(
                paged_attention, eps=cfg.rms_norm_eps, cos_BF=cos, sin_BF=sin, k_pages=cache.keys[number],
                v_pages=cache.values[number], table_BP=places.table, lengths_B=lengths_B,
            )  # fmt: skip
            x_BD = _attention(cfg, layer, x_BD, attend)
            x_BD = _experts(cfg, experts, layer, x_BD, real_B) if cfg.is_sparse(number) else _mlp(cfg, layer, x_BD)
        head = model.head_weight(cfg, params), num_ids, places.inv_temperature, places.uniform
        ids_B, log_probs_B, logits_BV, finite_B = head_sample(x_BD, params[P.FINAL_NORM], cfg.rms_norm_eps, *head)
        return Result(ids_B, log_probs_B, logits_BV, finite_B, pack(ids_B, log_probs_B, finite_B)), cache

    return decode


def _attention(cfg: ModelConfig, layer: P.Params, x_BD: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    names = [f"self_attn.{part}_proj" for part in "qkv"]
    weights = tuple(layer[f"{name}.weight"] for name in names)
    biases = tuple(layer[f"{name}.bias"] for name in names) if cfg.attention_bias else None
    qkv = norm_linear(x_BD, layer["input_layernorm.weight"], cfg.rms_norm_eps, weights, biases)
    out = attend(qkv, layer.get("self_attn.q_norm.weight"), layer.get("self_attn.k_norm.weight"))
    x_BD = linear_residual(out, layer["self_attn.o_proj.weight"], x_BD)
    return x_BD + layer["self_attn.o_proj.bias"] if cfg.attention_bias else x_BD


def _mlp(cfg: ModelConfig, layer: P.Params, x_BD: Tensor) -> Tensor:
    norm, weights = (
        layer["post_attention_layernorm.weight"],
        (layer[f"mlp.{part}_proj.weight"] for part in ("gate", "up")),
    )
    return linear_residual(norm_swiglu(x_BD, norm, cfg.rms_norm_eps, *weights), layer["mlp.down_proj.weight"], x_BD)


def _experts(cfg: ModelConfig, skeleton: nn.Module, layer: P.Params, x_BD: Tensor, real_B: Tensor) -> Tensor:
    h_BD = rms_norm(x_BD, layer["post_attention_layernorm.weight"], cfg.rms_norm_eps)
    weights = {path.removeprefix("mlp."): leaf for path, leaf in layer.items() if path.startswith("mlp.")}
    y_B1D, _ = torch.func.functional_call(skeleton, weights, (h_BD[:, None], real_B[:, None]), strict=True)
    return x_BD + y_B1D[:, 0]
