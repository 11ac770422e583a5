"""Matrix products and attention whose result for a token does not depend on the rest of the batch, bit for bit.

A library chooses a matrix product's kernel, and so the order of its sums, by the shapes. Here every product has a fixed
number of rows, and attention works in fixed blocks of keys, counted from the document's first key. So a token's result
is the same in a batch of any size, packed or not, in a training pass or token by token with a KV cache. It is slow. It
is for reinforcement learning, where the trainer's log-probabilities then equal the sampler's (He et al. 2025,
"Defeating Nondeterminism in LLM Inference", Thinking Machines Lab). The backward pass uses ordinary operators.

B rows · T tokens · H query heads · K key/value heads · G = H/K · S keys · d head_dim · N tokens · D inputs · F outputs
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kernels.cross_entropy import IGNORE

ROWS = 16  # rows of every product; with fewer than 8, CPU libraries use other kernels
KEYS = 64  # keys per block of attention


class FixedRows(TorchFunctionMode):
    """A mode in which F.linear (so also nn.Linear), F.silu and F.gelu call `linear`, `silu` and `gelu` of this file."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _FIXED.get(func, func)(*args, **(kwargs or {}))


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """F.linear as products of ROWS tokens each."""
    out = _Product.apply(x.flatten(0, -2), weight_FD).unflatten(0, x.shape[:-1])
    return out if bias_F is None else out + bias_F


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """F.silu by operators whose result for an element does not depend on its index: on a CPU, F.silu itself computes
    the last few elements of a tensor differently. inplace is ignored."""
    small = (-x.abs()).exp()
    return x * (torch.where(x >= 0, 1.0, small) / (1 + small))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """F.gelu, as `silu`."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x * (1 + 0.044715 * x.square()))))
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


_FIXED: dict[Callable[..., Any], Callable[..., Any]] = {F.linear: linear, F.silu: silu, F.gelu: gelu}


def token_log_probs(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) of each token, [N], float32 (float64 for float64); 0 where the target is IGNORE, NaN for any other
    negative target."""
    logits_NV = linear(hidden_ND, head_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    chosen_N = logits_NV.gather(-1, targets_N.clamp(min=0)[:, None])[:, 0]
    log_probs_N = torch.where(targets_N < 0, float("nan"), chosen_N - logits_NV.logsumexp(-1))
    return torch.where(targets_N == IGNORE, 0.0, log_probs_N)


def attend(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, first_BT: Tensor, seen_BT: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v, [B, H, T, d]; query t of row b sees keys first[b, t] … seen[b, t] − 1, at least one.

    Adjacent queries with the same `first` form a document. Waits for the device.
    """
    return _Attention.apply(q_BHTd, k_BKSd, v_BKSd, first_BT, seen_BT)


def _product(x_ND: Tensor, weight_FD: Tensor) -> Tensor:
    """x Wᵀ, as products of ROWS rows each."""
    missing = -len(x_ND) % ROWS
    blocks = F.pad(x_ND, (0, 0, 0, missing)).contiguous().split(ROWS)
    return torch.cat([torch.mm(block, weight_FD.t()) for block in blocks])[: len(x_ND)]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_ND: Tensor, weight_FD: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_FD)
        return _product(x_ND, weight_FD)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy_NF: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_ND, weight_FD = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (dy_NF @ weight_FD if wanted[0] else None, dy_NF.t() @ x_ND if wanted[1] else None)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, q: Tensor, k: Tensor, v: Tensor, first_BT: Tensor, seen_BT: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, first_BT, seen_BT)
        out, group = torch.empty_like(q), q.shape[1] // k.shape[1]
        for b, start, end, first in _documents(first_BT):
            seen_T = seen_BT[b, start:end] - first
            last = first + int(seen_T.max())
            for head in range(k.shape[1]):
                heads = slice(head * group, (head + 1) * group)
                q_Nd = q[b, heads, start:end].flatten(0, 1)
                mixed = _document(q_Nd, k[b, head, first:last], v[b, head, first:last], seen_T.repeat(group))
                out[b, heads, start:end] = mixed.unflatten(0, (group, -1))
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first_BT, seen_BT = ctx.saved_tensors
        at = torch.arange(k.shape[2], device=q.device)
        allowed = ((at >= first_BT[..., None]) & (at < seen_BT[..., None]))[:, None]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            group = q.shape[1] // k.shape[1]
            keys, values = (x.repeat_interleave(group, 1) for x in leaves[1:])
            scores = leaves[0] @ keys.mT * q.shape[-1] ** -0.5
            out = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ values
        return *torch.autograd.grad(out, leaves, d_out), None, None


def _documents(first_BT: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(row, first query, last query + 1, first key) of each run of adjacent queries with the same first key."""
    for b, firsts in enumerate(first_BT.tolist()):
        start = 0
        for t in range(1, len(firsts) + 1):
            if t == len(firsts) or firsts[t] != firsts[start]:
                yield b, start, t, firsts[start]
                start = t


def _document(q_Nd: Tensor, k_Sd: Tensor, v_Sd: Tensor, seen_N: Tensor) -> Tensor:
    """Attention of N queries over the S keys of their document; query n sees the first seen[n].

    It goes through the blocks of keys twice: for the scores and their maximum, then for the sums. A block in which a
    query sees no key adds exact zeros, so the number of such blocks does not change the result.
    """
    missing = -len(k_Sd) % KEYS
    k_blocks, v_blocks = (F.pad(x, (0, 0, 0, missing)).contiguous().split(KEYS) for x in (k_Sd, v_Sd))
    scaled_Nd = q_Nd * q_Nd.shape[-1] ** -0.5
    place = torch.arange(KEYS, device=q_Nd.device)
    scores = []
    for number, block in enumerate(k_blocks):
        allowed = number * KEYS + place < seen_N[:, None]
        scores.append(_product(scaled_Nd, block).masked_fill(~allowed, float("-inf")))
    top_N1 = torch.stack([block.amax(-1) for block in scores]).amax(0)[:, None]
    total_N1, mixed_Nd = torch.zeros_like(top_N1), torch.zeros_like(q_Nd)
    for block, values in zip(scores, v_blocks):
        weights = (block - top_N1).exp()
        total_N1 = total_N1 + weights.sum(-1, keepdim=True)
        mixed_Nd = mixed_Nd + _product(weights, values.t())
    return mixed_Nd / total_N1
