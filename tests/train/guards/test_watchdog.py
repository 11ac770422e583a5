"""A hang ends the process and shows where it was; a run that goes on is left alone."""

import faulthandler
import subprocess
import sys
import threading
import time

from qwen3f.train.guards.watchdog import watchdog
from qwen3f.train.loop import run

HANG = """
import threading, time
from qwen3f.train.guards.watchdog import watchdog

def stuck_loader():
    time.sleep(60)

def stuck_step():
    time.sleep(60)

threading.Thread(target=stuck_loader, daemon=True).start()
with watchdog(0.5) as alive:
    for _ in range(3):
        time.sleep(0.3)
        alive()
    print("trained", flush=True)
    stuck_step()
"""


def test_a_hang_ends_the_process_with_every_threads_stack():
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1
    assert done.stdout == "trained\n"  # 0.9 s in steps of 0.3 s
    assert "the run has not finished a step in 0.5 s; it is at <string>:" in done.stderr
    assert "(stuck_step):" in done.stderr
    assert "in stuck_step" in done.stderr
    assert "in stuck_loader" in done.stderr
    assert time.monotonic() - begin < 30


HOLD = """
import ctypes
from qwen3f.train.guards import watchdog

watchdog._BACKUP = 0.5
def holds_the_lock():
    ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the interpreter's lock

with watchdog.watchdog(0.5):
    holds_the_lock()
"""


def test_a_hang_that_holds_the_interpreters_lock_ends_too():
    done = subprocess.run([sys.executable, "-c", HOLD], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1
    assert "in holds_the_lock" in done.stderr


def test_without_a_limit_nothing_is_armed(monkeypatch):
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *args, **kw: 1 / 0)
    threads = threading.active_count()
    with watchdog(0) as alive:
        alive()
        assert threading.active_count() == threads


def test_the_loop_is_alive_at_every_step(make, tmp_path, monkeypatch):
    armed, cancelled = [], []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **kw: armed.append((seconds, kw["exit"])))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(len(armed)))
    run(make(steps=3, watchdog=77.0), tmp_path, progress=False)
    assert armed == [(82.0, True)] * 4
    assert cancelled == [4]
