"""The engine's passes: prefill, over prompt tokens, and decoding, which gives each row its next token.

Pure functions of (params, cache, batch). They return the cache; the caller must not use the one that it passed in any
more. The scheduler decides which rows and pages a batch has.

B rows · T tokens of a chunk · P pages of a row · V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decode_ends import fed
from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.infer.sampling import SamplingParams, log_prob, sample, streams_at
from qwen3f.model import invariant
from qwen3f.model.kv_cache import KVCache
from qwen3f.model.moe import SparseMLP
from qwen3f.vision.deepstack import Features
from sharding.layout import ONE_DEVICE, Layout


class Inputs(NamedTuple):
    """Inputs of a decoding pass, one number for each place of the batch; all int64 [B].

    Attributes:
      tokens: the token to feed, or −1 − i for the token that place i of the pass before has drawn.
      positions: position of that token in its row.
      slots: where its keys are written, page · page size + place in the page; below the page size for an idle place.
      streams: the row's random stream, see sampling.streams_at.
      forced: the token to take instead of the drawn one, or −1.
      offsets: rotary position minus position, see infer.pictures.Places.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    streams: Tensor
    forced: Tensor
    offsets: Tensor


class Choice(NamedTuple):
    """How some places of the batch choose their token.

    rows: int64, the places; None: all. seen: int64 [rows, most], the tokens of each answer, filled up with −1; or None.
    """

    sampling: SamplingParams
    rows: Tensor | None
    seen: Tensor | None


class Drawn(NamedTuple):
    """Drawn tokens. ids: int64 [B]. log_probs: float32 [B]. finite: bool [B], whether the logits were finite."""

    ids: Tensor
    log_probs: Tensor
    finite: Tensor


Table = Tensor | int  # see PagedLayer
Prefill = Callable[..., KVCache]
Decode = Callable[..., tuple[Tensor, KVCache]]


def make_prefill(cfg: ModelConfig, execution: model.Execution, layout: Layout = ONE_DEVICE) -> Prefill:
    """prefill(params, cache, batch, *, table, span, features) -> the cache with the keys and values of the chunks.

    batch and features as in model.cached.
    """
    forward = model.make_cached_forward(cfg, execution, layout)

    def prefill(
        params: P.Params,
        cache: KVCache,
        batch: dict[str, Tensor],
        *,
        table: Table,
        span: int,
        features: Features | None = None,
    ) -> KVCache:
        return forward(params, cache, batch, table=table, span=span, features=features)[1]

    return prefill


def make_decode(cfg: ModelConfig, execution: model.Execution, layout: Layout = ONE_DEVICE) -> Decode:
    """decode(params, cache, inputs, last, *, table, span) -> (hidden [B, D], cache).

    last: int64, the ids that the pass before has drawn, by place.
    """
    forward = model.make_cached_forward(cfg, execution, layout)

    @torch.no_grad()
    def decode(
        params: P.Params, cache: KVCache, inputs: Inputs, last: Tensor, *, table: Table, span: int
    ) -> tuple[Tensor, KVCache]:
        batch = {
            "tokens": fed(inputs.tokens, last)[:, None],
            "positions": inputs.positions[:, None],
            "rotary": (inputs.positions + inputs.offsets)[:, None],
            "slots": inputs.slots[:, None],
        }
        hidden_B1D, cache = forward(params, cache, batch, table=table, span=span)
        return hidden_B1D[:, 0], cache

    return decode


def make_experts(cfg: ModelConfig, execution: model.Execution) -> Callable[[P.Params, Tensor, Tensor], Tensor]:
    """experts(layer, h_BD, real_B) -> [B, D]: output of a sparse layer's mixture of experts. No token is dropped.

    layer: the parameters of that layer. real_B: bool, false for idle places.
    """
    with torch.device("meta"):
        skeleton = SparseMLP(cfg.replace(moe_drop_tokens=False), execution.experts)

    def experts(layer: P.Params, h_BD: Tensor, real_B: Tensor) -> Tensor:
        weights = {path.removeprefix("mlp."): leaf for path, leaf in layer.items() if path.startswith("mlp.")}
        y_B1D, _ = torch.func.functional_call(skeleton, weights, (h_BD[:, None], real_B[:, None]), strict=True)
        return y_B1D[:, 0]

    return experts


