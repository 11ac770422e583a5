"""A run on several ranks, as launch.py starts it, in which a fault hits one rank.

    python lost_ranks.py CONFIG.json WORKDIR FAULT [MESH]

FAULT is one of the functions below. MESH is the mesh of ranks that are started again; without it they keep theirs.
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
from qwen3f.train import launch
from qwen3f.train.readings import number
from qwen3f.train.step import make_train_step

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

    def watched(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            if os.environ["RANK"] == VICTIM and number(state.step) + 1 == IN_STEP:
                globals()[fault]()
            return step(state, batch)

        return wrapped

    launch.run(config, Path(workdir), progress=False, make_step=watched)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except TrainingError as error:
        sys.exit(f"error: {error}")
