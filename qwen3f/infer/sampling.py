"""From logits to token ids: greedy or filtered sampling, a pure function of (logits, parameters, random stream).

Order of operations: presence penalty, temperature, top-k, top-p, min-p, draw. The penalty comes first as in vLLM; the
rest is the order of transformers' generate. (vLLM applies min-p before top-k and top-p. The two orders can differ only
if min-p is used with top-p, since min-p removes tokens that would have counted towards top-p.)

B rows · V vocabulary · N tiles of n ids
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import rng
from qwen3f.errors import UserError
from qwen3f.finite import as_finite

_LOW_52_BITS = (1 << 52) - 1
TILE = 64  # ids
COLD = 1e-4  # a CUDA graph does not sample at temperatures up to this: logits / temperature could overflow float32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    temperature: divides the logits; 0 is greedy (the largest logit after the penalty; the filters then change nothing).
    top_k: keep the k largest logits, and all that equal the k-th; 0 keeps all.
    top_p: keep the likeliest tokens, as few as have probabilities that sum to at least top_p; 1 keeps all.
    min_p: keep tokens at least min_p times as probable as the likeliest; 0 keeps all.
    presence_penalty: subtracted from the logits of every token that the answer already has (the prompt does not count).
    Raises UserError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        if as_finite(self.temperature) is None or self.temperature < 0:
            raise UserError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
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


def is_plain(way: SamplingParams) -> bool:
    """Whether the sampler of a CUDA graph can do this: greedy, or a temperature without filters and penalty."""
    filtered = way.top_k or way.top_p < 1 or way.min_p
    cold = 0 < way.temperature <= COLD
    return not (way.presence_penalty or cold or (filtered and way.temperature))


def sample(
    logits_BV: Tensor, params: SamplingParams, stream_B: Tensor, seen_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(the next token of each row, int64 [B]; its log-probability, float32 [B]).

    Args:
      logits_BV: any floating dtype. Computed in float32 at least, and in float64 where there are filters.
      stream_B: int64 [B], one random stream a row (see `streams`); not read when greedy.
      seen_BV: bool [B, V], the tokens of the answer so far; read only if there is a presence penalty.
    The log-probability belongs to the distribution that the token is drawn from; for a greedy token, to temperature 1.
    A row's token depends only on its own logits, stream and seen tokens. Logits must be finite.
    """
    if params.presence_penalty:
        logits_BV = penalise(logits_BV, seen_BV, params.presence_penalty)
    if params.temperature == 0:
        ids_B = _largest(logits_BV)
        return ids_B, log_prob(logits_BV, ids_B)
    if params.top_k or params.top_p < 1 or params.min_p:
        scaled_BV = filter_logits(logits_BV, params)
    else:
        scaled_BV = temper(logits_BV, params.temperature)
    ids_B, total_B = _invert(probs_BV := scaled_BV.softmax(-1), uniform(stream_B))
    chosen_B = probs_BV.gather(-1, ids_B[:, None])[:, 0]
    return ids_B, (chosen_B.double() / total_B).log().float()


def uniform(stream_B: Tensor) -> Tensor:
    """float64 [B] in [0, 1), the number that each stream draws."""
    return ((rng.bits(stream_B, torch.zeros_like(stream_B)) >> 12) & _LOW_52_BITS) * 2.0**-52


