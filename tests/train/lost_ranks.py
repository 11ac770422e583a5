"""A run of launch.py's on ranks, one of which something happens to: python lost_ranks.py CONFIG.json WORKDIR FAULT.

A mesh after these is that of the ranks that are started again.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from ml_collections import ConfigDict

from qwen3f.errors import TrainingError
from qwen3f.stages import pretrain
from qwen3f.train import launch, loop

VICTIM, IN_STEP = "1", 5


def killed():
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def stuck():
    time.sleep(3600)


def main(path, workdir, fault, mesh=None):
    config = ConfigDict(json.loads(Path(path).read_text()))
    if mesh and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        config.mesh = mesh
    real = pretrain.make_train_step

    def watched(*args, **kw):
        step = real(*args, **kw)

        def wrapped(state, batch):
            if os.environ["RANK"] == VICTIM and loop._number(state.step) + 1 == IN_STEP:
                globals()[fault]()
            return step(state, batch)

        return wrapped

    pretrain.make_train_step = watched
    launch.run(config, Path(workdir), progress=False)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except TrainingError as error:
        sys.exit(f"error: {error}")
