"""SwiGLU's elementwise part (Shazeer 2020, arXiv:2002.05202): silu(gate) · up, forward and backward.

Only the inputs are saved: the backward pass computes silu again, so a layer stores two [N, I] tensors instead of four.
Every element is read and written once and computed alone, so a rerun is bit-identical.

The matrix products before and after it stay separate kernels. Fusing it with the product before would save little: gate
and up must be written for the backward pass anyway, so only their read here would be saved.

N rows · I intermediate size
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import backend
from kernels.backend import runs_triton, tl, triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """F.silu(gate) · up; works with torch.func."""
    return F.silu(gate) * up


def reference_joined(gate_up: Tensor) -> Tensor:
    return reference(*gate_up.chunk(2, dim=-1))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up; silu is rounded to the dtype before the product, as in F.silu(gate) * up.

    The backward pass computes in float32 (float64 for float64).

    Args:
      gate, up: [..., I] of one shape, dtype (bfloat16, float16, float32 or float64) and device, I adjacent in memory.
        Rows with a constant stride (e.g. the halves of a joined projection) are read in place, others are copied first.
    Returns [..., I] contiguous, of that dtype. First-order gradients in both.
    Raises ValueError for shapes, dtypes, devices or strides other than these.
    """
    _check(gate, "gate")
    _check(up, "up")
    backend.check_devices(gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"up must be {gate.dtype} {tuple(gate.shape)} like gate, got {up.dtype} {tuple(up.shape)}")
    return torch.ops.qwen3f.swiglu(gate, up)


def swiglu_joined(gate_up: Tensor) -> Tensor:
    """As `swiglu`, with gate and up as one tensor: [..., I] from [..., 2I], whose first half is the gate. The gradient
    is one tensor too."""
    _check(gate_up, "gate_up")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2I], got {tuple(gate_up.shape)}")
    return torch.ops.qwen3f.swiglu_joined(gate_up)


class Config(NamedTuple):
    """Elements and warps per program."""

    block: int = 1024
    warps: int = 4


FORWARD, BACKWARD = Config(), Config()


@triton.jit
def _place(columns, blocks, BLOCK: tl.constexpr):
    """This program's row (int64), columns and mask."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, col, col < columns


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, out_ptr, columns, blocks, gate_stride, up_stride, out_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, mask = _place(columns, blocks, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * out_stride + col, (silu * up).to(gate.dtype), mask=mask)


@triton.jit
def _backward_kernel(
    d_out_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, columns, blocks,
    d_out_stride, gate_stride, up_stride, d_gate_stride, d_up_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """With s = sigmoid(g): d_up = dy·g·s and d_gate = dy·u·s·(1 + g·(1 − s))."""
    row, col, mask = _place(columns, blocks, BLOCK)
    d_out = tl.load(d_out_ptr + row * d_out_stride + col, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_up = d_out * gate * sigmoid
    d_gate = d_out * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(d_gate_ptr + row * d_gate_stride + col, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + row * d_up_stride + col, d_up.to(d_up_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: object, tensors: tuple[Tensor, ...], config: Config) -> None:
    """Run an elementwise kernel over [N, I] tensors with I adjacent; as one long row where all are contiguous."""
    rows, columns = tensors[0].shape
    if all(x.is_contiguous() for x in tensors):
        rows, columns = 1, rows * columns
    if rows * columns:
        blocks = triton.cdiv(columns, config.block)
        strides = [x.stride(0) for x in tensors]
        with torch.cuda.device_of(tensors[0]):
            kernel[(rows * blocks,)](*tensors, columns, blocks, *strides, config.block, num_warps=config.warps)


def launch_forward(gate_NI: Tensor, up_NI: Tensor, config: Config) -> Tensor:
    out = torch.empty(gate_NI.shape, dtype=gate_NI.dtype, device=gate_NI.device)
    _launch(_forward_kernel, (gate_NI, up_NI, out), config)
    return out


def launch_backward(
    d_out_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, d_gate_NI: Tensor, d_up_NI: Tensor, config: Config
) -> None:
    """Writes into d_gate and d_up."""
    _launch(_backward_kernel, (d_out_NI, gate_NI, up_NI, d_gate_NI, d_up_NI), config)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    gate_NI, up_NI = _rows(gate), _rows(up)
    out = launch_forward(gate_NI, up_NI, FORWARD) if runs_triton(gate) else reference(gate_NI, up_NI)
    return out.contiguous().view(gate.shape)


def _backward(d_out: Tensor, gate: Tensor, up: Tensor, d_gate_NI: Tensor, d_up_NI: Tensor) -> None:
    """Writes the gradients of gate and up into rows d_gate, d_up."""
    d_out_NI, gate_NI, up_NI = _rows(d_out), _rows(gate), _rows(up)
    if runs_triton(gate):
        launch_backward(d_out_NI, gate_NI, up_NI, d_gate_NI, d_up_NI, BACKWARD)
        return
    wide = torch.promote_types(gate.dtype, torch.float32)
    dy, g, u = d_out_NI.to(wide), gate_NI.to(wide), up_NI.to(wide)
    sigmoid = g.sigmoid()
    d_up_NI.copy_(dy * g * sigmoid)
    d_gate_NI.copy_(dy * u * sigmoid * (1 + g * (1 - sigmoid)))


@torch.library.custom_op("qwen3f::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _forward(gate, up)


@torch.library.custom_op("qwen3f::swiglu_backward", mutates_args=())
def _swiglu_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _backward(d_out, gate, up, _rows(d_gate), _rows(d_up))
    return d_gate, d_up


@torch.library.custom_op("qwen3f::swiglu_joined", mutates_args=())
def _joined(gate_up: Tensor) -> Tensor:
    return _forward(*gate_up.chunk(2, dim=-1))


@torch.library.custom_op("qwen3f::swiglu_joined_backward", mutates_args=())
def _joined_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    d_gate_up = gate_up.new_empty(gate_up.shape)
    _backward(d_out, *gate_up.chunk(2, dim=-1), *_rows(d_gate_up).chunk(2, dim=-1))
    return d_gate_up


def _rows(x: Tensor) -> Tensor:
    """[N, I] with I adjacent; a view if the rows of x lie at one common distance."""
    x_NI = x.reshape(-1, x.shape[-1])
    return x_NI if x_NI.stride(1) == 1 or x_NI.shape[1] == 1 else x_NI.contiguous()


@_swiglu.register_fake
def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_swiglu_backward.register_fake
def _swiglu_backward_fake(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@_joined.register_fake
def _joined_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_joined_backward.register_fake
def _joined_backward_fake(d_out: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


Context = torch.autograd.function.FunctionCtx


def _save(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Context, d_out: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.qwen3f.swiglu_backward(d_out, *ctx.saved_tensors)


def _gradient_joined(ctx: Context, d_out: Tensor) -> Tensor:
    return torch.ops.qwen3f.swiglu_joined_backward(d_out, *ctx.saved_tensors)


_swiglu.register_autograd(_gradients, setup_context=_save)
_joined.register_autograd(_gradient_joined, setup_context=_save)


def _check(x: Tensor, name: str) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} is {x.dtype}; swiglu takes {', '.join(str(d) for d in _DTYPES)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., I] with I > 0, got {tuple(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; pass {name}.contiguous()")
