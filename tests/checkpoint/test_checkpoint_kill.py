"""kill -9 and full disks, at every change that a save makes to the file system and at random moments of a run."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qwen3f.train.loop import run
from tests.train import victims
from tests.train.forker import Forker
from tests.train.runs import assert_same_bits, final_state


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """The library that makes file-system calls fail, built by the compiler that torch.compile needs too."""
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("filesystem_faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def forker(faults, tmp_path_factory):
    with Forker(tmp_path_factory.mktemp("victims"), faults) as forker:
        yield forker


def assert_whole(checkpoints):
    """Every checkpoint that bears a step's number is that step, bit for bit; returns them."""
    for step in checkpoints.steps():
        state, meta = checkpoints.restore(victims.state_of(0), step)
        assert_same_bits(state, victims.state_of(step))
        assert meta == {"step": step}
    return checkpoints.steps()


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_kill_at_any_change_to_the_disk_loses_no_committed_step(stride, forker, tmp_path):
    """Each process removes what the one before it left, saves one step more and is killed `stride` changes later."""
    directory = str(tmp_path / "checkpoints")
    checkpoints = victims.checkpointer(directory)
    before, ends = [], set()
    assert forker.call("save_and_die", directory, 0)[0] == 0
    for call in range(1, 400, stride):
        before = assert_whole(checkpoints)
        code, said = forker.call("save_and_die", directory, call)
        after = assert_whole(checkpoints)
        assert after[-1] in (before[-1], before[-1] + 1)
        ends.add(after[-1] - before[-1])
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
    assert code == 0
    assert ends == {0, 1}  # kills before the commit, and between it and the end of retention
    assert call > 80  # saving two small leaves makes so many; with fewer, some were not noticed
    assert after == [before[-1] + 1]
    assert [path.name for path in checkpoints.directory.iterdir()] == [str(after[0])]  # leftovers are gone


@pytest.mark.parametrize(
    "error, stride",
    [
        ("ENOSPC", 8),
        pytest.param("ENOSPC", 1, marks=pytest.mark.nightly),
        pytest.param("EDQUOT", 8, marks=pytest.mark.nightly),
    ],
)
def test_a_disk_that_fills_up_anywhere_fails_the_save_and_nothing_else(error, stride, forker, tmp_path):
    """The disk fills at leaves, record, manifest or rename. The half-written checkpoint is removed and makes room."""
    calls = list(range(1, 70, stride))
    code, said = forker.call("save_on_full_disk", str(tmp_path / "checkpoints"), error, calls)
    assert code == 0, said
    assert int(said.split()[-1]) > 0.8 * len(calls), said


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.nightly)])
def test_kills_at_random_moments_change_nothing(kills, make, forker, tmp_path):
    """A run that saves at every step is killed `kills` times. Each start resumes from the last committed step."""
    changes = {"schedule.kind": "constant", "schedule.warmup": 2, "eval.every": 0, "checkpoint.every": 1}
    config = make(steps=100_000, **changes, **{"model.num_hidden_layers": 1, "sample.tokens": 0, "eval.max_docs": 1})
    workdir = tmp_path / "killed"
    checkpoints = victims.checkpointer(workdir / "checkpoints")
    rng, steps, kinds = random.Random(0), [], set()
    as_json = json.loads(config.to_json_best_effort())
    run(make(**{**changes, "steps": 2}), tmp_path / "warm", progress=False)  # tokenizer and tokens are cached now
    for number in range(kills):
        before = checkpoints.latest()
        pid = forker.start("train", as_json, str(workdir))
        begin = time.monotonic()
        measuring = number % 10 < 2  # again now and then, as the machine's load changes
        while measuring and checkpoints.latest() == before:
            time.sleep(0.01)
        if measuring:  # from a start to the next commit, after the first with a restore; it times the kills
            life = time.monotonic() - begin
        time.sleep(rng.uniform(0.2, 1.5) * life)
        os.kill(pid, signal.SIGKILL)
        code, said = forker.wait()
        assert code == -signal.SIGKILL, said
        assert "damaged" not in said
        if "model:" in said:  # it has said where it resumes
            assert (f"resuming from step {before}" in said) == (before is not None), said
        steps.append(checkpoints.latest() or 0)
        kinds |= {path.suffix for path in checkpoints.directory.glob("*.*")}
    assert steps == sorted(steps)
    assert len(set(steps)) > 0.3 * kills  # many lives got further
    assert ".writing" in kinds or kills < 50  # some kills struck during a write
    config.steps = steps[-1] + 3
    config.checkpoint.every = 0
    run(config, workdir, progress=False)
    run(config, tmp_path / "undisturbed", progress=False)
    assert_same_bits(
        final_state(config, workdir, config.steps), final_state(config, tmp_path / "undisturbed", config.steps)
    )
