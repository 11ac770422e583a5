"""What a run on a CPU would take, said before it starts where that is more than anybody waits for."""

import os

from qwen3f.train.metrics import flops_per_token, peak_flops
from qwen3f.train.setup import Setup

_BYTES = 16  # of a parameter: itself, its gradient and AdamW's two moments, float32
_STEP, _RUN = 60.0, 86_400.0  # seconds from which it is said
_UNITS = (("years", 365 * 86_400.0), ("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("s", 1.0))


def cpu_warning(setup: Setup) -> str:
    """A line for a run on the CPU whose step takes a minute, that takes a day, or that memory is too small for; else
    "".

    Times are by the rate of a matrix product on all threads (metrics.peak_flops), which a step does not reach; memory
    is of weights, gradients and moments alone.
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
        f"{there / 2**30:.3g}). The preset nano is made for a CPU, as in experiments/demo.py; --config.plan=True says "
        "what a GPU would take"
    )


def _short(number: int) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _time(seconds: float) -> str:
    name, unit = next(((name, unit) for name, unit in _UNITS if seconds >= 2 * unit), _UNITS[-1])
    return f"{seconds / unit:,.0f} {name}"
