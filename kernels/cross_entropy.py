"""Cross-entropy from hidden states and the head's weight, without all logits in memory.

The logits of 16,384 tokens with a vocabulary of 151,936 take 10 GB in float32. Here one chunk of tokens at a time goes
through the head and the softmax, so at most one chunk's logits exist. There are two operators:

- The scalar loss computes its gradients in the forward pass, while a chunk's logits exist: three products in total, as
  in Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989). On CUDA a Triton kernel (kernels/softmax_gradient.py)
  overwrites the logits with their gradient, and the matrix product itself adds to the weight's gradient, by default in
  the weight's dtype. So every chunk rounds that gradient: in bfloat16 its relative error is 2.1e-3 after 8 chunks,
  and 1.5e-3 with a single rounding (H100). `float32_sum` rounds once; it costs 1.5% more time and memory for a float32
  gradient (1.16 GiB at D 2,048).
- log Σ exp and the target's logit of each token, with a backward pass for any upstream gradients, which computes the
  logits again (four products). Losses that are nonlinear in log-probabilities (RL, DPO) use it, and everything with a
  vocabulary that is cut into shards: `merge_shards` merges the two numbers of every shard.

Results repeat bit for bit on one device and version. N tokens · D hidden · V vocabulary (or this shard's) · S shards
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import softmax_gradient
from kernels.backend import check_devices, runs_triton

IGNORE = softmax_gradient.IGNORE
_CHUNK_BYTES = 640 << 20  # logits in memory at once on a GPU: 2,048 tokens of 151,936 bfloat16
_CHUNK_LOGITS_CPU = 1 << 21  # on a CPU: 8 MiB, which stay in its cache (54 ms instead of 65 at V 4,096, N 2,048)
_MIN_CHUNK = 128  # tokens; products with fewer rows are slow
_ROW_BYTES = 16  # rows of logits are padded to a multiple; else cuBLAS takes 5 to 8 times as long (H100, V 151,669)


def reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, *, z_loss: float = 0.0
) -> Tensor:
    """`linear_cross_entropy` with all logits in memory; works with torch.func.

    Logits are rounded to hidden's dtype, then softmax runs in float32 (float64 for float64), as in transformers.
    """
    logits = _widen(hidden_ND @ weight_VD.t())
    target_N = logits.gather(-1, _index(targets_N))[:, 0]
    return _weighted_sum(logits.logsumexp(-1), target_N, targets_N, weights_N, z_loss)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    z_loss: float = 0.0,
    float32_sum: bool = False,
) -> Tensor:
    """Σ weights · (nll + z_loss · lse²), nll = lse − logit of the target, lse = log Σ exp(logits). A scalar.

    In float32 (float64 for float64). z_loss as in PaLM (arXiv:2204.02311, section 5) keeps lse near 0.

    First-order gradients in hidden and weight, computed in the forward pass if one of them requires a gradient. In
    uncompiled code the backward pass scales them in place, to save a copy of the weight's gradient; so a second
    backward pass over the same graph (retain_graph=True) raises RuntimeError. With an upstream gradient of 1 scaling
    costs nothing. Any other value rounds the gradients once more, so put a known divisor into the weights.

    Args:
      hidden_ND, weight_VD: one floating dtype and device.
      targets_N: int64 in [0, V), or IGNORE: no loss, and a gradient of exactly 0 if the row's hidden is finite (it is
        part of the product with all rows). Any other value makes the loss NaN, or raises an error on a CPU.
      weights_N: floating, not differentiated.
      float32_sum: on a GPU, sum the weight's gradient over chunks in float32 (a CPU always does).
    Raises ValueError, naming the argument, for shapes, dtypes or devices that do not fit together.
    """
    _check(hidden_ND, weight_VD, targets_N)
    if weights_N.shape != targets_N.shape or not weights_N.is_floating_point():
        raise ValueError(f"weights must be floating [{len(targets_N)}], got {weights_N.dtype} {tuple(weights_N.shape)}")
    check_devices(hidden=hidden_ND, weights=weights_N)
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        return _loss_and_gradients_op(hidden_ND, weight_VD, targets_N, weights_N, z_loss, float32_sum)[0]
    lse_N, target_N = _lse_and_known_target(hidden_ND, weight_VD, targets_N)
    size = _chunk_size(weight_VD)
    rows = zip(*(x.split(size) for x in (lse_N, target_N, targets_N, weights_N)))
    return torch.stack([_weighted_sum(*row, z_loss) for row in rows]).sum()


def token_log_probs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) of each token, float32 (float64 for float64) [N]; 0 with a gradient of exactly 0 where the
    target is IGNORE, if the row's hidden is finite.

    Differentiable in hidden and weight for any upstream gradient; the backward pass computes the logits again.
    Arguments and errors as in `linear_cross_entropy`.
    """
    _check(hidden_ND, weight_VD, targets_N)
    lse_N, target_N = _lse_and_known_target(hidden_ND, weight_VD, targets_N)
    return torch.where(targets_N == IGNORE, 0.0, target_N - lse_N)


