"""Two runs in one workdir, as real processes: the second is told who writes there, whatever happens to the first."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from qwen3f.errors import UserError
from qwen3f.train.lock import NAME, held, only_writer

# Holds the lock until it is killed. With "fork", a child outlives it, as a hung worker would.
_HOLDER = """
import os, sys, time
from pathlib import Path
from qwen3f.train.lock import held
with held(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else 0
    if sys.argv[2] == "fork" and child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""
_SECOND = """
import sys
from pathlib import Path
from qwen3f.errors import UserError
from qwen3f.train.lock import held
try:
    with held(Path(sys.argv[1])):
        print("mine")
except UserError as error:
    print(error)
"""


@contextlib.contextmanager
def holder(workdir, how="alone"):
    """A process that has the lock; gives it and its child's number (0: none)."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(workdir), how], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def second(workdir):
    done = subprocess.run([sys.executable, "-c", _SECOND, str(workdir)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def listing(workdir):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in workdir.iterdir()}


def test_the_second_process_is_told_who_writes_there_and_touches_nothing(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "metrics.jsonl").write_text("{}\n")
    with holder(tmp_path / "w") as (process, _):
        before = listing(tmp_path / "w")
        for place in (tmp_path / "w", tmp_path / "link"):
            if place.name == "link":
                place.symlink_to(tmp_path / "w")
            said = second(place)
            assert said.startswith(f"{place} is in use: process {process.pid} on host {os.uname().nodename}, since ")
            assert "\n" not in said
        assert listing(tmp_path / "w") == before
        process.send_signal(signal.SIGSTOP)  # a process that hangs still has it
        assert "is in use" in second(tmp_path / "w")
    assert second(tmp_path / "w") == "mine"


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_process_leaves_it_open(how, tmp_path):
    """Its lock is gone, also if a worker that it forked is still alive."""
    with holder(tmp_path / "w", how) as (process, child):
        process.kill()
        process.wait()
        if child:
            os.kill(child, 0)  # it is alive
        assert second(tmp_path / "w") == "mine"


def test_within_one_process(tmp_path):
    with held(tmp_path / "w"):
        with (
            pytest.raises(UserError, match=rf"w is in use: process {os.getpid()} on host"),
            held(tmp_path / "w"),
        ):
            pass
        with held(tmp_path / "other"):
            (tmp_path / "w" / "x").touch()
        with pytest.raises(UserError, match="is in use"), held(tmp_path / "w"):
            pass
    with held(tmp_path / "w"):
        pass
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["x"]  # no lock is left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w"]  # nothing was written into the other


def test_a_file_that_is_removed_while_another_waits_to_lock_it(tmp_path, monkeypatch):
    """The first holder ends after the second has opened the file and before it locks it.

    The second must not hold a file that is gone.
    """
    flock, first = fcntl.flock, contextlib.ExitStack()
    first.enter_context(held(tmp_path / "w"))

    def slow(handle, operation):
        monkeypatch.setattr("fcntl.flock", flock)
        first.close()
        flock(handle, operation)

    monkeypatch.setattr("fcntl.flock", slow)
    with held(tmp_path / "w"):
        assert (tmp_path / "w" / NAME).is_file()
        with pytest.raises(UserError, match="is in use"), held(tmp_path / "w"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_one_that_a_killed_process_left_locks_nobody_out(tmp_path):
    (tmp_path / NAME).write_text('{"host": "h", "process": 1, "since": "x"}')
    with held(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_frees_it_and_leaves_no_directory(tmp_path):
    with pytest.raises(UserError, match="cannot start"), held(tmp_path / "a" / "b"):
        raise UserError("cannot start")
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_start_at_once_one_wins(tmp_path):
    """The directory does not exist when they start. Those that are refused must not remove it.

    Whoever holds the lock makes a file beside the workdir, so two holders at the same time would end with an error.
    """
    alone = "open(sys.argv[1] + '.holder', 'x').close(); time.sleep(2); os.remove(sys.argv[1] + '.holder')"
    command = [sys.executable, "-c", _HOLDER.replace("time.sleep(60)", alone), str(tmp_path / "w"), "alone"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=60) for process in processes]
    won = [process.returncode for process in processes].count(0)
    assert won >= 1, outputs
    refused = [errors for (_, errors), process in zip(outputs, processes) if process.returncode]
    assert all("is in use" in errors for errors in refused)


class _World:
    """One of two ranks. What rank 0 raises, rank 1 raises too."""

    def __init__(self, main):
        self.main = main

    def together(self, work, *errors):
        assert errors == (UserError,)
        work()
        if not self.main:
            raise UserError("as rank 0 says")


def test_rank_0_holds_it_and_all_raise(tmp_path):
    with only_writer(tmp_path / "w", _World(True)):
        with pytest.raises(UserError, match="is in use"), only_writer(tmp_path / "w", _World(True)):
            pass
        with pytest.raises(UserError, match="as rank 0 says"), only_writer(tmp_path / "w", _World(False)):
            pass
    with held(tmp_path / "w"):
        pass


def harm_file(place):
    place.write_text("x")
    return place, "File exists"


def harm_below_a_file(place):
    place.write_text("x")
    return place / "w", "Not a directory"


def harm_dangling(place):
    place.symlink_to(place.parent / "nowhere")
    return place, "File exists"


def harm_long(place):
    return place.with_name("x" * 300), "File name too long"


@pytest.mark.parametrize("harm", [harm_file, harm_below_a_file, harm_dangling, harm_long])
def test_a_workdir_that_cannot_be(harm, tmp_path):
    workdir, words = harm(tmp_path / "w")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"--workdir=.* cannot be written \({words}\): choose"), held(workdir):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with held(tmp_path / "w"):
        (tmp_path / "w" / "x").touch()
    assert "w has no locks (No locks available): don't start a second run there" in capsys.readouterr().out


def test_a_name_that_is_not_written_yet(tmp_path, monkeypatch):
    with held(tmp_path / "w"):
        (tmp_path / "w" / NAME).write_text("")
        began = time.monotonic()
        with pytest.raises(UserError, match="w is in use: another process writes there"), held(tmp_path / "w"):
            pass
        assert time.monotonic() - began < 10
