"""A decoding pass of few operators per layer, for a CPU: what `passes.make_decode` computes, without modules.

With one new token per row an operator takes microseconds, as long as the overhead of calling it. So this pass writes
products directly to where they are read, calls operators on parameters without modules, makes masks once for all
layers, and computes attention as two batched products, which for a single query is faster than torch's kernel with a
mask. Results differ from those of the training blocks by rounding. Beyond some thousand cached tokens, reading the
cache takes most of the time.

B rows · D hidden · H query heads · K key/value heads · G = H/K · d head_dim · F = d/2 · S positions looked at
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decode_ends import fed
from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.infer.passes import Decode, Inputs, Table, make_experts
from qwen3f.model.kv_cache import KVCache, rows_of
from qwen3f.model.mlp import ACTIVATIONS
from qwen3f.model.rope import rope_tables
from qwen3f.model.transformer import layer_stacks, unstack_layers


class _Places(NamedTuple):
    """Tensors that all layers share.

    cos, sin: [B, 1, F]. written: int64 [B·K], indices of new keys in the pages viewed as [pages · K · page size, d].
    bias: [B·K, 1, S], 0 where a row may attend and −∞ elsewhere. table, span: as in PagedLayer.
    """

    cos: Tensor
    sin: Tensor
    written: Tensor
    bias: Tensor
    table: Table
    span: int


def fits(cfg: ModelConfig, execution: model.Execution, dtype: torch.dtype) -> bool:
    """Whether this pass supports the model, `execution` and dtype."""
    plain = execution.attention in ("auto", "sdpa") and not execution.invariant
    return plain and cfg.qk_norm in ("rms", "none") and dtype in (torch.float32, torch.float64)


def make_lean_decode(cfg: ModelConfig, execution: model.Execution) -> Decode:
    """As passes.make_decode, on one device."""
    stacks = layer_stacks(cfg)
    experts = make_experts(cfg, execution) if cfg.sparse_layers else None

    @torch.no_grad()
    def decode(
        params: P.Params, cache: KVCache, inputs: Inputs, last: Tensor, *, table: Table, span: int
    ) -> tuple[Tensor, KVCache]:
        x_BD = F.embedding(fed(inputs.tokens, last), params[P.EMBED])
        places = _places(cfg, cache, inputs, table, span, x_BD.dtype)
        real_B = inputs.slots >= cache.page_size if cfg.sparse_layers else None
        for number, layer in unstack_layers(params, stacks).items():
            h_BD = _norm(x_BD, layer["input_layernorm.weight"], cfg.rms_norm_eps)
            x_BD = _attention(cfg, layer, h_BD, x_BD, (cache.keys[number], cache.values[number]), places)
            h_BD = _norm(x_BD, layer["post_attention_layernorm.weight"], cfg.rms_norm_eps)
            x_BD = x_BD + experts(layer, h_BD, real_B) if cfg.is_sparse(number) else _mlp(cfg, layer, h_BD, x_BD)
        return _norm(x_BD, params[P.FINAL_NORM], cfg.rms_norm_eps), cache

    return decode


def _places(cfg: ModelConfig, cache: KVCache, inputs: Inputs, table: Table, span: int, dtype: torch.dtype) -> _Places:
    size, heads = cache.page_size, cache.keys[0].shape[1]
    cos, sin = rope_tables(cfg, (inputs.positions + inputs.offsets)[:, None], dtype)
    head_K = torch.arange(heads)
    written_BK = ((inputs.slots // size)[:, None] * heads + head_K) * size + (inputs.slots % size)[:, None]
    # an idle place attends to one position: with none, its softmax would be NaN
    seen_B = torch.where(inputs.slots >= size, inputs.positions, 0)
    hidden_BS = torch.arange(span) > seen_B[:, None]
    bias_BS = torch.zeros(hidden_BS.shape, dtype=dtype).masked_fill_(hidden_BS, float("-inf"))
    return _Places(cos, sin, written_BK.flatten(), bias_BS.repeat_interleave(heads, 0)[:, None], table, span)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """model.norm.rms_norm in three passes over x."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


def _attention(
    cfg: ModelConfig, layer: P.Params, h_BD: Tensor, x_BD: Tensor, pages: tuple[Tensor, Tensor], places: _Places
) -> Tensor:
    K, d = pages[0].shape[1], cfg.head_dim
    H = cfg.num_attention_heads
    qkv = h_BD.new_empty(len(h_BD), (H + 2 * K) * d)
    for part, out in zip("qkv", qkv.split((H * d, K * d, K * d), dim=1)):
        weight, bias = layer[f"self_attn.{part}_proj.weight"], layer.get(f"self_attn.{part}_proj.bias")
        torch.mm(h_BD, weight.t(), out=out) if bias is None else torch.addmm(bias, h_BD, weight.t(), out=out)
    heads_BNd = qkv.unflatten(1, (-1, d))
    turned = heads_BNd[:, : H + K]
    if cfg.qk_norm == "rms":
        weights = [layer["self_attn.q_norm.weight"].expand(H, d), layer["self_attn.k_norm.weight"].expand(K, d)]
        turned = _norm(turned, torch.cat(weights), cfg.rms_norm_eps)
    turned = _turn(turned, places.cos, places.sin)
    for side, new_BKd in zip(pages, (turned[:, H:], heads_BNd[:, H + K :])):
        side.view(-1, d).index_copy_(0, places.written, new_BKd.flatten(0, 1))
    keys, values = (rows_of(side, places.table, len(x_BD), places.span).flatten(0, 1) for side in pages)
    q = turned[:, :H].reshape(len(keys), -1, d)
    scores = torch.baddbmm(places.bias, q, keys.mT, alpha=d**-0.5)
    out_BN = torch.bmm(scores.softmax(-1), values).view(len(x_BD), -1)
    back = torch.addmm(x_BD, out_BN, layer["self_attn.o_proj.weight"].t())
    return back.add_(layer["self_attn.o_proj.bias"]) if cfg.attention_bias else back


def _turn(x_BNd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """model.rope.apply_rope, written into one tensor."""
    out = torch.empty_like(x_BNd, memory_format=torch.contiguous_format)
    (first, second), (low, high) = x_BNd.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return out


def _mlp(cfg: ModelConfig, layer: P.Params, h_BD: Tensor, x_BD: Tensor) -> Tensor:
    gate, up = (torch.mm(h_BD, layer[f"mlp.{part}_proj.weight"].t()) for part in ("gate", "up"))
    return torch.addmm(x_BD, ACTIVATIONS[cfg.hidden_act](gate).mul_(up), layer["mlp.down_proj.weight"].t())
