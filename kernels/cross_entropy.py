"""Cross-entropy straight from hidden states and the head's weight, without ever holding all logits.

The logits of a 151,936-word vocabulary at 16,384 tokens take 10 GB in float32. Here a chunk of tokens at a time goes
through head, softmax and both gradient products in the forward pass, so at most one chunk's logits exist and no
product is computed twice (three in all). The idea is that of Liger-Kernel's fused linear cross-entropy
(arXiv:2410.10989); this version is plain torch.

N tokens · D hidden · V vocabulary
"""

import functools

import torch
from torch import Tensor

IGNORE = -100
_CHUNK_LOGITS = 1 << 29  # logits alive at once on a GPU: 1 GiB in bfloat16
_CHUNK_LOGITS_CPU = 1 << 21  # on a CPU: 8 MiB, which stay in its cache (54 ms instead of 65 at V 4,096, N 2,048)
_MIN_CHUNK = 128  # tokens; below, products are too thin to be fast


def reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """Σ weights · −log softmax(hidden weightᵀ)[target] with all logits in memory; composes with torch.func.

    Logits are rounded to hidden's dtype, then softmax runs in float32 (float64 for float64), as in transformers.
    """
    logits = _widen(hidden_ND @ weight_VD.t())
    index = targets_N.clamp(min=0)[:, None]
    nll = logits.logsumexp(-1) - logits.gather(-1, index)[:, 0]
    return (nll * _effective_weights(targets_N, weights_N, nll.dtype)).sum()


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, *, compiled: bool = False
) -> Tensor:
    """The same scalar, chunk by chunk; float32 (or float64). First-order gradients in hidden and weight.

    Args:
      hidden_ND, weight_VD: one floating dtype and device. targets_N: int64, IGNORE where nothing is predicted.
      weights_N: floating, not differentiated.
      compiled: run softmax and its gradient as one compiled function. Inside a compiled step leave it False.
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    _check(hidden_ND, weight_VD, targets_N, weights_N)
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, weights_N, compiled)
    size = _chunk_size(weight_VD)
    parts = zip(hidden_ND.split(size), targets_N.split(size), weights_N.split(size))
    return torch.stack([reference(h, weight_VD, t, w) for h, t, w in parts]).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        compiled: bool,
    ) -> Tensor:
        size = _chunk_size(weight)
        softmax = _compiled_loss_and_dlogits() if compiled else _loss_and_dlogits
        losses, d_hidden, d_weight = [], [], None
        for h, t, w in zip(hidden.split(size), targets.split(size), weights.split(size)):
            loss, d_logits = softmax(h @ weight.t(), t, w)
            losses.append(loss)
            d_hidden.append(d_logits @ weight)
            part = _wide_product(d_logits.t(), h)
            d_weight = part if d_weight is None else d_weight.add_(part)
        ctx.save_for_backward(torch.cat(d_hidden), d_weight.to(weight.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_weight * grad.to(d_weight.dtype), None, None, None


def _loss_and_dlogits(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ weight · nll, its gradient in the logits, in their dtype). Uncompiled, it works in the logits' storage."""
    wide = _widen(logits_NV)
    index = targets_N.clamp(min=0)[:, None]
    weight = _effective_weights(targets_N, weights_N, wide.dtype)[:, None]
    if torch.compiler.is_compiling():  # a comparison fuses with the rest, where a scatter would cut it in two
        logp = wide.log_softmax(-1)
        hit = torch.arange(logp.shape[1], device=logp.device) == index
        d_logits = (logp.exp() - hit.to(logp.dtype)) * weight
        return -(logp.gather(-1, index) * weight).sum(), d_logits.to(logits_NV.dtype)
    # One exponential and three passes that write, all in place.
    top = wide.amax(-1, keepdim=True)
    of_target = wide.gather(-1, index) - top
    exp = wide.sub_(top).exp_()
    total = exp.sum(-1, keepdim=True)
    loss = ((total.log() - of_target) * weight).sum()
    return loss, exp.mul_(weight / total).scatter_add_(1, index, -weight).to(logits_NV.dtype)


@functools.cache
def _compiled_loss_and_dlogits() -> object:
    return torch.compile(_loss_and_dlogits, fullgraph=True, dynamic=False)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 even for half-precision inputs: it is summed over chunks."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return _widen(a @ b)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _effective_weights(targets_N: Tensor, weights_N: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(targets_N == IGNORE, 0, weights_N).to(dtype)


def _chunk_size(weight_VD: Tensor) -> int:
    """Tokens a chunk: a power of two, so that the last chunk is rarely ragged (a ragged one compiles again)."""
    logits = _CHUNK_LOGITS if weight_VD.is_cuda else _CHUNK_LOGITS_CPU
    return 1 << (max(logits // weight_VD.shape[0], _MIN_CHUNK).bit_length() - 1)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, D] and weight [V, D], got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(f"hidden is {hidden.dtype} on {hidden.device}, weight {weight.dtype} on {weight.device}")
    for name, x in (("targets", targets), ("weights", weights)):
        if x.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must be [{hidden.shape[0]}], got {tuple(x.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