def lse_and_target(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, vocab_start: int = 0
) -> tuple[Tensor, Tensor]:
    """(log Σ exp(logits), the target's logit) of each token, float32 (float64 for float64), both differentiable.

    For a vocabulary that is cut into shards: weight has rows [vocab_start, vocab_start + V) of the head. Targets are
    ids of the whole vocabulary; a target in another shard (or IGNORE) has logit 0 without a gradient. Merge the shards'
    results with `merge_shards`; if they are on several ranks, gather them by a differentiable collective first. Then
    log p = target − lse. Each shard's weight gets its part of the gradient; sum hidden's gradients over shards.

    Arguments and errors as in `linear_cross_entropy`.
    """
    _check(hidden_ND, weight_VD, targets_N)
    return _lse_and_target_op(hidden_ND, weight_VD, targets_N, vocab_start)


@torch.no_grad()
def lse_and_mean_logit(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """(log Σ exp(logits), Σ softmax · logits) of each token, float32 (float64 for float64); no gradients.

    Their difference is the entropy of the softmax, in nats. It works on one chunk of tokens at a time.
    """
    parts, whole = [], _whole(weight_VD)
    for hidden in hidden_ND.split(_chunk_size(weight_VD)):
        logits = _widen((hidden @ whole.t())[:, : len(weight_VD)])
        lse = logits.logsumexp(-1)
        parts.append((lse, ((logits - lse[:, None]).exp() * logits).sum(-1)))
    lse_N, mean_N = (torch.cat(x) for x in zip(*parts))
    return lse_N, mean_N


def merge_shards(lse_SN: Tensor, target_SN: Tensor) -> tuple[Tensor, Tensor]:
    """`lse_and_target` of the whole vocabulary from the results of its shards; differentiable."""
    return lse_SN.logsumexp(0), target_SN.sum(0)


def _lse_and_known_target(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`lse_and_target` for a whole vocabulary; a target outside it has logit NaN, so that a wrong batch is noticed."""
    lse, target = _lse_and_target_op(hidden, weight, targets, 0)
    known = ((targets >= 0) & (targets < len(weight))) | (targets == IGNORE)
    return lse, torch.where(known, target, float("nan"))


@torch.library.custom_op("qwen3f::linear_cross_entropy", mutates_args=())
def _loss_and_gradients_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float, float32_sum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    losses = []

    def softmax(logits: Tensor, rows: slice) -> Tensor:
        if runs_triton(logits):
            losses.append(softmax_gradient.loss_and_gradient_(logits, targets[rows], weights[rows], z_loss).sum())
            return logits
        loss, d_logits = _loss_and_d_logits(logits, targets[rows], weights[rows], z_loss)
        losses.append(loss)
        return d_logits

    d_hidden, d_weight = _gradients(hidden, weight, softmax, float32_sum)
    return torch.stack(losses).sum(), d_hidden, d_weight


@_loss_and_gradients_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float, float32_sum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=_wide(hidden.dtype))
    return loss, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _keep_gradients(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]
) -> None:
    ctx.set_materialize_grads(False)  # else autograd makes two tensors of zeros, one as large as the weight
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: torch.autograd.function.FunctionCtx, d_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *(_scaled(x, d_loss) for x in ctx.saved_tensors), None, None, None, None


_loss_and_gradients_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    if type(x) is not Tensor:  # while tracing: no side effects; the compiler fuses the product
        return (_widen(x) * factor).to(x.dtype)
    if runs_triton(x):
        softmax_gradient.scale_(x, factor)
        return x
    return x.mul_(factor)  # in place: x keeps its dtype, and the factor its own


@torch.library.custom_op("qwen3f::lse_and_target", mutates_args=())
def _lse_and_target_op(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    statistics = softmax_gradient.statistics if runs_triton(hidden, weight) else _statistics
    size, whole = _chunk_size(weight), _whole(weight)
    parts = [
        statistics((h @ whole.t())[:, : len(weight)], t, vocab_start)
        for h, t in zip(hidden.split(size), targets.split(size))
    ]
    lse, target = (torch.cat(x) for x in zip(*parts))
    return lse, target


@_lse_and_target_op.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    lse = hidden.new_empty(hidden.shape[:1], dtype=_wide(hidden.dtype))
    return lse, torch.empty_like(lse)


@torch.library.custom_op("qwen3f::lse_and_target_backward", mutates_args=())
def _lse_and_target_backward_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int, lse: Tensor, d_lse: Tensor, d_target: Tensor
) -> tuple[Tensor, Tensor]:
    def softmax(logits: Tensor, rows: slice) -> Tensor:
        args = targets[rows], vocab_start, lse[rows], d_lse[rows], d_target[rows]
        if runs_triton(logits):
            softmax_gradient.gradient_(logits, *args)
            return logits
        return _d_logits(logits, *args)

    return _gradients(hidden, weight, softmax)


@_lse_and_target_backward_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int, lse: Tensor, d_lse: Tensor, d_target: Tensor
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _keep_lse(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]
) -> None:
    hidden, weight, targets, ctx.vocab_start = inputs
    ctx.save_for_backward(hidden, weight, targets, output[0])


def _lse_and_target_backward(
    ctx: torch.autograd.function.FunctionCtx, d_lse: Tensor, d_target: Tensor
) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, lse = ctx.saved_tensors
    return *_lse_and_target_backward_op(hidden, weight, targets, ctx.vocab_start, lse, d_lse, d_target), None, None


_lse_and_target_op.register_autograd(_lse_and_target_backward, setup_context=_keep_lse)


def _gradients(
    hidden: Tensor, weight: Tensor, softmax: Callable[[Tensor, slice], Tensor], float32_sum: bool = False
) -> tuple[Tensor, Tensor]:
    """(d_hidden, d_weight). softmax(logits, rows) returns the gradient of a chunk's logits; kernels write it in place.

    There is at least one chunk, possibly empty.
    """
    size = _chunk_size(weight)
    chunks = [slice(i, min(i + size, len(hidden))) for i in range(0, max(len(hidden), 1), size)]
    if not runs_triton(hidden, weight):
        return _gradients_formula(hidden, weight, softmax, chunks)
    whole = _whole(weight)
    buffer = hidden.new_empty(min(size, len(hidden)), len(whole))
    d_hidden = hidden.new_empty(hidden.shape)
    widen = float32_sum and weight.is_cuda and weight.dtype != torch.float32
    d_weight = weight.new_empty(whole.shape, dtype=torch.float32 if widen else weight.dtype)
    wide = {"out_dtype": torch.float32} if widen else {}
    for rows in chunks:
        h = hidden[rows]
        d_logits = torch.mm(h, whole.t(), out=buffer[: len(h)])
        softmax(d_logits[:, : len(weight)], rows)  # in place: here softmax is a kernel
        d_logits[:, len(weight) :] = 0  # logits of the padding; not 0 by themselves if hidden is not finite
        torch.mm(d_logits, whole, out=d_hidden[rows])
        if rows.start == 0:
            torch.mm(d_logits.t(), h, **wide, out=d_weight)
        else:
            torch.addmm(d_weight, d_logits.t(), h, **wide, out=d_weight)
    return d_hidden, d_weight[: len(weight)].to(weight.dtype)


def _whole(weight_VD: Tensor) -> Tensor:
    """The weight; if rows of logits would not be aligned (e.g. V is odd), a copy with rows of zeros appended.

    The logits of the appended rows are not used.
    """
    together = _ROW_BYTES // weight_VD.itemsize
    missing = -len(weight_VD) % together
    return F.pad(weight_VD, (0, 0, 0, missing)) if missing and runs_triton(weight_VD) else weight_VD


def _gradients_formula(
    hidden: Tensor, weight: Tensor, softmax: Callable[[Tensor, slice], Tensor], chunks: list[slice]
) -> tuple[Tensor, Tensor]:
    """As `_gradients`, in plain torch. The weight's gradient is summed in float32, also for half-precision inputs."""
    d_hidden, d_weight = [], None
    for rows in chunks:
        h = hidden[rows]
        d_logits = softmax(h @ weight.t(), rows)
        d_hidden.append(d_logits @ weight)
        part = _widen(d_logits.t() @ h)
        d_weight = part if d_weight is None else d_weight.add_(part)
    return torch.cat(d_hidden), d_weight.to(weight.dtype)


def _loss_and_d_logits(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """(the chunk's loss, its gradient with respect to the logits, in their dtype); one exponential, in place."""
    wide, index = _widen(logits_NV), _index(targets_N)
    weight = _effective_weights(targets_N, weights_N, wide.dtype)[:, None]
    top = wide.amax(-1, keepdim=True)
    of_target = wide.gather(-1, index) - top
    exp = wide.sub_(top).exp_()
    total = exp.sum(-1, keepdim=True)
    losses, of_exp = total.log() - of_target, weight
    if z_loss:
        lse = total.log() + top
        losses, of_exp = losses + z_loss * lse.square(), weight * (1 + 2 * z_loss * lse)
    d_logits = exp.mul_(of_exp / total).scatter_add_(1, index, -weight)
    return (losses * weight).sum(), d_logits.to(logits_NV.dtype)


def _statistics(logits_NV: Tensor, targets_N: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    logits, (index, known) = _widen(logits_NV), _local(targets_N, vocab_start, logits_NV.shape[1])
    return logits.logsumexp(-1), torch.where(known, logits.gather(-1, index)[:, 0], 0)


def _d_logits(
    logits_NV: Tensor, targets_N: Tensor, vocab_start: int, lse_N: Tensor, d_lse_N: Tensor, d_target_N: Tensor
) -> Tensor:
    wide, (index, known) = _widen(logits_NV), _local(targets_N, vocab_start, logits_NV.shape[1])
    of_exp = wide.sub_(lse_N[:, None]).exp_().mul_(d_lse_N[:, None])
    return of_exp.scatter_add_(1, index, torch.where(known, d_target_N, 0)[:, None]).to(logits_NV.dtype)


def _local(targets_N: Tensor, vocab_start: int, size: int) -> tuple[Tensor, Tensor]:
    """(column of each target in this shard [N, 1], 0 if it is in another; whether it is in this shard [N])."""
    known = (targets_N >= vocab_start) & (targets_N < vocab_start + size)
    return torch.where(known, targets_N - vocab_start, 0)[:, None], known


def _index(targets_N: Tensor) -> Tensor:
    return torch.where(targets_N == IGNORE, 0, targets_N)[:, None]


def _weighted_sum(lse_N: Tensor, target_N: Tensor, targets_N: Tensor, weights_N: Tensor, z_loss: float) -> Tensor:
    losses = lse_N - target_N
    if z_loss:
        losses = losses + z_loss * lse_N.square()
    return (losses * _effective_weights(targets_N, weights_N, losses.dtype)).sum()


def _effective_weights(targets_N: Tensor, weights_N: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(targets_N == IGNORE, 0, weights_N).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


def _chunk_size(weight_VD: Tensor) -> int:
    """Tokens per chunk: a power of two, so that the tiles of hidden's gradient fill an H100 (as [2,048, D] does)."""
    logits = _CHUNK_BYTES // weight_VD.itemsize if weight_VD.is_cuda else _CHUNK_LOGITS_CPU
    return 1 << (max(logits // len(weight_VD), _MIN_CHUNK).bit_length() - 1)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(f"hidden must be [N, D] and weight [V, D], got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"weight is {weight.dtype}, hidden {hidden.dtype}; give them one dtype")
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"hidden must be bfloat16, float16, float32 or float64, got {hidden.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{len(hidden)}], got {targets.dtype} {tuple(targets.shape)}")
    check_devices(hidden=hidden, weight=weight, targets=targets)
