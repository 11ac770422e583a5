"""kill -9 at random moments around saves: the next start finds the last committed step, whole."""

import os
import random
import signal
import subprocess
import sys
import time

import torch

from qwen3f.train.checkpoint import Checkpointer

# A process that has imported everything and forks a victim for each line it reads: one import for many kills.
VICTIMS = """
import os, sys
from pathlib import Path
import torch
from qwen3f.train import checkpoint, orbax
orbax.import_jax_and_orbax()

def train(directory):
    torch.set_num_threads(1)
    state = {"w": torch.zeros(400, 500), "step": torch.tensor(0)}
    c = checkpoint.Checkpointer(Path(directory) / "checkpoints", every=1, keep=2)
    acks = os.open(directory + "/acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if c.latest() is not None:
        state, meta = c.restore(state)
        assert meta == {"step": int(state["step"])}
        os.write(acks, b"r %d\\n" % meta["step"])
    while True:
        state["step"] += 1
        state["w"].fill_(float(state["step"]))
        step = int(state["step"])
        c.save(step, state, {"step": step})
        c.wait()
        os.write(acks, b"s %d\\n" % step)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            train(line.strip())
        finally:
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_kill_9_loses_no_committed_step(tmp_path):
    def acks():
        path = tmp_path / "acks"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    rng = random.Random(0)
    like = {"w": torch.zeros(400, 500), "step": torch.tensor(0)}
    mid_write, resumable = 0, None
    with subprocess.Popen(
        [sys.executable, "-c", VICTIMS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as forker:
        for _ in range(8):
            before = acks()
            forker.stdin.write(f"{tmp_path}\n")
            forker.stdin.flush()
            pid = int(forker.stdout.readline())
            deadline = time.monotonic() + 20
            while len(acks()) <= len(before) + 1 and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.15))
            os.kill(pid, signal.SIGKILL)
            assert int(forker.stdout.readline()) == -signal.SIGKILL, "the victim ended by itself"
            since = acks()[len(before) :]
            committed = max(int(step) for _, step in acks())
            if before:  # the victim went on from what was there
                assert since[0] == ["r", str(resumable)]
            c = Checkpointer(tmp_path / "checkpoints", every=1, keep=2)
            resumable = c.latest()
            assert resumable in (committed, committed + 1)  # it may have died between the commit and its note
            assert len(c.steps()) >= min(2, committed)
            for step in c.steps():
                state, meta = c.restore(like, step)
                assert state["w"].eq(float(step)).all()
                assert (int(state["step"]), meta) == (step, {"step": step})
            mid_write += any(p.name.endswith("-tmp") for p in c.directory.iterdir())
        forker.stdin.close()
        assert "Error" not in forker.stderr.read()
    assert mid_write > 0  # else no kill struck during a write
    with Checkpointer(tmp_path / "checkpoints", every=1, keep=2) as c:
        c.save(10_000, like, {})
        c.wait()
        assert sorted(int(p.name) for p in c.directory.iterdir()) == [resumable, 10_000]  # leftovers are gone