def _invert(probs_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """(the first id at which the cumulative probability exceeds uniform · total, int64 [B]; the total, float64 [B]).

    Works in two steps, over the sums of tiles, then within one tile, since a float64 cumulative sum over the whole
    vocabulary is slow. uniform has 52 bits, so uniform · total stays below the total even when rounded, and the tile
    exists. Within the tile the sums may round differently, so the target is clamped to the tile's range. A token of
    probability 0 is never drawn.
    """
    tiles_BNn = _tiles(probs_BV, 0.0)
    end_BN = tiles_BNn.sum(-1).cumsum(-1, dtype=torch.float64)
    total_B1 = end_BN[:, -1:]
    target_B1 = uniform_B[:, None] * total_B1
    tile_B1 = torch.searchsorted(end_BN, target_B1, right=True)
    inner_Bn = _tile(tiles_BNn, tile_B1).cumsum(-1, dtype=torch.float64)
    rest_B1 = target_B1 - F.pad(end_BN, (1, 0)).gather(-1, tile_B1)
    below_B1 = torch.nextafter(inner_Bn[:, -1:], torch.zeros_like(rest_B1))
    place_B1 = torch.searchsorted(inner_Bn, rest_B1.clamp(min=0).minimum(below_B1), right=True)
    return (tile_B1 * TILE + place_B1)[:, 0], total_B1[:, 0]


def _largest(logits_BV: Tensor) -> Tensor:
    """argmax, the first of equal values. In two steps, since on a CPU `amax` is many times faster than `argmax`."""
    tiles_BNn = _tiles(logits_BV, -math.inf)
    tile_B1 = tiles_BNn.amax(-1).argmax(-1, keepdim=True)
    return tile_B1[:, 0] * TILE + _tile(tiles_BNn, tile_B1).argmax(-1)


def _tiles(x_BV: Tensor, filled: float) -> Tensor:
    """[B, N, TILE]; the last tile is padded with `filled`."""
    missing = -x_BV.shape[-1] % TILE
    return (F.pad(x_BV, (0, missing), value=filled) if missing else x_BV).unflatten(-1, (-1, TILE))


def _tile(tiles_BNn: Tensor, tile_B1: Tensor) -> Tensor:
    """[B, TILE]: the tile of each row that tile_B1 names."""
    return tiles_BNn.gather(1, tile_B1[..., None].expand(-1, 1, TILE))[:, 0]


def log_prob(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """float32 [B]: the log-probability of each row's token at temperature 1."""
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    return (logits_BV.gather(-1, ids_B[:, None])[:, 0] - logits_BV.logsumexp(-1)).float()


def temper(logits_BV: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, shifted so that the largest of a row is 0: no temperature can overflow it.
    A logit of −inf stays so."""
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    bounds = torch.finfo(shifted_BV.dtype)
    return shifted_BV if temperature == 1 else shifted_BV / min(max(float(temperature), bounds.tiny), bounds.max)


def filter_logits(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """As `temper`, with −inf for tokens that top-k, top-p and min-p remove; float64 [B, V]. temperature > 0."""
    logits_BV = temper(logits_BV.double(), params.temperature)
    if params.top_k:
        kth_B1 = logits_BV.topk(min(params.top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    if params.top_p < 1:
        ascending_BV, order_BV = logits_BV.sort(-1)
        # cumsum: the mass of a token and of all less likely ones; without this mass the rest still reaches top_p
        gone_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - params.top_p
        gone_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(torch.zeros_like(gone_BV).scatter(-1, order_BV, gone_BV), -math.inf)
    if params.min_p:
        floor_B1 = logits_BV.amax(-1, keepdim=True) + math.log(params.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -math.inf)
    return logits_BV


def penalise(logits_BV: Tensor, seen_BV: Tensor, presence_penalty: float) -> Tensor:
    """float64: logits − presence_penalty for each token that was seen, once or more (as OpenAI and vLLM define it).

    seen_BV: bool [B, V].
    """
    return logits_BV.double() - presence_penalty * seen_BV


def stream_of(seed: int, request: int) -> int:
    """The random stream of a request, as a signed 64-bit number. Raises UserError as rng.check_seed."""
    start = torch.tensor(rng.key("generate", rng.check_seed(seed)))
    return int(rng.fold(start, rng.check_seed(request, "stream")))


def streams_at(stream_B: Tensor, position_B: Tensor) -> Tensor:
    """int64 [B]: the random stream of a token. It depends only on the row's stream and the token's position in the row,
    so a row draws the same tokens in any batch, at any place.
    """
    return rng.fold(stream_B, position_B)
