"""The vision tower's blocks (Qwen3-VL, arXiv:2511.21631): pre-norm, with biases, rotary positions in height and width.

A patch attends to the patches of its own frame. Rows are packed: one frame after the other, then padding.

B rows · P patches of a row · C width · H heads · d head size
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import document_attention, flash_attention
from kernels.document_attention import Run
from kernels.key_ranges import KeyRanges, dense_mask, key_ranges
from qwen3f.config import ModelConfig
from qwen3f.vision.patch_split import all_patches
from sharding.axes import ONE, Axes

EPS = 1e-6  # of every LayerNorm
THETA = 1e4  # rotary base


class FrameMask(NamedTuple):
    """The attention mask of patches, in the form of the attention that is used; exactly one field is set.

    ranges: for kernels.flash_attention. allowed: bool [B, 1, P, patches of all ranks]. frames: runs of patches that
    form a frame, for kernels.document_attention.
    """

    ranges: KeyRanges | None = None
    allowed: Tensor | None = None
    frames: tuple[Run, ...] | None = None


def frame_mask(starts_BP: Tensor, ends_BP: Tensor, keys: int, backend: str, head_dim: int, compiled: bool) -> FrameMask:
    """The mask from the first and last + 1 patch of each patch's frame.

    starts, ends: for padding, the patch itself, so that no row of the mask is empty. keys: patches of a row on all
    ranks. compiled: whether the blocks are compiled.
    """
    ranges = key_ranges(starts_BP, ends_BP, keys)
    on_gpu = starts_BP.is_cuda and flash_attention.fits(head_dim)
    if backend == "flash" or (backend == "auto" and on_gpu):
        return FrameMask(ranges=ranges)
    if backend == "auto" and not compiled and keys == starts_BP.shape[1] and document_attention.can(starts_BP):
        return FrameMask(frames=document_attention.runs_of(ranges.lo))
    return FrameMask(allowed=dense_mask(ranges))


def attend(q_BHPd: Tensor, k_BHPd: Tensor, v_BHPd: Tensor, mask: FrameMask, backend: str) -> Tensor:
    """softmax(q kᵀ/√d) v over the patches of the same frame, [B, H, P, d]."""
    if mask.ranges is not None:
        return flash_attention.flash_attention(q_BHPd, k_BHPd, v_BHPd, ranges=mask.ranges)[0]
    if mask.frames is not None:
        return document_attention.attend(q_BHPd, k_BHPd, v_BHPd, mask.frames, causal=False)
    odd = torch.compiler.is_compiling() and q_BHPd.dtype == torch.float64 and not q_BHPd.is_cuda
    if backend != "reference" and not odd:  # torch 2.11 compiles the CPU's float64 kernel with a wrong dtype
        return F.scaled_dot_product_attention(q_BHPd, k_BHPd, v_BHPd, attn_mask=mask.allowed)
    scores = (q_BHPd @ k_BHPd.transpose(-1, -2)) * q_BHPd.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask.allowed, float("-inf"))
    return scores.softmax(-1).to(q_BHPd.dtype) @ v_BHPd


def rotary_tables(cfg: ModelConfig, rows_BP: Tensor, columns_BP: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, P, d/2], float32 or wider: the first half of the pairs rotates by row, the other by column."""
    wide = torch.promote_types(dtype, torch.float32)
    half = cfg.vision_hidden_size // cfg.vision_num_attention_heads // 2
    inverse = 1.0 / THETA ** (torch.arange(0, half, 2, dtype=wide, device=rows_BP.device) / half)
    angles = torch.cat([place[..., None].to(wide) * inverse for place in (rows_BP, columns_BP)], -1)
    return angles.cos(), angles.sin()


def rotate(x_BPHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As model.rope.apply_rope, but computed in the tables' dtype (float32 or wider), with one cast at the end."""
    first, second = x_BPHd.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BPHd.dtype)


class Attention(nn.Module):
    """Attention of this rank's patches to the patches of all ranks of cp and tp (qwen3f.vision.patch_split)."""

    def __init__(self, cfg: ModelConfig, backend: str, axes: Axes) -> None:
        super().__init__()
        width = cfg.vision_hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.heads = cfg.vision_num_attention_heads
        self.backend = backend
        self.axes = axes

    def forward(self, x_BPC: Tensor, cos: Tensor, sin: Tensor, mask: FrameMask) -> Tensor:
        linears = (self.q_proj, self.k_proj, self.v_proj)
        weight, bias = (torch.cat([getattr(one, name) for one in linears]) for name in ("weight", "bias"))
        # one product: three narrow ones take longer on a GPU
        q, k, v = F.linear(x_BPC, weight, bias).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = rotate(q, cos, sin), all_patches(rotate(k, cos, sin), self.axes), all_patches(v, self.axes)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self.proj(attend(q, k, v, mask, self.backend).transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Linear, GELU (tanh), linear. On a GPU without gradients the first two are one kernel."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(cfg.vision_hidden_size, cfg.vision_intermediate_size)
        self.linear_fc2 = nn.Linear(cfg.vision_intermediate_size, cfg.vision_hidden_size)

    def forward(self, x_BPC: Tensor) -> Tensor:
        first = self.linear_fc1
        if x_BPC.is_cuda and not torch.is_grad_enabled():  # the operator has no derivative; on a CPU its GELU is exact
            flat = torch._addmm_activation(first.bias, x_BPC.flatten(0, -2), first.weight.t(), use_gelu=True)
            return self.linear_fc2(flat.unflatten(0, x_BPC.shape[:-1]))
        return self.linear_fc2(F.gelu(first(x_BPC), approximate="tanh"))


class Block(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)); returns a tuple of one, as all skeletons do."""

    def __init__(self, cfg: ModelConfig, backend: str, axes: Axes = ONE) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.vision_hidden_size, EPS)
        self.attn = Attention(cfg, backend, axes)
        self.norm2 = nn.LayerNorm(cfg.vision_hidden_size, EPS)
        self.mlp = MLP(cfg)

    def forward(self, x_BPC: Tensor, cos: Tensor, sin: Tensor, mask: FrameMask) -> tuple[Tensor]:
        x_BPC = x_BPC + self.attn(self.norm1(x_BPC), cos, sin, mask)
        return (x_BPC + self.mlp(self.norm2(x_BPC)),)
