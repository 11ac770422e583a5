"""The model with a key/value cache: one function for the prompt (T > 1) and for the tokens after it (T = 1).

B rows · T new tokens of each · D hidden · P pages of a row
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.model.execution import EAGER, Execution
from qwen3f.model.kv_cache import KVCache, paged_layers
from qwen3f.model.transformer import make_body
from qwen3f.vision.deepstack import Features, place_features
from sharding.layout import ONE_DEVICE, Layout

CachedForward = Callable[..., tuple[Tensor, KVCache]]


def make_cached_forward(cfg: ModelConfig, execution: Execution = EAGER, layout: Layout = ONE_DEVICE) -> CachedForward:
    """forward(params, cache, batch, *, table, span, features=None) -> (hidden states of the new tokens [B, T, D], the
    cache).

    The cache is given up: its storage is written to and returned (qwen3f.model.kv_cache). batch:
        tokens     int64 [B, T]
        positions  int64 [B, T], of each token in its row
        slots      int64 [B, T], where its keys go: page · page size + place; below the page size for padding, whose
                   hidden states mean nothing
        rotary     int64 [B, T] or [B, 3, T], where it turns to; default: positions
        visual_index  int32 [B, T], where there are features, see vision.deepstack.place_features
    table: int64 [B, P], the pages of each row, or an int, see PagedLayer. span: no row is longer, with the new tokens.

    Skeletons are built here, once, since that cannot happen inside a compiled step. No gradients flow through the
    cache. Attention's dropout is off, and nothing is recomputed. moe_drop_tokens has no effect: what a row gets must
    not depend on the rows beside it.
    """
    cfg = cfg.replace(gradient_checkpointing="none", moe_drop_tokens=False)
    body = make_body(cfg, execution, layout)

    @torch.no_grad()
    def forward(
        params: P.Params,
        cache: KVCache,
        batch: Mapping[str, Tensor],
        *,
        table: Tensor | int,
        span: int,
        features: Features | None = None,
    ) -> tuple[Tensor, KVCache]:
        real = batch["slots"] >= cache.page_size if cfg.sparse_layers else None
        layers = paged_layers(cache, batch, table, span)
        rotary = batch.get("rotary", batch["positions"])
        visual = None if features is None else place_features(features, batch["visual_index"], layout.axes.tp)
        return body(params, batch["tokens"], rotary, layers, real, visual=visual)[0], cache

    return forward
