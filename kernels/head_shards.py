"""kernels.head_sample for a vocabulary that is cut over ranks: each rank has the logits of its ids; all find the same
token.

`head_shard` computes this rank's logits, and for each tile the greatest logit, its id and the sum of exponentials. The
ranks exchange these per-tile sums, which are a fiftieth of the logits. `choose` finds the tile from all ranks' sums.
The rank that has the tile finds the id; the others return 0, so a sum over ranks gives the id to all.

B rows · D hidden · v ids of a rank · t tiles of a rank · S ranks
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import row_product
from kernels.backend import runs_triton, triton
from kernels.head_sample import _WARP_TILES, _choose_kernel, _logits_kernel, as_bytes, check_allowed


def head_shard(
    x_BD: Tensor, norm_D: Tensor | None, eps: float, head_vD: Tensor, num_ids: int, inv_temperature_B: Tensor,
    allowed_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logits float32 [B, v], sums float32 [3, B, t]) of this rank's ids; arguments as head_sample's.

    num_ids: the first num_ids of this rank's ids can be drawn, 0 … v. sums: for each tile the greatest tempered logit,
    the sum of exp(tempered logit − greatest), and the greatest's id on this rank, −1 if a logit is not finite. float64
    runs the formula, with one tile.
    """
    row_product.check(x_BD, row_product.norm_of(x_BD, norm_D), {"head": head_vD})
    if not 0 <= num_ids <= len(head_vD):
        raise ValueError(f"num_ids must be 0 … {len(head_vD)}, got {num_ids}")
    check_allowed(allowed_v, head_vD)
    wide = torch.promote_types(x_BD.dtype, torch.float32)
    if not runs_triton(x_BD) or not len(x_BD):
        return _formula(x_BD, norm_D, eps, head_vD, _real(head_vD, num_ids, allowed_v), inv_temperature_B)
    (B, D), v, mask = x_BD.shape, len(head_vD), as_bytes(allowed_v)
    cut = row_product.config(B, v, D)
    tiles = triton.cdiv(v, cut.outputs)
    logits, sums = x_BD.new_empty(B, v, dtype=wide), x_BD.new_empty(3, B, tiles, dtype=wide)
    with torch.cuda.device_of(x_BD):
        _logits_kernel[(triton.cdiv(B, cut.rows) * tiles,)](
            row_product.normed(x_BD, norm_D, eps, cut), norm_D, head_vD, inv_temperature_B, mask, logits, *sums, B, D,
            v, num_ids, eps, MASKED=mask is not None, HAS_NORM=row_product.norms(norm_D, cut),
            **row_product.options(x_BD, cut),
        )  # fmt: skip
    return logits, sums


