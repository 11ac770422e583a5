"""Keys and values of the tokens so far, in pages, so that a new token costs one pass of one token.

A row's tokens lie in its pages, in order; its table lists them. Which pages a row has is decided elsewhere
(qwen3f.infer.pages); here they are numbers. Page 0 belongs to no row: padding is written there, and never read.

What one call adds is much smaller than the cache, and a functional update (`index_put`) would copy all of it for every
token. So the update writes into the cache's own storage, and purity is kept one level up, as with JAX's donation: the
cache that goes into a pass is given up, and the same storage comes out. Layers are separate tensors, not one stack: a
compiled pass then writes into its inputs in place, where a write through a view of a stack would copy the stack.

L layers · B rows · T new tokens of each · K key/value heads · P pages of a row · d head_dim
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import params as P
from qwen3f.config import ModelConfig


class KVCache(NamedTuple):
    """keys, values: a tensor [pages, K, page size, d] a layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[2]

    @property
    def pages(self) -> int:
        return self.keys[0].shape[0]


class PagedLayer(NamedTuple):
    """What one layer's attention needs in order to extend its cache and look into it; takes the mask's place.

    keys, values: [pages, K, page size, d], written to.
    slots: int64 [B, T], page · page size + place of each new token; below the page size for padding.
    seen: int32 [B, T]: new token t may see positions 0 … seen[t]−1 of its row.
    table: int64 [B, P], or an int where row b's only page is number table + b: then nothing is gathered.
    span: no row is longer; at most P · page size.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    seen: Tensor
    table: Tensor | int
    span: int


def init_cache(cfg: ModelConfig, params: P.Params, pages: int, page_size: int) -> KVCache:
    """An empty cache of `pages` pages beside page 0, on the parameters' device and in their dtype.

    The number of key/value heads is read from the weights, so on a tensor-parallel shard it is the local one. Zeros,
    since what is masked still takes part in a product with probability 0.
    """
    weights = params[P.LAYERS + "self_attn.k_proj.weight"]
    shape = (1 + pages, weights[0].shape[0] // cfg.head_dim, page_size, cfg.head_dim)

    def empty() -> tuple[Tensor, ...]:
        return tuple(weights[0].new_zeros(shape) for _ in range(len(weights)))

    return KVCache(empty(), empty())


def bytes_of_token(cfg: ModelConfig, params: P.Params) -> int:
    """Bytes that a token takes in the cache."""
    weights = params[P.LAYERS + "self_attn.k_proj.weight"]
    return 2 * len(weights) * weights[0].shape[0] * weights[0].element_size()


def grow_cache(cache: KVCache, pages: int, page_size: int) -> KVCache:
    """The same pages in a larger cache: more of them, longer ones, or both."""
    more = 1 + pages - cache.pages
    grown = [F.pad(x, (0, 0, 0, page_size - cache.page_size, 0, 0, 0, more)) for x in (*cache.keys, *cache.values)]
    return KVCache(tuple(grown[: len(cache.keys)]), tuple(grown[len(cache.keys) :]))


def copy_pages(cache: KVCache, copies: Sequence[tuple[int, int, int]]) -> KVCache:
    """Copies pages (from, to, tokens), one after the other: the first `tokens` of a page, with zeros behind them.

    Zeros, since what stands there belongs to another row, and may not be finite.
    """
    groups: list[list[tuple[int, int, int]]] = [[]]
    for copy in copies:  # what one copy writes may be what a later one reads
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
    """Zeros in pages, or in all of them."""
    which = slice(None) if pages is None else torch.tensor(pages, device=cache.keys[0].device)
    for x in (*cache.keys, *cache.values):
        x[which] = 0


def paged_layers(cache: KVCache, batch: Mapping[str, Tensor], table: Tensor | int, span: int) -> list[PagedLayer]:
    """What each layer gets for a batch with "slots" and "positions" [B, T].

    Padding sees what the token before it sees, or one position: never none, and never fewer, since a kernel may tell
    from a tile's last token how far all of its tokens see (kernels.key_ranges).
    """
    real = batch["slots"] >= cache.page_size
    seen = torch.where(real, batch["positions"] + 1, 1).cummax(1).values.to(torch.int32)
    return [PagedLayer(k, v, batch["slots"], seen, table, span) for k, v in zip(cache.keys, cache.values)]


def extend(layer: PagedLayer, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor]:
    """Write the new keys and values in place; returns those of positions 0 … span−1, each [B, K, span, d].

    IndexError (CPU; a device assertion on CUDA) for a page that the cache lacks.
    """
    size = layer.keys.shape[2]
    page, place = layer.slots // size, layer.slots % size
    for pages, new in ((layer.keys, k_BKTd), (layer.values, v_BKTd)):
        pages[page, :, place] = new.transpose(1, 2)
    keys, values = (rows_of(side, layer.table, len(layer.slots), layer.span) for side in (layer.keys, layer.values))
    return keys, values


def rows_of(pages: Tensor, table: Tensor | int, rows: int, span: int) -> Tensor:
    """[B, K, span, d]: a layer's pages at positions 0 … span−1 of each row. table, span: as in PagedLayer."""
    if isinstance(table, int):
        return pages[table : table + rows, :, :span]
    used = -(-span // pages.shape[2])
    if used == 1:
        return pages[:, :, :span][table[:, 0]]
    return pages[table[:, :used]].transpose(1, 2).flatten(2, 3)[:, :, :span]


def dense_allowed(layer: PagedLayer) -> Tensor:
    """bool [B, 1, T, span], True where a new token may see a position."""
    return (torch.arange(layer.span, device=layer.seen.device) < layer.seen[..., None])[:, None]
