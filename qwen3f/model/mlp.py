"""SwiGLU feed-forward network (Shazeer 2020, arXiv:2002.05202). x_BTD, hidden width I."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.swiglu import swiglu
from qwen3f.config import ModelConfig
from sharding.axes import ONE, Axes
from sharding.tensor import column_parallel, row_parallel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class SwiGLU(nn.Module):
    """down(act(gate(x)) · up(x)); act is SiLU unless cfg.hidden_act says otherwise.

    fused: on a GPU, run the kernel of kernels/swiglu.py. Under tp, x and the result have this rank's part of the tokens
    (sharding.tensor); the hidden layer in between has all tokens and this rank's columns.
    """

    def __init__(self, cfg: ModelConfig, fused: bool = False, axes: Axes = ONE) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)
        self.act = ACTIVATIONS[cfg.hidden_act]
        self.fused = fused and cfg.hidden_act == "silu"
        self.tp = axes.tp

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = column_parallel(x_BTD, [(self.gate_proj.weight, None), (self.up_proj.weight, None)], self.tp)
        h_BTI = swiglu(gate, up) if self.fused and x_BTD.is_cuda else self.act(gate) * up
        return row_parallel(self.down_proj, h_BTI, self.tp)
