"""python -m kernels.bench: what it cannot do is an error of one line, before anything is timed."""

import pytest
import torch

from kernels.bench import __main__ as bench
from kernels.bench import rmsnorm, swiglu


def test_a_kernel_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "MODULES", (rmsnorm, swiglu))  # others put tensors on the GPU
    with pytest.raises(SystemExit, match="^error: no kernel is called 'rmsnrom'; write some of 'rmsnorm', .*'swiglu'"):
        bench.main(["swiglu", "rmsnrom"])


def test_a_machine_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^error: .* no CUDA device"):
        bench.main([])
