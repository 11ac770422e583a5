"""Starting a host's ranks and seeing them to their end.

torch's elastic launcher does this too, and is what starts ranks on several hosts. Here it falls short in one thing:
asked to end, it gives ranks 30 s (in torch 2.11), too few to save a large model, and ends with an error. Ranks meet
at a store that this process serves, and find the variables that torchrun would set.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch.distributed import TCPStore

from qwen3f.errors import TrainingError

_POLL = 0.1  # seconds
_GRACE = 2.0  # seconds that the others get to end by themselves, once one rank has failed
_HOST = "127.0.0.1"
_PARENT = "QWEN3F_LAUNCHER"  # our process's number, for its ranks
_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


def run_ranks(command: Sequence[str], world: int, environment: Mapping[str, str], restarts: int) -> int:
    """Run `python command…` once a rank and wait for all of them; returns the exit code to end with.

    0 when all ended with 0; 2 when one reported wrong input; after SIGTERM or SIGINT, which are passed on to the ranks,
    that of the first rank that failed. environment: the ranks', but for what torchrun sets. restarts: how often all
    ranks are started again after one is lost. Raises TrainingError when no restart is left, which names the first rank
    that ended otherwise, or one that is stopped and kept that one waiting; all are ended then. If this process is
    killed, its ranks get SIGTERM.
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
    """For a rank: if run_ranks started it, SIGTERM comes once that process is gone."""
    parent = int(os.environ.get(_PARENT, 0))
    if parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was gone before
            os.kill(os.getpid(), signal.SIGTERM)


def _run_once(
    command: Sequence[str], world: int, environment: Mapping[str, str], attempt: int
) -> tuple[int, int | None, int | None]:
    """(exit code, the rank that failed first, one that is stopped, and so keeps the others waiting); no rank if none
    failed, or if we were told to stop."""
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    common = {
        **environment,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # env:// then takes our store, instead of having rank 0 serve one
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        _PARENT: str(os.getpid()),
    }
    ranks: list[subprocess.Popen] = []
    with _passed_on(ranks) as told:
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own: Ctrl-C in a terminal reaches us alone, and each rank once, from us.
            process = subprocess.Popen([sys.executable, *command], env=common | own, start_new_session=True)
            ranks.append(process)
            for number in told:  # which came before this rank did
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
    """Wait until all have ended with 0, or one otherwise; of several together, one that a signal ended comes first."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return min(failed, key=lambda rank: (codes[rank] > 0, rank))
        if None not in codes:
            return None
        time.sleep(_POLL)


def _is_stopped(process: subprocess.Popen) -> bool:
    """Whether it runs, and is held by a signal (Linux, proc(5))."""
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return process.poll() is None and state in "Tt"
    except (OSError, IndexError):  # it has just ended, or the system keeps no such file
        return False


def _kill(process: subprocess.Popen) -> None:
    """A rank that still runs or was killed, with what it started, such as data workers."""
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
    """SIGTERM and SIGINT go to the ranks; yields a list that they are added to."""
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
