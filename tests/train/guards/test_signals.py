"""The second signal ends the process; the loop's answer to the first is in test_loop.py."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from qwen3f.train.guards.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.name == ""
        os.kill(os.getpid(), number)
        assert stop.name == number.name
    assert signal.getsignal(number) == before
    assert "stopping after this step" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_exits_at_once(number):
    code = f"""
import os
from qwen3f.train.guards.signals import StopRequest
with StopRequest():
    os.kill(os.getpid(), {int(number)})
    print("still here", flush=True)
    os.kill(os.getpid(), {int(number)})
    print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 128 + number
    assert done.stdout == "still here\n"


def test_other_threads_leave_handlers_alone():
    before, names = signal.getsignal(signal.SIGTERM), []

    def inside():
        with StopRequest() as stop:
            names.append((stop.name, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert names == [("", before)]
