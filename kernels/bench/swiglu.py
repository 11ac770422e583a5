"""SwiGLU of Qwen3-1.7B's width, with gate and up as two tensors, and as one (joined)."""

import torch
from torch import Tensor

from kernels import swiglu
from kernels.bench.case import Case


def cases() -> list[Case]:
    return [_case(16_384, 6144, joined) for joined in (False, True)]


def _case(rows: int, size: int, joined: bool) -> Case:
    def inputs() -> tuple[object, ...]:
        shapes = [(rows, 2 * size)] if joined else [(rows, size)] * 2
        return tuple(torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes)

    reference = swiglu.reference_joined if joined else swiglu.reference
    return Case(
        kernel="swiglu, joined" if joined else "swiglu",
        shape=f"{rows}×{size}",
        inputs=inputs,
        entries={
            "ours": swiglu.swiglu_joined if joined else swiglu.swiglu,
            "reference": reference,
            "compile": torch.compile(reference, dynamic=False),
            "liger": _liger_joined if joined else _liger,
        },
        forward=rows * size * 2 * 3,
        backward=rows * size * 2 * 5,
        unit="bytes",
    )


def _liger(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _liger_joined(gate_up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply(gate_up)
