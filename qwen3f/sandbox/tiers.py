"""The three tiers: bubblewrap's namespaces, Landlock and seccomp alone, or a refusal. Which one works is found by
trying.

A  "bubblewrap": the process has its own namespaces (files, processes, network, users) and can read only Python; a job
   has a user of its own. Inside, the process also takes away its own rights as in B, but without Landlock.
B  "landlock": for containers that deny namespaces. The process takes away its own rights (confine.py).
C  neither works: nothing is run, unless the tier "none" is named, which has resource limits only.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from qwen3f.errors import UserError

Tier = Literal["bubblewrap", "landlock", "none"]
TIERS: tuple[Tier, ...] = ("bubblewrap", "landlock", "none")
VARIABLE = "QWEN3F_SANDBOX"  # the tier to use; "" or "auto": the best that works
_SYSTEM = ("/lib", "/lib64", "/lib32", "/bin", "/sbin")


@dataclasses.dataclass(frozen=True)
class Python:
    """The Python of the sandbox. program: its path, which every user can read. places: directories that it needs beside
    the system's."""

    program: str
    places: tuple[str, ...] = ()


@functools.cache
def find_python() -> Python:
    """This Python if any user may read it, else the system's. Raises UserError if there is none."""
    own = Path(sys.base_prefix).resolve()
    program = own / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if program.exists() and _for_all(program):
        return Python(str(program), () if own.is_relative_to("/usr") else (str(own),))
    for name in ("/usr/bin/python3", "/usr/local/bin/python3"):
        path = Path(name)
        if path.exists() and _for_all(path.resolve()):
            return Python(str(path.resolve()))
    raise UserError(
        f"the sandbox needs a Python that any user may read; {own} is another user's, and /usr/bin/python3 is not "
        "there: install the system's python3"
    )


def _for_all(path: Path) -> bool:
    """Whether every user may reach and run a file."""
    return all(place.stat().st_mode & stat.S_IXOTH for place in (path, *path.parents))


def wrapper(tier: Tier, python: Python) -> list[str]:
    """The part of the command line before the Python program."""
    if tier != "bubblewrap":
        return []
    command = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    command += ["--clearenv", "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    command += ["--ro-bind", "/usr", "/usr"]
    for place in _SYSTEM:
        if os.path.islink(place):
            command += ["--symlink", os.readlink(place), place]
        elif os.path.isdir(place):
            command += ["--ro-bind", place, place]
    for place in python.places:
        command += ["--ro-bind", place, place]
    return [*command, "--proc", "/proc", "--dev", "/dev", "--size", str(1 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"]


def readable(python: Python) -> list[str]:
    """The directories that Landlock allows to be read."""
    return ["/usr", *_SYSTEM, *python.places]


def find_tier(wanted: str = "") -> Tier:
    """The tier `wanted` (by default that of VARIABLE), if it works here; for "" or "auto" the best one that works.

    Raises UserError, naming what is missing, if it does not work, or if none does.
    """
    wanted = wanted or os.environ.get(VARIABLE, "")
    if wanted in ("", "auto"):
        reasons = []
        for tier in TIERS[:2]:
            reason = why_not(tier)
            if not reason:
                return tier
            reasons.append(f"{tier}: {reason}")
        raise UserError(
            f"code is run in a sandbox alone, and none works here ({'; '.join(reasons)}). Install bubblewrap, or use a "
            "kernel with Landlock; --config.sandbox=none runs it without one"
        )
    if wanted not in TIERS:
        raise UserError(f"--config.sandbox={wanted}: write auto, {', '.join(TIERS)}")
    if reason := why_not(wanted):
        raise UserError(f"--config.sandbox={wanted} does not work here: {reason}")
    return wanted


@contextlib.contextmanager
def preferred(tier: str) -> Iterator[None]:
    """A context in which `tier` is the default tier, in this process and in processes that it starts."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = tier
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


@functools.cache
def why_not(tier: Tier) -> str:
    """Why a tier does not work here; "" if it does. Tries it."""
    if tier == "bubblewrap" and not shutil.which("bwrap"):
        return "there is no bwrap: apt-get install bubblewrap"
    from qwen3f.sandbox.confined import Confined, ConfineError, user  # here, since it imports this module

    try:
        with user() as number, Confined(tier, "code", number, code="def f(x):\n    return x + 1\n") as child:
            child.receive(20.0)
            child.receive(20.0)
            child.send({"name": "f", "arguments": [1], "named": {"d": []}}, 20.0)
            answer = child.receive(20.0)
    except (ConfineError, OSError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())
    return "" if answer == {"value": 2} else f"a trial gave {answer}"
