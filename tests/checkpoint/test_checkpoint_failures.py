"""A checkpoint that can't be written, or not in time, is an error; checkpoints that were there stay whole."""

import errno
import resource
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from qwen3f.checkpoint import manifest
from qwen3f.checkpoint.checkpointer import Checkpointer, CheckpointWriteError
from qwen3f.checkpoint.commit import OldCheckpointStays
from qwen3f.checkpoint.retention import Retention


@pytest.mark.parametrize("at", ["save", "wait", "close", "exit"])
def test_a_failed_write_surfaces_and_harms_nothing(tmp_path, at, caplog):
    small, big = {"w": torch.arange(3.0)}, {"w": torch.randn(300, 300)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    c = Checkpointer(tmp_path, every=1, keep=1)
    c.save(1, small, {})
    c.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # stands for a full disk
    try:
        c.save(2, big, {})
        assert c._writing.ended()  # the write has failed by now, and nobody knows yet
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [r.getMessage() for r in caplog.records] == []  # we raise the error itself, and nobody else reports it
    ways = {"save": lambda: c.save(3, small, {}), "wait": c.wait, "close": c.close}
    words = r"step 2 could not be written .*\(the last complete one is of step 1\): .*File too large"
    with pytest.raises(CheckpointWriteError, match=words):
        ways.get(at, lambda: c.__exit__(None, None, None))()
    assert c.steps() == [1]  # keep=1 deleted nothing
    assert c.restore(small, 1)[0]["w"].equal(small["w"])
    if at in ("save", "wait"):  # reported once; the run may go on
        c.save(2, big, {})
        c.close()
        assert c.steps() == [2]
        assert c.restore(big)[0]["w"].equal(big["w"])


def test_the_error_that_ended_the_run_stays(tmp_path, monkeypatch):
    def fail():
        raise CheckpointWriteError("disk full")

    c = Checkpointer(tmp_path, every=1, keep=0)
    monkeypatch.setattr(c, "wait", fail)

    def run():
        with c:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run()
    assert caught.value.__notes__ == ["disk full"]


def test_a_write_that_hangs_does_not_keep_the_process(tmp_path):
    """It is reported in time, each time; the checkpoint before it stays; and the process ends with the error."""
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        import torch
        from qwen3f.checkpoint import manifest
        from qwen3f.checkpoint.checkpointer import Checkpointer, StuckWrite
        state = {"w": torch.ones(3)}
        with Checkpointer(Path(sys.argv[1]), every=1, keep=1) as c:
            c.save(1, state, {})
            c.wait()
            c.timeout = 1.0
            manifest.write = lambda *args: time.sleep(100)
            c.save(2, state, {})
            for step in (3, 4):
                try:
                    c.save(step, state, {})
                except StuckWrite as error:
                    print(error, flush=True)
    """)
    begin = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=90)
    assert time.monotonic() - begin < 60
    assert run.returncode == 1
    assert run.stdout.count("step 2 has not been written") == 2
    *_, error, farewell = run.stderr.splitlines()
    assert "StuckWrite" in error
    assert farewell == "the process ended before it could write checkpoint 2"
    with Checkpointer(tmp_path, every=1, keep=1) as c:
        assert c.steps() == [1]
        c.restore({"w": torch.ones(3)}, 1)
        c.save(2, {"w": torch.ones(3)}, {})  # as in another process: the write that hung is not in the way
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_an_old_checkpoint_that_stays_is_no_reason_to_lose_the_new_one(tmp_path, monkeypatch):
    state = {"w": torch.ones(3)}

    def denied(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(f"denied: {path}")

    with Checkpointer(tmp_path, every=1, keep=1) as c:
        c.save(1, state, {})
        c.wait()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", denied)
            c.save(2, state, {})
            with pytest.raises(
                CheckpointWriteError, match="of step 2 is written, but .*1, which .* could not be deleted"
            ):
                c.wait()
        assert c.steps() == [2]
    with Checkpointer(tmp_path, every=1, keep=1) as c:
        c.save(3, state, {})
    assert [path.name for path in tmp_path.iterdir()] == ["3"]  # the next start deletes what was left


@pytest.mark.parametrize("best", [0, 1])
def test_an_old_checkpoint_that_the_disk_fails_to_read_holds_nothing_up(tmp_path, monkeypatch, best):
    """Its metrics cannot be read. It is deleted, unless it may be among the best: then it stays until they can."""
    state, real = {"w": torch.ones(3)}, manifest.metrics

    def failing(directory):
        if directory.name == "1":
            raise OSError(errno.EIO, "Input/output error")
        return real(directory)

    with Checkpointer(tmp_path, every=1, keep=Retention(1, best=best)) as c:
        c.save(1, state, {}, {"val_loss": 1.0})
        c.wait()
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "metrics", failing)
            for step in (2, 3):
                c.save(step, state, {}, {"val_loss": float(step)})
                c.wait()
        assert c.steps() == ([1, 2, 3] if best else [3])
        c.save(4, state, {}, {"val_loss": 0.0 if best == 0 else 4.0})
        c.wait()
        assert c.steps() == ([1, 4] if best else [4])


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), OverflowError("too large")])
def test_whatever_keeps_old_checkpoints_from_being_deleted_is_told_with_the_new_one_whole(tmp_path, monkeypatch, error):
    def failing(self, saved):
        raise error

    state = {"w": torch.ones(3)}
    with Checkpointer(tmp_path, every=1, keep=1) as c:
        c.save(1, state, {})
        c.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Retention, "expired", failing)
            c.save(2, state, {})
            with pytest.raises(
                OldCheckpointStays, match=f"of step 2 is written, but .* could not be deleted: .*{error.args[-1]}"
            ):
                c.wait()
        assert c.steps() == [1, 2]
        c.save(3, state, {})
    assert c.steps() == [3]


def test_checkpoints_that_cannot_be_listed_are_not_moved_aside(tmp_path, monkeypatch):
    def failing(directory):
        raise OSError(errno.EIO, "Input/output error")

    with Checkpointer(tmp_path / "checkpoints", every=1, keep=0) as c:
        c.save(1, {"w": torch.ones(3)}, {})
        c.wait()
        monkeypatch.setattr("qwen3f.checkpoint.commit.steps", failing)
        with pytest.raises(CheckpointWriteError, match="after step 0 could not be moved .*Input/output error"):
            c.set_aside(0)
