"""The kernels of one decoding step at Qwen3-0.6B's and 8B's shapes, against torch's operators one after the other.

A call takes microseconds, so calls are timed within a CUDA graph. It uses enough sets of weights and pages in turn that
none is still in the L2 cache, as in a model with many layers.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import qk_norm_rope
from kernels.bench.case import Case
from kernels.head_sample import head_sample
from kernels.linear_residual import linear_residual
from kernels.norm_linear import norm_linear
from kernels.norm_swiglu import norm_swiglu
from kernels.paged_attention import paged_attention
from kernels.residual_norm import residual_norm

BATCHES, CONTEXTS = (1, 16, 64, 256), (128, 1024)
HEAD_DIM, VOCABULARY, IDS, EPS = 128, 151_936, 151_669, 1e-6
PAGE, TABLE = 64, 64  # tokens of a page, pages of a row: up to 4096 tokens
_ROTATE = 200e6  # bytes of all sets together: four times an H100's L2 cache


class Model(NamedTuple):
    name: str
    hidden: int
    heads: int
    kv_heads: int
    width: int


MODELS = (Model("0.6b", 1024, 16, 8, 3072), Model("8b", 4096, 32, 8, 12288))


def cases() -> list[Case]:
    makers = (_qkv, _attention_output, _gate_up, _down, _head)
    products = [make(model, batch) for make in makers for model in MODELS for batch in BATCHES]
    return products + [_attention(m, batch, context) for m in MODELS for context in CONTEXTS for batch in BATCHES]


def _randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale


def _case(kernel: str, shape: str, inputs: object, ours: object, torchs: dict[str, object], moved: float) -> Case:
    copies = max(1, math.ceil(_ROTATE / moved))
    return Case(kernel, shape, inputs, {"ours": ours, **torchs}, moved, 0.0, "bytes", copies=copies)


def _weights(sizes: tuple[int, ...], inner: int) -> tuple[Tensor, ...]:
    return tuple(_randn(n, inner, scale=inner**-0.5) for n in sizes)


def _qkv(model: Model, batch: int) -> Case:
    D, sizes = model.hidden, tuple(n * HEAD_DIM for n in (model.heads, model.kv_heads, model.kv_heads))

    def apart(x: Tensor, norm: Tensor, *weights: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:], norm, EPS)
        return torch.cat([F.linear(normed, w) for w in weights], -1)

    return _case(
        "norm_linear",
        f"{model.name} B{batch}: {D} -> {sum(sizes)}",
        lambda: (_randn(batch, D), _randn(D), *_weights(sizes, D)),
        lambda x, norm, *weights: norm_linear(x, norm, EPS, weights),
        {"torch": apart},
        2.0 * (sum(sizes) * D + batch * (D + sum(sizes))),
    )


def _gate_up(model: Model, batch: int) -> Case:
    D, width = model.hidden, model.width

    def apart(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:], norm, EPS)
        return F.silu(F.linear(normed, gate)) * F.linear(normed, up)

    return _case(
        "norm_swiglu",
        f"{model.name} B{batch}: {D} -> 2×{width}",
        lambda: (_randn(batch, D), _randn(D), *_weights((width, width), D)),
        lambda x, norm, gate, up: norm_swiglu(x, norm, EPS, gate, up),
        {"torch": apart},
        2.0 * (2 * width * D + batch * (D + width)),
    )


def _attention_output(model: Model, batch: int) -> Case:
    return _residual(model, batch, model.heads * HEAD_DIM)


def _down(model: Model, batch: int) -> Case:
    return _residual(model, batch, model.width)


def _residual(model: Model, batch: int, inner: int) -> Case:
    """With more than one row the norm that follows belongs to it, as in the engine."""
    D = model.hidden
    if batch > 1:

        def apart(h: Tensor, weight: Tensor, x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
            out = x.addmm(h, weight.t())
            return out, F.rms_norm(out, out.shape[-1:], norm, EPS)

        return _case(
            "residual_norm",
            f"{model.name} B{batch}: {inner} -> {D}",
            lambda: (_randn(batch, inner), *_weights((D,), inner), _randn(batch, D), _randn(D)),
            lambda *tensors: residual_norm(*tensors, EPS),
            {"torch": apart},
            2.0 * (inner * D + batch * (inner + 3 * D)),
        )
    return _case(
        "linear_residual",
        f"{model.name} B{batch}: {inner} -> {D}",
        lambda: (_randn(batch, inner), *_weights((D,), inner), _randn(batch, D)),
        linear_residual,
        {"torch": lambda h, weight, x: x + F.linear(h, weight), "addmm": lambda h, weight, x: x.addmm(h, weight.t())},
        2.0 * (inner * D + batch * (inner + 2 * D)),
    )


def _head(model: Model, batch: int) -> Case:
    D = model.hidden

    def inputs() -> tuple[Tensor, ...]:
        ones, uniform = (torch.full((batch,), y, device="cuda") for y in (1.0, 0.5))
        return _randn(batch, D), _randn(D), *_weights((VOCABULARY,), D), ones, uniform

    def apart(x: Tensor, norm: Tensor, head: Tensor, inverse: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Logits in bfloat16, then float32; exponential noise and argmax draw the id."""
        logits = F.linear(F.rms_norm(x, x.shape[-1:], norm, EPS), head)[:, :IDS].float() * inverse[:, None]
        logs = logits.log_softmax(-1)
        ids = (logs.exp() / torch.empty_like(logs).exponential_()).argmax(-1, keepdim=True)
        return ids, logs.gather(1, ids)

    return _case(
        "head_sample",
        f"{model.name} B{batch}: {D} -> {VOCABULARY}",
        inputs,
        lambda x, norm, head, inverse, uniform: head_sample(x, norm, EPS, head, IDS, inverse, uniform),
        {"torch": apart},
        2.0 * VOCABULARY * D + batch * (2.0 * D + 4.0 * VOCABULARY),
    )


