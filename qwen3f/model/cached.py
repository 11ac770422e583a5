"""The model with a key/value cache: one function for the prompt (T > 1) and for the tokens after it (T = 1).

B batch · T new tokens · D hidden · V vocabulary
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.model.execution import EAGER, Execution
from qwen3f.model.kv_cache import KVCache, copy_cache, place
from qwen3f.model.transformer import head_weight, make_body

CachedForward = Callable[..., tuple[Tensor, KVCache]]
CachedHidden = Callable[..., tuple[Tensor, KVCache]]


def apply_cached(
    cfg: ModelConfig,
    params: P.Params,
    batch: Mapping[str, Tensor],
    cache: KVCache,
    execution: Execution = EAGER,
    *,
    span: int | None = None,
    last: bool = False,
    donate: bool = False,
) -> tuple[Tensor, KVCache]:
    """(logits of the new tokens [B, T, V], the cache with them in it).

    Args:
      params: as for qwen3f.model.apply.
      batch: "tokens" int64 [B, T], which follow what the cache holds; optional "segments" int32 [B, T], 0 for padding
        (left or anywhere; its logits mean nothing). Positions follow from the cache's lengths.
      span: look at the first `span` positions only, for speed; at least every row's length after the call. Default: the
        cache's max_len. Static: compiled code is compiled for one value.
      last: only the logits of the last column, [B, 1, V].
      donate: the cache's storage is given up and returned, see qwen3f.model.kv_cache. Otherwise `cache` stays as it is.
    No gradients flow through the cache. Raises IndexError (CPU) when a row outgrows the cache.
    """
    return make_cached_forward(cfg, execution)(params, batch, cache, span=span, last=last, donate=donate)


def make_cached_forward(cfg: ModelConfig, execution: Execution = EAGER) -> CachedForward:
    """forward(params, batch, cache, *, span, last, donate) as in `apply_cached`. Built once, as make_cached_hidden."""
    hidden_of = make_cached_hidden(cfg, execution)

    @torch.no_grad()
    def forward(
        params: P.Params,
        batch: Mapping[str, Tensor],
        cache: KVCache,
        *,
        span: int | None = None,
        last: bool = False,
        donate: bool = False,
    ) -> tuple[Tensor, KVCache]:
        hidden, cache = hidden_of(params, batch, cache, span=span, donate=donate)
        return F.linear(hidden[:, -1:] if last else hidden, head_weight(cfg, params)), cache

    return forward


def make_cached_hidden(cfg: ModelConfig, execution: Execution = EAGER) -> CachedHidden:
    """hidden(params, batch, cache, *, span, donate) -> ([B, T, D] after the final norm, the cache), without the head.

    For callers that need the logits of a few places only. Arguments as in `apply_cached`.

    Skeletons are built here, once, since that cannot happen inside a compiled step. Attention's dropout is off, and
    nothing is recomputed. moe_drop_tokens has no effect: what a row gets must not depend on the rows beside it.
    """
    cfg = cfg.replace(gradient_checkpointing="none", moe_drop_tokens=False)
    body = make_body(cfg, execution)

    @torch.no_grad()
    def hidden_of(
        params: P.Params, batch: Mapping[str, Tensor], cache: KVCache, *, span: int | None = None, donate: bool = False
    ) -> tuple[Tensor, KVCache]:
        tokens, segments = batch["tokens"], batch.get("segments")
        real = torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments != 0
        positions, layers, cache = place(cache if donate else copy_cache(cache), real, span or cache.max_len)
        return body(params, tokens, positions, layers)[0], cache

    return hidden_of
