"""A training run on as many ranks as its mesh has: this process alone, ranks that it starts, or a launcher's."""

import os
import sys
from pathlib import Path

from ml_collections import ConfigDict

from qwen3f.processes import ranks
from qwen3f.train import loop
from qwen3f.train.choices import find_device
from qwen3f.train.setup import make_plan


def run(config: ConfigDict, workdir: Path, progress: bool = True) -> None:
    """Train as `config` says. The process must have been started as `python sys.argv…`: ranks are started so too.

    Raises UserError, before any process starts, for what cannot run, and as ranks.decide; and as loop.run. Of ranks
    that were started here and failed, the exit code or a TrainingError.
    """
    device = find_device(config.device).type
    devices = ranks.all_devices(os.environ, device)
    shape = make_plan(config, devices).layout.axes.shape
    decision = ranks.decide(os.environ, shape.size, ranks.local_devices(device), device, sys.argv)
    if decision.mode == "single":
        loop.run(config, workdir, progress)
    elif decision.mode == "start":
        if code := ranks.start(decision, sys.argv, restarts=config.restarts):
            sys.exit(code)
    else:
        with ranks.joined(decision, shape, timeout=config.collective_timeout) as world:
            loop.run(config, workdir, progress, world)