def logits_of(hidden_BD: Tensor, head_VD: Tensor, execution: model.Execution) -> Tensor:
    """The logits [B, V]."""
    return invariant.linear(hidden_BD, head_VD) if execution.invariant else F.linear(hidden_BD, head_VD)


@torch.no_grad()
def training_log_probs(ids_B: Tensor, hidden_BD: Tensor, head_VD: Tensor, temperature_B: Tensor) -> Tensor:
    """float32 [B]: log-probabilities of these tokens, as an invariant training step computes them
    (train.objective.make_numbers)."""
    scaled_BD = hidden_BD / temperature_B[:, None].to(hidden_BD.dtype)
    return invariant.token_log_probs(scaled_BD, head_VD, ids_B).float()


@torch.no_grad()
def draw(
    logits_BV: Tensor, inputs: Inputs, choices: Sequence[Choice], num_ids: int, allowed_V: Tensor | None = None
) -> Drawn:
    """The next token of each place, by the place's Choice: an id below num_ids that is allowed (None: all are)."""
    logits_BV = logits_BV[:, :num_ids]
    finite_B = logits_BV.amax(-1).isfinite() & logits_BV.amin(-1).isfinite()  # amax and amin propagate NaN
    if logits_BV.is_cuda or not finite_B.all():  # on a GPU always: reading finite_B on the host would wait for it
        logits_BV = torch.where(finite_B[:, None], logits_BV, 0)
    logits_BV = _possible(logits_BV, num_ids, allowed_V)
    stream_B = streams_at(inputs.streams, inputs.positions + 1)
    if len(choices) == 1 and choices[0].rows is None:
        ids_B, log_probs_B = _choose(logits_BV, choices[0], stream_B)
    else:
        ids_B = torch.zeros_like(stream_B)
        log_probs_B = torch.zeros(len(stream_B), device=stream_B.device)
        for choice in choices:
            rows = choice.rows
            ids_B[rows], log_probs_B[rows] = _choose(logits_BV[rows], choice, stream_B[rows])
    return Drawn(ids_B, log_probs_B, finite_B)


def _possible(logits_BV: Tensor, num_ids: int, allowed_V: Tensor | None) -> Tensor:
    """[B, num_ids], −inf for ids that are not allowed."""
    logits_BV = logits_BV[:, :num_ids]
    return logits_BV if allowed_V is None else logits_BV.masked_fill(~allowed_V[:num_ids], float("-inf"))


@torch.no_grad()
def force(drawn: Drawn, logits_BV: Tensor, forced_B: Tensor, num_ids: int, allowed_V: Tensor | None = None) -> Drawn:
    """`drawn` with the forced tokens instead, and the model's log-probabilities of them at temperature 1, over the ids
    that can be drawn."""
    ids_B = torch.where(forced_B >= 0, forced_B, drawn.ids)
    found_B = log_prob(_possible(logits_BV, num_ids, allowed_V), forced_B.clamp(min=0))
    return Drawn(ids_B, torch.where(forced_B >= 0, found_B, drawn.log_probs), drawn.finite)


def _choose(logits_BV: Tensor, choice: Choice, stream_B: Tensor) -> tuple[Tensor, Tensor]:
    seen_BV = None
    if choice.seen is not None:
        room = logits_BV.new_zeros(len(logits_BV), 1 + logits_BV.shape[1], dtype=torch.bool)
        seen_BV = room.scatter(1, 1 + choice.seen, True)[:, 1:]  # the filler −1 goes to column 0, which is cut off
    return sample(logits_BV, choice.sampling, stream_B, seen_BV)
