"""One writer at a time in a workdir.

The operating system holds the lock for an open file: whatever ends the process, SIGKILL too, frees it, and a file that
is left behind locks nobody out. Linux passes it on to NFS servers, so runs on two hosts see each other where the mount
has locks. Readers (inspect, generate, plan) take none.
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

_HELD: set[int] = set()  # open files of this process; a forked worker must not keep them when this process is gone


def _close_in_child() -> None:
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def only_writer(workdir: Path, world: "World") -> Iterator[None]:
    """`held` for a run of several ranks, which all call this together: rank 0 holds the lock, all raise its errors."""
    with contextlib.ExitStack() as stack:
        world.together(lambda: stack.enter_context(held(workdir)) if world.main else None, UserError)
        yield


@contextlib.contextmanager
def held(workdir: Path, flag: str = "--workdir") -> Iterator[None]:
    """Under it, no other run writes into `workdir`, which is made; one that was made and stays empty is removed.

    flag: what names the directory on the command line, for messages.

    Raises UserError, with nothing in the workdir changed: another process has the lock (the message names host and
    process), or the directory cannot be written. Says so, and goes on, on a file system that has no locks.
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
        with contextlib.suppress(OSError):  # left behind, it does no harm
            (workdir / NAME).unlink()
        _remove(made)
        os.close(handle)


def _locked(workdir: Path, made: list[Path], flag: str) -> int:
    """The open, locked file, with this process's name in it. Adds to `made` the directories that were missing."""
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
            print(f"{workdir} has no locks ({error.strerror}): nothing keeps a second run out of it", flush=True)
        if _is_there(handle, workdir / NAME):  # and was not removed, by whoever had it, between opening and locking
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
        if error.errno in (errno.ENOENT, errno.ESTALE):  # by NFS's words
            return False
        raise


def _holder(handle: int) -> str:
    """Who holds the lock, in words. It may have taken the lock a moment ago, and not yet have written its name."""
    for _ in range(20):
        try:
            holder = json.loads(os.pread(handle, 4096, 0))
            return f"process {holder['process']} on host {holder['host']}, since {holder['since']},"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "another process"


def _remove(made: list[Path]) -> None:
    """Remove the directories of `made`, the deepest first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for place in made:
            place.rmdir()
