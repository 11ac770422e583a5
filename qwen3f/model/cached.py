"""The model with a KV cache: one function for the prompt (T > 1) and for the tokens after it (T = 1).

B rows · T new tokens per row · D hidden · P pages per row
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

    The cache is donated: its storage is written to and returned (qwen3f.model.kv_cache). batch:
        tokens     int64 [B, T]
        positions  int64 [B, T], each token's index in its row
        slots      int64 [B, T], where a token's keys and values go: page · page size + index in the page; below the
                   page size (page 0) for padding, whose hidden states are meaningless
        rotary     int64 [B, T] or [B, 3, T], positions for the rotation; default: positions
        visual_index  int32 [B, T], only with features, see vision.deepstack.place_features
    table: int64 [B, P], the pages of each row, or an int, see PagedLayer. span: an upper limit for the length of the
    rows, with the new tokens. features: the images', from the vision tower.

    Skeletons are built here, once, because modules can't be built inside a compiled step. No gradients flow through the
    cache. There is no dropout and no recomputation. moe_drop_tokens has no effect, because a row's result must not
    depend on other rows.
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
