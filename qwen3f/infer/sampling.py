"""From logits to token ids: greedy or filtered sampling, a pure function of (logits, parameters, random stream).

Order of operations: presence penalty, temperature, top-k, top-p, min-p, draw. The penalty comes first as in vLLM; the
rest is the order of transformers' generate. (vLLM applies min-p before top-k and top-p. The two orders differ only
where all three are in use, since min-p takes away tokens that would have counted towards top-p.)

B rows · V vocabulary
"""

import dataclasses
import math

import torch
from torch import Tensor

from qwen3f import rng
from qwen3f.errors import UserError

_LOW_52_BITS = (1 << 52) - 1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    temperature: divides the logits; 0 is greedy (the largest logit after the penalty; the filters then change nothing).
    top_k: keep the k largest logits, and what equals the k-th; 0 keeps all.
    top_p: keep the fewest likely tokens whose probabilities sum to at least top_p; 1 keeps all.
    min_p: keep tokens at least min_p times as probable as the likeliest; 0 keeps all.
    presence_penalty: taken from the logits of every token that the answer already has (the prompt does not count).
    Raises UserError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k != int(self.top_k) or self.top_k < 0:
            raise UserError(f"top_k must be a whole number of tokens, 0 for all, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], 1 for all tokens, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1], 0 for all tokens, got {self.min_p}")
        if not -2 <= self.presence_penalty <= 2:
            raise UserError(f"presence_penalty must lie in [-2, 2], 0 for none, got {self.presence_penalty}")


GREEDY = SamplingParams()
# What Qwen3 recommends (technical report, arXiv:2505.09388, §4.6; the penalty is for the non-thinking mode alone).
THINKING = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
NON_THINKING = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)


def sample(logits_BV: Tensor, params: SamplingParams, stream_B: Tensor, seen_BV: Tensor) -> Tensor:
    """The next token of each row, int64 [B].

    Args:
      logits_BV: any floating dtype; computed in float64 from here on.
      stream_B: int64 [B], one random stream a row (see `streams`); not read when greedy.
      seen_BV: bool [B, V], the tokens of the answer so far; read only if there is a presence penalty.
    A row's token depends on its own logits, stream and seen tokens alone. Logits must be finite.
    """
    if params.presence_penalty:
        logits_BV = penalise(logits_BV, seen_BV, params.presence_penalty)
    if params.temperature == 0:
        return logits_BV.argmax(-1)
    # Inverse of the cumulative distribution. 52 bits of a uniform number, so that u · total stays below the total even
    # when rounded and the draw never falls behind the last token; a token of probability 0 is never drawn.
    cumulative_BV = filter_logits(logits_BV, params).softmax(-1).cumsum(-1)
    uniform_B1 = ((rng.bits(stream_B, torch.zeros_like(stream_B)) >> 12) & _LOW_52_BITS)[:, None] * 2.0**-52
    return torch.searchsorted(cumulative_BV, uniform_B1.double() * cumulative_BV[:, -1:], right=True)[:, 0]


def filter_logits(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Logits over the temperature, −inf for what top-k, top-p and min-p take away; float64 [B, V]. temperature > 0.

    The largest of a row is 0: so no temperature, however small, makes it infinite.
    """
    logits_BV = logits_BV.double()
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / params.temperature
    if params.top_k:
        kth_B1 = logits_BV.topk(min(params.top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    if params.top_p < 1:
        ascending_BV, order_BV = logits_BV.sort(-1)
        # what lies at or below a token in likelihood; a token goes if that mass is not needed to reach top_p
        gone_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - params.top_p
        gone_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(torch.zeros_like(gone_BV).scatter(-1, order_BV, gone_BV), -math.inf)
    if params.min_p:
        floor_B1 = logits_BV.amax(-1, keepdim=True) + math.log(params.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -math.inf)
    return logits_BV


def penalise(logits_BV: Tensor, seen_BV: Tensor, presence_penalty: float) -> Tensor:
    """logits − presence_penalty where a token was seen, whatever the number of times (OpenAI's and vLLM's definition).

    seen_BV: bool [B, V]. Float64.
    """
    return logits_BV.double() - presence_penalty * seen_BV


def streams(seed: int, request_B: Tensor, position_B: Tensor) -> Tensor:
    """int64 [B]: the random stream of each row's token, from (seed, request, position in the row) alone.

    So a row draws the same tokens in any batch, at any place, with any padding.
    """
    start = torch.tensor(rng.key("generate", seed), device=request_B.device)
    return rng.fold(rng.fold(start, request_B), position_B)
