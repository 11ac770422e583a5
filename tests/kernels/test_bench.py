"""python -m kernels.bench: wrong use is an error of one line before anything is timed; a rival that fails is a note."""

import pytest
import torch

from kernels.bench import __main__ as bench
from kernels.bench import rmsnorm, swiglu
from kernels.bench.case import Case, LeftOut, Measured, measure


def test_a_kernel_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "MODULES", (rmsnorm, swiglu))  # others put tensors on the GPU
    with pytest.raises(SystemExit, match="^error: no kernel is called 'rmsnrom'; write some of 'rmsnorm', .*'swiglu'"):
        bench.main(["swiglu", "rmsnrom"])


def test_a_machine_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^error: .* no CUDA device"):
        bench.main([])


@pytest.mark.parametrize(
    ("error", "note"), [(LeftOut("does not fit"), "does not fit"), (RuntimeError("no\nsuch"), "RuntimeError: no")]
)
def test_an_implementation_that_cannot_run_has_the_reason_in_the_table(error, note):
    def fails(x):
        raise error

    case = Case("k", "s", lambda: [torch.ones(2)], {"ours": fails, "rival": fails}, 1.0, 1.0, "bytes")
    assert measure(case, "rival") == Measured(None, None, note)
    with pytest.raises(type(error)):
        measure(case, "ours")
