"""Keys and values of the tokens so far, so that a new token costs one pass of one token.

A token's slot is its position in its own row: a row's padding takes no slot, so a left-padded row has the same cache as
alone, and rows of different lengths share one batch.

What one call adds is much smaller than the cache, and a functional update (`index_put`) would copy all of it for every
token. So the update writes into the cache's own storage, and purity is kept one level up, as with JAX's donation:
`apply_cached` first copies a cache that its caller wants to keep, and a caller who gives it up (`donate=True`, as
`generate` does) gets the same storage back. Layers are separate tensors, not one stack: a compiled step then writes
into its inputs in place, where a write through a view of a stack would copy the stack.

L layers · B batch · T new tokens · K key/value heads · S slots · d head_dim
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f import params as P
from qwen3f import tree
from qwen3f.config import ModelConfig


class KVCache(NamedTuple):
    """keys, values: a tensor [B, K, 1 + S, d] a layer. lengths: int64 [B], the tokens that each row has so far.

    Slot 0 takes the keys and values of padding and is never read; position p lives in slot 1 + p.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor

    @property
    def max_len(self) -> int:
        return self.keys[0].shape[2] - 1


class LayerCache(NamedTuple):
    """What one layer's attention needs in order to extend its cache and look into it; takes the mask's place.

    keys, values: [B, K, 1 + S, d], written to. slots: int64 [B, T], where the new tokens go. seen: int32 [B, T]: new
    token t may see positions 0 … seen[t]−1, all below `span`.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    seen: Tensor
    span: int


def init_cache(cfg: ModelConfig, params: P.Params, batch: int, max_len: int) -> KVCache:
    """An empty cache for rows of up to `max_len` tokens, on the parameters' device and in their dtype.

    The number of key/value heads is read from the weights, so on a tensor-parallel shard it is the local one. Zeros,
    since what is masked still takes part in a product with probability 0.
    """
    weights = params[P.LAYERS + "self_attn.k_proj.weight"]
    shape = (batch, weights[0].shape[0] // cfg.head_dim, 1 + max_len, cfg.head_dim)

    def empty() -> tuple[Tensor, ...]:
        return tuple(weights[0].new_zeros(shape) for _ in range(len(weights)))

    return KVCache(empty(), empty(), torch.zeros(batch, dtype=torch.int64, device=weights[0].device))


def copy_cache(cache: KVCache) -> KVCache:
    return tree.map(torch.clone, cache)


def place(cache: KVCache, real_BT: Tensor, span: int) -> tuple[Tensor, list[LayerCache], KVCache]:
    """(positions int64 [B, T] of new tokens, what each layer gets, the cache once all layers have written).

    real_BT: bool, False for padding, which may stand anywhere in a row. Padding sees the tokens before it, or else the
    first slot, so that no row of scores is empty.
    """
    rank_BT = real_BT.to(torch.int64).cumsum(1)
    positions_BT = torch.where(real_BT, cache.lengths[:, None] + rank_BT - 1, 0)
    slots_BT = torch.where(real_BT, positions_BT + 1, 0)
    seen_BT = (cache.lengths[:, None] + rank_BT).clamp(min=1).to(torch.int32)
    layers = [LayerCache(k, v, slots_BT, seen_BT, span) for k, v in zip(cache.keys, cache.values)]
    # not _replace, which loses the layers when torch 2.11 compiles it
    return positions_BT, layers, KVCache(cache.keys, cache.values, cache.lengths + rank_BT[:, -1])


def extend(layer: LayerCache, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor]:
    """Write the new keys and values in place; returns those of positions 0 … span−1, each [B, K, span, d].

    IndexError (CPU; a device assertion on CUDA) for a row beyond max_len.
    """
    row_B1 = torch.arange(k_BKTd.shape[0], device=k_BKTd.device)[:, None]
    layer.keys[row_B1, :, layer.slots] = k_BKTd.transpose(1, 2)
    layer.values[row_B1, :, layer.slots] = v_BKTd.transpose(1, 2)
    end = 1 + layer.span
    return layer.keys[:, :, 1:end], layer.values[:, :, 1:end]


def dense_allowed(layer: LayerCache) -> Tensor:
    """bool [B, 1, T, span], True where a new token may see a position."""
    return (torch.arange(layer.span, device=layer.seen.device) < layer.seen[..., None])[:, None]
