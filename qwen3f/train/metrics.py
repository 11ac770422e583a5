"""A step's cost and speed: FLOPs per token, the device's peak FLOP/s, tokens per second.

Model FLOPs utilization is `tokens_per_sec * flops_per_token(cfg, seq_len) / (peak_flops(device) * devices)`.
"""

import functools
import re
import time
from typing import NamedTuple

import torch

from qwen3f.config import ModelConfig

# (pattern of torch.cuda.get_device_name, dense bf16 FLOP/s), first match wins.
DATASHEET_PEAKS: tuple[tuple[str, float], ...] = (
    (r"GB200", 2500e12),
    (r"B200", 2250e12),
    (r"H100 PCIe", 756e12),
    (r"H[12]00 NVL", 835e12),
    (r"H[12]00", 989e12),
    (r"A100(?!0)", 312e12),  # not the RTX A1000
    (r"L40S", 362e12),
    (r"RTX 4090$", 165e12),  # neither the laptop's nor the "D" variant, which are slower
)
MEASURE_SECONDS = 0.2


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one token's forward and backward pass, in a sequence of `seq_len` tokens.

    6·N + 6·L·Hq·d·T. N = `cfg.matmul_params()`: the parameters that a token is multiplied with, including the head, but
    not the embedding; of a mixture only the active experts. L layers, Hq query heads of d, T = seq_len. A parameter
    costs 2 FLOPs in the forward pass and 4 in the backward pass. Attention's two products cost 4·Hq·d·T per layer over
    all T keys; the causal mask halves that, and forward plus backward are three times it: 3 · 4/2 = 6. Recomputation
    does not count. Documents packed into one sequence count as one document.
    """
    attention = cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim * seq_len
    return 6.0 * cfg.matmul_params() + 6.0 * attention


def peak_flops(device: torch.device) -> float:
    """The device's peak in FLOP/s: for a known CUDA card the dense bf16 rate of its datasheet, else a measured rate.

    Sources: NVIDIA's datasheets of the H100 (SXM 989 TFLOP/s, PCIe 756, NVL 835), H200 (SXM 989, NVL 835), A100 (312),
    L40S (362), HGX B200 (2,250) and GB200 (2,500), all halved where the sheet counts sparsity, and the Ada
    architecture's whitepaper for the RTX 4090 (165, with fp32 accumulation). Other CUDA cards and MIG slices: the best
    rate of bf16 matrix products within about 0.2 s. CPU: the same with fp32 and torch's threads. Measured once per
    process.
    """
    known = _datasheet_peak(device)
    return _measured_peak(device) if known is None else known


def peak_source(device: torch.device) -> str:
    """Where `peak_flops(device)` comes from: "datasheet" or "measured"."""
    return "measured" if _datasheet_peak(device) is None else "datasheet"


class Throughput(NamedTuple):
    """A point of a run from which speed is measured: tokens seen by then, and the time (`time.perf_counter()`, s)."""

    tokens: int
    time: float

    def advance(self, tokens: int, now: float) -> tuple[float, "Throughput"]:
        """(tokens per second since this point, the new point).

        tokens: seen since the run began. now: `time.perf_counter()`. Raises ValueError unless `now` is later.
        """
        if now <= self.time:
            raise ValueError(f"throughput needs a later time than its mark's, {self.time} s; got {now} s")
        return (tokens - self.tokens) / (now - self.time), Throughput(tokens, now)


def _datasheet_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a slice of the card, with a slice of its peak
        return None
    return next((peak for pattern, peak in DATASHEET_PEAKS if re.search(pattern, name)), None)


@functools.cache
def _measured_peak(device: torch.device) -> float:
    on_cuda = device.type == "cuda"
    size, dtype = (4096, torch.bfloat16) if on_cuda else (768, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    out = a @ b  # the first product also loads and warms the library
    until = time.perf_counter() + MEASURE_SECONDS
    while (start := time.perf_counter()) < until or best == float("inf"):
        torch.mm(a, b, out=out)
        if on_cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