def _attention(model: Model, batch: int, context: int) -> Case:
    """Every row has `context` tokens in the cache, in pages in random order."""
    K, used = model.kv_heads, context // PAGE + 1
    features = (model.heads + 2 * K) * HEAD_DIM

    def inputs() -> tuple[Tensor, ...]:
        angles = torch.rand(batch, HEAD_DIM // 2, device="cuda")
        tables = angles.cos().bfloat16(), angles.sin().bfloat16()
        pages = (_randn(batch * used + 1, K, PAGE, HEAD_DIM) for _ in range(2))
        table = torch.zeros(batch, TABLE, dtype=torch.int32, device="cuda")
        table[:, :used] = torch.randperm(batch * used, device="cuda").view(batch, used) + 1
        lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        return _randn(batch, features), _randn(HEAD_DIM), _randn(HEAD_DIM), *tables, *pages, table, lengths

    def ours(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, *rest: Tensor) -> Tensor:
        return paged_attention(qkv, q_norm, k_norm, EPS, *rest)

    def apart(
        qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor,
        table: Tensor, lengths: Tensor,
    ) -> Tensor:  # fmt: skip
        """By torch: norm, rotation, indexed writes, gather of the pages, attention."""
        q, k, v = qkv.view(batch, 1, -1, HEAD_DIM).split((model.heads, K, K), 2)
        q, k = qk_norm_rope.reference(q, k, q_norm, k_norm, cos[:, None], sin[:, None], EPS)
        k_pages[table[:, used - 1], :, context % PAGE], v_pages[table[:, used - 1], :, context % PAGE] = (
            k[:, 0],
            v[:, 0],
        )
        k, v = (
            pages[table[:, :used]].transpose(1, 2).reshape(batch, K, -1, HEAD_DIM)[:, :, : context + 1]
            for pages in (k_pages, v_pages)
        )
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)

    def dense(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, *pages: Tensor) -> Tensor:
        """torch's attention alone, as if the cache were dense and nothing had to be written."""
        q = qkv[:, : model.heads * HEAD_DIM].view(batch, model.heads, 1, HEAD_DIM)
        k, v = (x[1:].view(batch, K, used * PAGE, HEAD_DIM)[:, :, : context + 1] for x in pages[:2])
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return _case(
        "paged_attention",
        f"{model.name} B{batch}, context {context}",
        inputs,
        ours,
        {"torch": apart, "sdpa, dense": dense},
        2.0 * batch * (2 * (context + 1) * K * HEAD_DIM + features + model.heads * HEAD_DIM),
    )
