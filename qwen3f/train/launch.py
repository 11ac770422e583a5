"""A training run on the ranks of its mesh: this process alone, ranks that it starts, or those of torchrun or srun."""

import os
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen3f.eval import hook as benchmarks
from qwen3f.processes import ranks
from qwen3f.train import loop
from qwen3f.train.choices import find_device
from qwen3f.train.cpu_cost import cpu_warning
from qwen3f.train.setup import make_setup
from qwen3f.train.stage import find_stage


def run(config: ConfigDict, workdir: Path, progress: bool = True, **options: Any) -> None:
    """Train as `config` says. The process must have been started as `python sys.argv…`, because ranks are started so.

    options: stage and make_step of loop.run. Raises UserError for a configuration that cannot run, before any process
    starts (also as ranks.decide), and whatever loop.run raises. If ranks that were started here fail, the process exits
    with their exit code, or a TrainingError is raised.
    """
    stage = options.get("stage") or find_stage(config.stage)
    device = find_device(config.device).type
    devices = ranks.all_devices(os.environ, device)
    setup = make_setup(config, devices)
    stage.check(setup)
    benchmarks.check(setup)
    shape = setup.layout.axes.shape
    decision = ranks.decide(os.environ, shape.size, ranks.local_devices(device), device, sys.argv)
    if decision.mode != "join" and (warning := cpu_warning(setup)):
        print(warning, flush=True)  # to stdout, so that a later error is the only line on stderr
    if decision.mode == "single":
        loop.run(config, workdir, progress, **options)
    elif decision.mode == "start":
        if code := ranks.start(decision, sys.argv, restarts=config.restarts):
            sys.exit(code)
    else:
        with ranks.joined(decision, shape, timeout=config.collective_timeout) as world:
            loop.run(config, workdir, progress, world, **options)
