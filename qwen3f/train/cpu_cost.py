"""A warning, before a run on a CPU starts, that it would take very long or too much memory."""

import os

from qwen3f.train.metrics import flops_per_token, peak_flops
from qwen3f.train.setup import Setup

_BYTES = 16  # per parameter: itself, its gradient and AdamW's two moments, float32
_STEP, _RUN = 60.0, 86_400.0  # warn from this many seconds per step, or per run
_UNITS = (("years", 365 * 86_400.0), ("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("s", 1.0))


def cpu_warning(setup: Setup) -> str:
    """A line for a run on the CPU if a step takes a minute, the run a day, or memory is too small; else "".

    These are lower bounds: times follow from the speed of a matrix product on all threads (metrics.peak_flops), memory
    from weights, gradients and moments without activations.
    """
    if setup.device.type != "cpu":
        return ""
    cfg, config = setup.model, setup.config
    step = flops_per_token(cfg, config.seq_len) * config.batch_size * config.seq_len / peak_flops(setup.device)
    need, there = _BYTES * cfg.total_params_estimate(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if step < _STEP and step * config.steps < _RUN and need < there:
        return ""
    return (
        f"warning: a model of {_short(cfg.total_params_estimate())} parameters on this CPU: a step of "
        f"{config.batch_size} × {config.seq_len} tokens takes at least {_time(step)}, all {config.steps:,} at least "
        f"{_time(step * config.steps)}, and weights, gradients and moments {need / 2**30:.3g} GiB (this machine has "
        f"{there / 2**30:.3g}). The preset nano is made for a CPU, as in experiments/demo.py; --config.plan=True "
        "prints the time on a GPU"
    )


def _short(number: int) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _time(seconds: float) -> str:
    name, unit = next(((name, unit) for name, unit in _UNITS if seconds >= 2 * unit), _UNITS[-1])
    return f"{seconds / unit:,.0f} {name}"
