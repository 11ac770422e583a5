"""What the forked processes of forker.py do until they are killed."""

import ctypes
import errno
from pathlib import Path

import torch
import torch._dynamo  # imported here, as is TensorBoard, and not by each forked process for itself
import torch.utils.tensorboard
from ml_collections import ConfigDict

from qwen3f.checkpoint import orbax
from qwen3f.checkpoint.checkpointer import Checkpointer, CheckpointWriteError
from qwen3f.train import loop
from qwen3f.train.metrics import peak_flops


def warm_up():
    orbax.import_jax_and_orbax()
    peak_flops(torch.device("cpu"))


def state_of(step):
    """A state in which every element shows the step."""
    return {
        "w": torch.full((40, 50), float(step)),
        "opt": {"m": torch.full((7,), -float(step))},
        "step": torch.tensor(step),
    }


def checkpointer(directory):
    return Checkpointer(Path(directory), every=1, keep=1)


def save_and_die(directory, call):
    """Save the next step; the `call`-th change to the file system kills the process, if there are so many."""
    faults = ctypes.CDLL(None)
    checkpoints = checkpointer(directory)
    step = (checkpoints.latest() or 0) + 1
    faults.faults_arm(directory.encode(), call, 0, 0)
    checkpoints.save(step, state_of(step), {"step": step})
    checkpoints.wait()
    print(faults.faults_disarm())


def save_on_full_disk(directory, error, calls):
    """For each of `calls`: a save during which the disk is full from that call on, then one with room again."""
    faults = ctypes.CDLL(None)
    failed, step = 0, 1
    checkpoints = checkpointer(directory)
    checkpoints.save(step, state_of(step), {"step": step})
    checkpoints.wait()
    for call in calls:
        faults.faults_arm(directory.encode(), call, getattr(errno, error), 1)
        try:
            checkpoints.save(step + 1, state_of(step + 1), {"step": step + 1})
            checkpoints.wait()
        except CheckpointWriteError as failure:
            failed += "could not be written" in str(failure)
        faults.faults_disarm()
        there = sorted(path.name for path in Path(directory).iterdir())
        assert there in ([str(step)], [str(step + 1)], [str(step), str(step + 1)]), there
        for kept in checkpoints.steps():
            assert checkpoints.restore(state_of(0), kept)[1] == {"step": kept}
        step = checkpoints.latest() + 1
        checkpoints.save(step, state_of(step), {"step": step})
        checkpoints.wait()
        assert checkpoints.steps() == [step]
    print(failed)


def train(config, workdir):
    torch.set_num_threads(1)
    loop.run(ConfigDict(config), Path(workdir), progress=False)
