"""Starts a host's ranks and waits for them.

For ranks on several hosts, use torchrun. On one host torchrun has a disadvantage: when it gets SIGTERM, it gives ranks
only 30 s (in torch 2.11), too little to save a large model, and exits with an error. The ranks meet at a store in this
process, and get the environment variables that torchrun would set.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch.distributed import TCPStore

from qwen3f.errors import TrainingError
from qwen3f.processes.parent import end_with

_POLL = 0.1  # seconds
_GRACE = 2.0  # seconds that the other ranks get to end by themselves after one has failed
_HOST = "127.0.0.1"
_PARENT = "QWEN3F_LAUNCHER"  # environment variable of the ranks: the launcher's process id


def run_ranks(command: Sequence[str], world: int, environment: Mapping[str, str], restarts: int) -> int:
    """Run `python command…` once per rank, and wait for all ranks. Returns the exit code for this process.

    The code is 0 if all ranks exit with 0; 2 if one reports wrong input; and after SIGTERM or SIGINT, which are passed
    on to the ranks, that of the first rank that failed. environment: for the ranks, without torchrun's variables.
    restarts: how often all ranks are restarted after one is lost; then TrainingError is raised. It names the first rank
    that failed, or a rank that is stopped (SIGSTOP) and for which that one waited. All other ranks have been killed
    then. If this process is killed, its ranks get SIGTERM.
    """
    for attempt in range(restarts + 1):
        code, failed, stopped = _run_once(command, world, environment, attempt)
        if failed is None or code == 2:
            return code
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        what = f"rank {failed} of {world} ended with {how}; the others were ended"
        if stopped is not None:
            what = (
                f"rank {stopped} of {world} is stopped, by SIGSTOP or a debugger, and the others waited for it until "
                f"rank {failed} ended with {how}; all were ended"
            )
        if attempt < restarts:
            print(f"{what}; starting all again ({attempt + 1} of {restarts})", file=sys.stderr, flush=True)
    raise TrainingError(what)


def end_with_parent() -> None:
    """Called by a rank: if run_ranks started it, it gets SIGTERM when the launcher's process ends."""
    parent = int(os.environ.get(_PARENT, 0))
    if parent:
        end_with(parent)


def _run_once(
    command: Sequence[str], world: int, environment: Mapping[str, str], attempt: int
) -> tuple[int, int | None, int | None]:
    """(exit code, first rank that failed, a stopped rank for which the others wait). The ranks are None if there is no
    such rank, and after SIGTERM or SIGINT."""
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    common = {
        **environment,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # makes env:// connect to our store, instead of one that rank 0 serves
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        _PARENT: str(os.getpid()),
    }
    ranks: list[subprocess.Popen] = []
    with _passed_on(ranks) as told:
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # own session: Ctrl-C in a terminal then reaches only this process, which passes it on once to each rank
            process = subprocess.Popen([sys.executable, *command], env=common | own, start_new_session=True)
            ranks.append(process)
            for number in told:  # signals that came before this rank was started
                process.send_signal(number)
        try:
            failed = _first_failure(ranks)
            if failed is None:
                return 0, None, None
            code = ranks[failed].returncode
            stopped = next((rank for rank, process in enumerate(ranks) if _is_stopped(process)), None)
            _wait(ranks, _GRACE)
        finally:
            for process in ranks:
                _kill(process)
    return (code if code >= 0 else 128 - code, None, None) if told else (code, failed, stopped)


def _first_failure(ranks: Sequence[subprocess.Popen]) -> int | None:
    """Wait until all ranks exited with 0 (returns None), or one failed (returns it). If several failed at the same
    time, one that a signal killed is returned first."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return min(failed, key=lambda rank: (codes[rank] > 0, rank))
        if None not in codes:
            return None
        time.sleep(_POLL)


def _is_stopped(process: subprocess.Popen) -> bool:
    """Whether the process exists and is stopped by a signal or a debugger (Linux, proc(5))."""
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return process.poll() is None and state in "Tt"
    except (OSError, IndexError):  # it has just ended, or the system has no /proc
        return False


def _kill(process: subprocess.Popen) -> None:
    """Kill a rank that still runs, and its children, such as data workers; also the children of a killed rank."""
    if process.poll() is None or process.returncode < 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(ranks: Sequence[subprocess.Popen], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(process.poll() is None for process in ranks):
        time.sleep(_POLL)


@contextlib.contextmanager
def _passed_on(ranks: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """A context that passes SIGTERM and SIGINT on to the ranks. Yields the list of signals received so far."""
    told: list[int] = []

    def handle(number: int, frame: object) -> None:
        told.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