def choose(
    logits_Bv: Tensor, sums_S3Bt: Tensor, num_ids: int, inv_temperature_B: Tensor, uniform_B: Tensor, shard: int,
    allowed_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(ids int64 [B], logprob [B], finite bool [B]) as from head_sample, on the rank that has the id; 0 on the others.

    sums: of all ranks, in their order. num_ids, allowed: as in head_shard. shard: this rank's number. For a row with
    logits that are not finite, the sum of the ranks' ids is still an id of the vocabulary.
    """
    (B, v), (S, _, _, tiles) = logits_Bv.shape, sums_S3Bt.shape
    if not runs_triton(logits_Bv) or not B:
        real_v = _real(logits_Bv.t(), num_ids, allowed_v)
        return _choose_formula(logits_Bv, sums_S3Bt, real_v, inv_temperature_B, uniform_B, shard)
    ids = logits_Bv.new_empty(B, dtype=torch.int64)
    logprob, finite = torch.empty_like(ids, dtype=logits_Bv.dtype), torch.empty_like(ids, dtype=torch.bool)
    mask = as_bytes(allowed_v)
    padded, outputs = triton.next_power_of_2(S * tiles), row_product.config(B, v, 0).outputs  # whatever D is
    with torch.cuda.device_of(logits_Bv):
        _choose_kernel[(B,)](
            logits_Bv, *sums_S3Bt.unbind(1), inv_temperature_B, uniform_B, mask, ids, logprob, as_bytes(finite), v,
            num_ids, tiles, sums_S3Bt.stride(0), shard, MASKED=mask is not None, SHARDS=S, BN=outputs, PADDED=padded,
            PDL=False, num_warps=max(4, min(16, padded // _WARP_TILES)),
        )  # fmt: skip
    return ids, logprob, finite


def _formula(
    x_BD: Tensor, norm_D: Tensor | None, eps: float, head_vD: Tensor, real: Tensor, inv_temperature_B: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_BD.dtype, torch.float32)
    logits = F.linear(row_product.norm_reference(x_BD, norm_D, eps).to(wide), head_vD.to(wide))
    good = real & logits.isfinite()
    tempered = (logits * _scale(inv_temperature_B).to(wide)).masked_fill(~good, float("-inf"))
    top_B, place_B = tempered.max(-1)
    total_B = (tempered - _finite(top_B)[:, None]).exp().sum(-1)
    wrong_B = (real & ~good).any(-1)
    return logits, torch.stack([top_B, total_B, torch.where(wrong_B, -1, place_B).to(wide)])[..., None]


def _choose_formula(
    logits_Bv: Tensor, sums_S3Bt: Tensor, real_v: Tensor, inv_temperature_B: Tensor, uniform_B: Tensor, shard: int
) -> tuple[Tensor, Tensor, Tensor]:
    tops_SB, totals_SB, places_SB = sums_S3Bt.squeeze(-1).unbind(1)
    S, greedy_B = len(tops_SB), inv_temperature_B == 0
    top_B = _finite(tops_SB.amax(0))
    weights_SB = totals_SB.double() * (tops_SB - top_B).double().exp()
    sums_SB = weights_SB.cumsum(0)
    target_B = uniform_B.double() * sums_SB[-1]
    drawn_B = _first(weights_SB > 0, sums_SB > target_B)
    rest_B = target_B - torch.where(torch.arange(S, device=top_B.device)[:, None] < drawn_B, weights_SB, 0).sum(0)
    own_B = _finite(tops_SB[shard])
    tempered_Bv = logits_Bv * _scale(inv_temperature_B).to(logits_Bv.dtype)
    probs_Bv = torch.where(real_v, tempered_Bv - own_B[:, None], float("-inf")).exp()
    inner_Bv = probs_Bv.cumsum(-1, dtype=torch.float64) * (own_B - top_B).double().exp()[:, None]
    inner_B = _first(probs_Bv.t() > 0, inner_Bv.t() > rest_B)
    best_B = tops_SB.argmax(0)
    mine_B = torch.where(greedy_B, best_B, drawn_B) == shard
    ids_B = torch.where(greedy_B, places_SB[shard].long().clamp(min=0), inner_B)
    logprob_B = tempered_Bv.gather(1, ids_B[:, None])[:, 0] - top_B - sums_SB[-1].log().to(top_B.dtype)
    finite_B = (places_SB >= 0).all(0) & mine_B
    return torch.where(mine_B, ids_B + shard * logits_Bv.shape[1], 0), torch.where(mine_B, logprob_B, 0), finite_B


def _real(like_v: Tensor, num_ids: int, allowed_v: Tensor | None) -> Tensor:
    """bool [v]: which of this rank's ids can be drawn. like: v rows."""
    known = torch.arange(len(like_v), device=like_v.device) < num_ids
    return known if allowed_v is None else known & allowed_v


def _first(possible: Tensor, fits: Tensor) -> Tensor:
    """Along dimension 0, the first index that is possible and fits; if none fits (rounding), the last possible one."""
    places = torch.arange(len(possible), device=possible.device)[:, None]
    first = torch.where(possible & fits, places, len(possible)).amin(0)
    return torch.minimum(first, torch.where(possible, places, 0).amax(0))


def _scale(inv_temperature_B: Tensor) -> Tensor:
    return torch.where(inv_temperature_B == 0, 1.0, inv_temperature_B)[:, None]


def _finite(top_B: Tensor) -> Tensor:
    """Replace −∞, of a shard without a finite logit, by 0."""
    return torch.where(top_B == float("-inf"), 0.0, top_B)
