"""Says what a checkpoint holds and whether it is whole: every leaf's shape and dtype, sizes, steps, checksums.

    python launch.py --config experiments/inspect.py --config.path=W

W is a workdir (its last checkpoint) or its checkpoints/N. Nothing is written. Exit code 2 if a file is damaged.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "inspect"
    config.path = ""
    # dcp also opens checkpoints of torch.distributed.checkpoint. Part of these is a pickle: only open files you trust.
    config.backend = "orbax"
    config.verify = True  # read every file and compare its checksum; False: check only names and sizes
    return config
