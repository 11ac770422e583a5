"""python -m kernels.bench [kernel …] prints a table: our kernels against other implementations, on this card.

Ratios are the rival's time / our time, forward / backward: above 1, ours is faster. All figures are from one run.
"""

import sys

import torch

from kernels.backend import triton
from kernels.bench import attention, cross_entropy, decode, moe, rmsnorm, rope, swiglu, timing
from kernels.bench.case import Case, Measured, measure

MODULES = (rmsnorm, rope, swiglu, attention, cross_entropy, moe, decode)


def row(case: Case, ceiling: float) -> str:
    """One line of a markdown table. ceiling: in bytes/s or FLOP/s."""
    measured = {name: measure(case, name) for name in case.entries}
    ours = measured.pop("ours")
    cells = [case.kernel, case.shape]
    for work, ms in ((case.forward, ours.forward), (case.backward, ours.backward)):
        time = "" if ms is None else f"{ms:.3f} ms" if ms >= 0.1 else f"{ms * 1e3:.1f} µs"
        cells.append("" if ms is None else f"{time}, {_rate(work, ms, ceiling, case.unit)}")
    cells.append("; ".join(f"{name} {_ratios(ours, other)}" for name, other in measured.items()))
    return "| " + " | ".join(cells) + " |"


def _rate(work: float, ms: float, ceiling: float, unit: str) -> str:
    share = work / (ms * 1e-3) / ceiling
    return f"{share:.2f}" if unit == "bytes" else f"{work / ms * 1e-9:.0f} TFLOP/s ({share:.2f})"


def _ratios(ours: Measured, other: Measured) -> str:
    if other.forward is None:
        return f"({other.note})"
    forward = f"{other.forward / ours.forward:.2f}"
    return forward if other.backward is None else f"{forward} / {other.backward / ours.backward:.2f}"


def main(names: list[str]) -> None:
    """names: of kernels; empty for all. Exits with one line for an unknown name, and without a GPU."""
    if not torch.cuda.is_available():
        sys.exit("error: kernels are timed on a GPU, and torch finds no CUDA device here")
    cases = [case for module in MODULES for case in module.cases()]
    known = dict.fromkeys(case.kernel for case in cases)
    if wrong := [name for name in names if name not in known]:
        sys.exit(f"error: no kernel is called {wrong[0]!r}; write some of {', '.join(map(repr, known))}")
    bandwidth, products = timing.copy_bandwidth(), timing.matrix_rate()
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, Triton {triton.__version__}", flush=True)
    print(f"copy {bandwidth / 1e12:.2f} TB/s; 8192³ bf16 product {products / 1e12:.0f} TFLOP/s\n")
    print(
        "| kernel | shape (bf16) | forward, of the ceiling | backward | rivals: their time / ours, forward / backward |"
    )
    print("|---|---|---|---|---|")
    for case in cases:
        if not names or case.kernel in names:
            print(row(case, bandwidth if case.unit == "bytes" else products), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
