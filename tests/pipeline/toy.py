"""The nano pipeline with fake_launch.py in place of launch.py, and helpers that read what it left."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3f import cli
from qwen3f.pipeline import commands, run

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TRAINED = ("pretrain_s1", "pretrain_s2", "pretrain_s3", "sft_cold_start", "grpo", "sft_fusion", "grpo_general", "dpo")
NAMES = (*TRAINED, "evaluation")


def fake(put, launcher="fake_launch.py"):
    """Let `launcher` run the stages, and skip the check before the first one. put: setattr, or a MonkeyPatch's."""
    put(commands, "LAUNCHER", HERE / launcher)
    put(commands, "FORESEE", ("-c", ""))


def preset(name):
    return cli.load_experiment(str(ROOT / "experiments" / f"pipeline.py:{name}"))


def make_config(**changes):
    """The configuration of nano with three steps a stage. `__` in a key stands for a dot."""
    config = preset("nano")
    steps = {f"set.{name}.steps": 3 for name in TRAINED} | {"report": False}
    config.update_from_flattened_dict(steps | {key.replace("__", "."): value for key, value in changes.items()})
    return config


def go(directory, **changes):
    """Run the pipeline in this process. Returns the content of pipeline.json."""
    run.run(make_config(**changes), directory, progress=False, chosen=[key.replace("__", ".") for key in changes])
    return read(directory)


def made(directory, **changes):
    """Run the pipeline in `directory` and return that; for fixtures that live longer than a test."""
    with pytest.MonkeyPatch.context() as patch:
        fake(patch.setattr)
        go(directory, **changes)
    return directory


def read(directory):
    return json.loads((directory / "pipeline.json").read_text())


def stage(record, name):
    return next(one for one in record["stages"] if one["name"] == name)


def statuses(record):
    return {one["name"]: one["status"] for one in record["stages"]}


def numbers(directory):
    """(weights, measures) of every stage. They must be the same whatever interrupted the pipeline."""
    record = read(directory)
    weights = {
        one["name"]: (directory / one["workdir"] / "checkpoints" / str(one["steps"]) / "manifest.json").read_text()
        for one in record["stages"]
        if one["steps"]
    }
    return weights, {one["name"]: one["measures"] for one in record["stages"]}


def start(directory, **changes):
    """Start the pipeline in a process of its own."""
    command = [sys.executable, "-m", "tests.pipeline.toy", str(directory), json.dumps(changes)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )


def wait_for(path, process):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


if __name__ == "__main__":
    fake(setattr, *sys.argv[3:])
    try:
        go(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    except Exception as error:
        sys.exit(cli.report(error, 1))
