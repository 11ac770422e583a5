"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) with YaRN scaling (Peng et al. 2023, arXiv:2309.00071).

Tokens with positions in time, height and width use interleaved MRoPE (Qwen3-VL, arXiv:2511.21631, §2.1).

B batch · T sequence · H heads · d head_dim
"""

import math

import torch
from torch import Tensor

from qwen3f.config import ModelConfig, RopeScaling


def inverse_frequencies(cfg: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    """(inv_freq [d/2] in radians per token, factor on cos and sin)."""
    exponent = torch.arange(0, cfg.head_dim, 2, device=device, dtype=dtype) / cfg.head_dim
    inv_freq = 1.0 / (cfg.rope_theta**exponent)
    if cfg.rope_scaling is None:
        return inv_freq, 1.0
    return _yarn(inv_freq, cfg.rope_scaling, cfg.rope_theta, cfg.head_dim)


def _yarn(inv_freq: Tensor, yarn: RopeScaling, theta: float, head_dim: int) -> tuple[Tensor, float]:
    """Divides slow frequencies by the factor and keeps fast ones, with a linear ramp in between (transformers' form).

    It is static: it applies to texts of every length.
    """

    def dimension(rotations: float) -> float:  # the pair that makes `rotations` full turns over the original context
        length = yarn.original_max_position_embeddings
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pair = torch.arange(head_dim // 2, device=inv_freq.device, dtype=inv_freq.dtype)
    slow = ((pair - low) / (high - low)).clamp(0, 1)
    scale = yarn.attention_factor
    if scale is None:
        scale = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return inv_freq / yarn.factor * slow + inv_freq * (1 - slow), scale


def rope_tables(cfg: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, T, d/2] in `dtype`, for int64 positions [B, T], or [B, 3, T] in time, height and width.

    Angles are computed in float32 (float64 for a float64 model) and cast at the end, as transformers does. The tables
    have d/2 columns, because both halves of a head rotate by the same angles.
    """
    wide = torch.promote_types(dtype, torch.float32)
    inv_freq, scale = inverse_frequencies(cfg, wide, positions.device)
    if positions.dim() == 2:
        place = positions[..., None]
    else:
        place = positions.transpose(1, 2)[..., pair_axes(cfg, positions.device)]
    angles = place.to(wide) * inv_freq
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def pair_axes(cfg: ModelConfig, device: torch.device) -> Tensor:
    """int64 [d/2]: the axis whose position rotates each pair: 0 time, 1 height, 2 width.

    The axes alternate. mrope_section says how many pairs height and width get; all others are time's.
    """
    pair = torch.arange(cfg.head_dim // 2, device=device)
    _, height, width = cfg.mrope_section
    turns = pair % 3
    taken = ((turns == 1) & (pair < 3 * height)) | ((turns == 2) & (pair < 3 * width))
    return torch.where(taken, turns, 0)


def apply_rope(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension pairs (i, i + d/2) of every head; cos, sin [B, T, d/2]. Same shape and dtype as x."""
    first, second = x_BTHd.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
