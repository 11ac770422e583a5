"""The paged KV cache: keys and values of the tokens so far, so that a new token costs a pass of one token only.

A row's tokens are in its pages, in order; the row's table lists the pages' numbers. qwen3f.infer.pages decides which
pages a row has. Page 0 belongs to no row: padding is written there, and never read.

A functional update (`index_put`) would copy the whole cache for every token. So the update writes into the cache's own
storage, and the cache is donated, as in JAX: the cache that is passed in must not be used again, and its storage is
returned. Layers are separate tensors instead of one stack, because a compiled pass can write into its inputs in place,
but a write through a view of a stack would copy the stack.

L layers · B rows · T new tokens per row · K key/value heads · P pages per row · d head_dim
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import params as P
from qwen3f.config import ModelConfig


class KVCache(NamedTuple):
    """keys, values: one tensor [pages, K, page size, d] per layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[2]

    @property
    def pages(self) -> int:
        return self.keys[0].shape[0]


class PagedLayer(NamedTuple):
    """One layer's part of the cache, with what its attention needs to extend and read it; it replaces the mask.

    keys, values: [pages, K, page size, d], written in place.
    slots: int64 [B, T], page · page size + index in the page, of each new token; below the page size for padding.
    seen: int32 [B, T]: new token t sees positions 0 … seen[t]−1 of its row.
    table: int64 [B, P], the pages of each row. Or an int, if row b has the single page table + b: then the pages are
      contiguous and need no gather.
    span: an upper limit for the length of the rows; at most P · page size.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    seen: Tensor
    table: Tensor | int
    span: int


def init_cache(cfg: ModelConfig, params: P.Params, pages: int, page_size: int) -> KVCache:
    """An empty cache of `pages` pages in addition to page 0, on the parameters' device and in their dtype.

    The number of key/value heads is read from the weights, so on a tensor-parallel shard it is the local one. The cache
    is filled with zeros, because masked values are multiplied by probability 0 and so must be finite.
    """
    weights = params[P.LAYERS + "self_attn.k_proj.weight"]
    shape = (1 + pages, weights[0].shape[0] // cfg.head_dim, page_size, cfg.head_dim)

    def empty() -> tuple[Tensor, ...]:
        return tuple(weights[0].new_zeros(shape) for _ in range(len(weights)))

    return KVCache(empty(), empty())


def bytes_of_token(cfg: ModelConfig, params: P.Params) -> int:
    """Bytes per token in the cache, over all layers."""
    weights = params[P.LAYERS + "self_attn.k_proj.weight"]
    return 2 * len(weights) * weights[0].shape[0] * weights[0].element_size()


def grow_cache(cache: KVCache, pages: int, page_size: int) -> KVCache:
    """Copy the pages into a larger cache: with more pages, longer pages, or both."""
    more = 1 + pages - cache.pages
    grown = [F.pad(x, (0, 0, 0, page_size - cache.page_size, 0, 0, 0, more)) for x in (*cache.keys, *cache.values)]
    return KVCache(tuple(grown[: len(cache.keys)]), tuple(grown[len(cache.keys) :]))


def copy_pages(cache: KVCache, copies: Sequence[tuple[int, int, int]]) -> KVCache:
    """Copy pages, in order; each copy is (from, to, tokens): the first `tokens` of a page, with zeros after them.

    Zeros, because the rest of the page belongs to another row and may not be finite.
    """
    groups: list[list[tuple[int, int, int]]] = [[]]
    for copy in copies:  # a copy that reads a page which this group writes starts a new group
        if any(copy[0] == written for _, written, _ in groups[-1]):
            groups.append([])
        groups[-1].append(copy)
    device = cache.keys[0].device
    for group in filter(None, groups):
        source, target, tokens = (torch.tensor(side, device=device) for side in zip(*group))
        kept = (torch.arange(cache.page_size, device=device) < tokens[:, None])[:, None, :, None]
        for x in (*cache.keys, *cache.values):
            x[target] = x[source].where(kept, 0)
    return cache


def erase_pages(cache: KVCache, pages: Sequence[int] | None = None) -> None:
    """Fill the given pages with zeros; None: all pages."""
    which = slice(None) if pages is None else torch.tensor(pages, device=cache.keys[0].device)
    for x in (*cache.keys, *cache.values):
        x[which] = 0


def paged_layers(cache: KVCache, batch: Mapping[str, Tensor], table: Tensor | int, span: int) -> list[PagedLayer]:
    """One PagedLayer per layer, for a batch with "slots" and "positions" [B, T].

    A padding token sees as many positions as the token before it, and at least one: a kernel may take the last token of
    a tile for the furthest position that the tile sees (kernels.key_ranges).
    """
    real = batch["slots"] >= cache.page_size
    seen = torch.where(real, batch["positions"] + 1, 1).cummax(1).values.to(torch.int32)
    return [PagedLayer(k, v, batch["slots"], seen, table, span) for k, v in zip(cache.keys, cache.values)]


def extend(layer: PagedLayer, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor]:
    """Write the new keys and values in place. Returns keys and values of positions 0 … span−1, each [B, K, span, d].

    IndexError (CPU; a device assertion on CUDA) for a page that the cache lacks.
    """
    size = layer.keys.shape[2]
    page, place = layer.slots // size, layer.slots % size
    for pages, new in ((layer.keys, k_BKTd), (layer.values, v_BKTd)):
        pages[page, :, place] = new.transpose(1, 2)
    keys, values = (rows_of(side, layer.table, len(layer.slots), layer.span) for side in (layer.keys, layer.values))
    return keys, values


def rows_of(pages: Tensor, table: Tensor | int, rows: int, span: int) -> Tensor:
    """[B, K, span, d]: a layer's keys or values at positions 0 … span−1 of each row. table, span: as in PagedLayer."""
    if isinstance(table, int):
        return pages[table : table + rows, :, :span]
    used = -(-span // pages.shape[2])
    if used == 1:
        return pages[:, :, :span][table[:, 0]]
    return pages[table[:, :used]].transpose(1, 2).flatten(2, 3)[:, :, :span]


def dense_allowed(layer: PagedLayer) -> Tensor:
    """bool [B, 1, T, span], True where a new token sees a position."""
    return (torch.arange(layer.span, device=layer.seen.device) < layer.seen[..., None])[:, None]
