"""One writer at a time in a workdir.

The lock is flock on an open file. The operating system releases it when the process ends, even by SIGKILL, so a lock
file that is left behind blocks nobody. Linux passes flock on to NFS servers: runs on two hosts see each other's lock if
the mount supports locks. Readers (inspect, generate, plan) take no lock.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3f.errors import UserError

if TYPE_CHECKING:
    from qwen3f.processes.world import World

NAME = ".lock"

_HELD: set[int] = set()  # locked files; forked workers close them, else they would keep the lock after this process


def _close_in_child() -> None:
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def only_writer(workdir: Path, world: "World") -> Iterator[None]:
    """`held` for all ranks of a run, which enter it together: rank 0 holds the lock; its errors are raised on all."""
    with contextlib.ExitStack() as stack:
        world.together(lambda: stack.enter_context(held(workdir)) if world.main else None, UserError)
        yield


@contextlib.contextmanager
def held(workdir: Path, flag: str = "--workdir") -> Iterator[None]:
    """A context in which no other run writes into `workdir`. Missing directories are made, and removed if they stay
    empty.

    flag: the flag that gives the directory, for messages. Raises UserError, without a change to the workdir, if another
    process has the lock (the message names host and process), or if the directory cannot be written. On a file system
    without locks it prints a line and continues.
    """
    made: list[Path] = []
    try:
        handle = _locked(workdir, made, flag)
    except OSError as error:
        _remove(made)
        raise UserError(
            f"{flag}={workdir} cannot be written ({error.strerror or error}): choose another directory"
        ) from error
    _HELD.add(handle)
    try:
        yield
    finally:
        _HELD.discard(handle)
        with contextlib.suppress(OSError):  # a lock file that stays does no harm
            (workdir / NAME).unlink()
        _remove(made)
        os.close(handle)


def _locked(workdir: Path, made: list[Path], flag: str) -> int:
    """The handle of the locked file; it contains host and process id. Appends directories that were made to `made`."""
    while True:
        made += [place for place in (workdir, *workdir.parents) if not place.exists() and place not in made]
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(handle)
            os.close(handle)
            raise UserError(
                f"{workdir} is in use: {holder} writes there; wait for it or end it, or choose another {flag}"
            ) from error
        except OSError as error:
            print(
                f"the file system of {workdir} has no locks ({error.strerror}): don't start a second run there",
                flush=True,
            )
        if _is_there(handle, workdir / NAME):  # else the previous holder removed it between our open and lock: retry
            break
        os.close(handle)
    content = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(content).encode(), 0)
    return handle


def _is_there(handle: int, path: Path) -> bool:
    try:
        there = os.fstat(handle)
        return there.st_nlink > 0 and os.path.samestat(there, path.stat())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE: NFS's word for a removed file
            return False
        raise


def _holder(handle: int) -> str:
    """Who holds the lock, in words. Retries, because the holder may not yet have written its name."""
    for _ in range(20):
        try:
            holder = json.loads(os.pread(handle, 4096, 0))
            return f"process {holder['process']} on host {holder['host']}, since {holder['since']},"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "another process"


def _remove(made: list[Path]) -> None:
    """Remove the directories of `made`, the deepest first, until one is not empty."""
    with contextlib.suppress(OSError):
        for place in made:
            place.rmdir()
