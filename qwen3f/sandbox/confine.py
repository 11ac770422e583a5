"""A process takes its own rights away for good: limits, Landlock's files, and an allow-list of system calls.

It runs in the sandbox before any judged code, by ctypes; it needs only the standard library, and runs on any Python
from 3.8 on. Afterwards the process may read the Python installation, compute, start threads, and use the pipes that it
was given. It can make no file, start no process, open no socket, and send no signal to another process.

Landlock: the kernel's documentation, userspace-api/landlock. seccomp: userspace-api/seccomp_filter.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Sequence

Line = tuple[int, int, int, int]

# name: number on x86_64, on aarch64 (None: there is no such call)
CALLS = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "fstat": (5, 80),
    "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "openat": (257, 56), "open": (2, None),
    "getdents64": (217, 61), "getdents": (78, None), "readlink": (89, None), "readlinkat": (267, 78),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "mmap": (9, 222), "munmap": (11, 215),
    "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "ioctl": (16, 29), "fcntl": (72, 25), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    "futex": (202, 98), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "time": (201, None), "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155),
    "getsid": (124, 156), "uname": (63, 160), "sysinfo": (99, 179), "times": (100, 153), "getrusage": (98, 165),
    "getrlimit": (97, 163), "prlimit64": (302, 261), "getrandom": (318, 278), "set_tid_address": (218, 96),
    "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293), "arch_prctl": (158, None),
    "exit": (60, 93), "exit_group": (231, 94), "tgkill": (234, 131), "clone": (56, 220), "clone3": (435, 435),
    "membarrier": (324, 283), "setitimer": (38, 103), "getitimer": (36, 102), "alarm": (37, None),
    "pause": (34, None), "restart_syscall": (219, 128), "getcpu": (309, 168), "umask": (95, 166),
}  # fmt: skip
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit number, column of CALLS

O_CREAT_OR_TMPFILE = 0x40 | 0x400000
CLONE_THREAD = 0x10000
FCNTL = (0, 1, 2, 3, 4, 1030)  # copies and flags of descriptors; not who gets a signal, nor a pipe's size
# call: (argument, what must hold of it, a number); any other call is allowed with any argument
CONDITIONS = {
    "openat": (2, "no bit of", O_CREAT_OR_TMPFILE),
    "open": (1, "no bit of", O_CREAT_OR_TMPFILE),
    "clone": (0, "a bit of", CLONE_THREAD),
    "fcntl": (1, "among", FCNTL),
    "prlimit64": (0, "among", (0,)),
}

_LOAD, _EQUAL, _BITS, _ABOVE, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026

# Landlock: rights of files, by the version of the interface that brought them
_READ, _WRITE = 0b1100, 0b10  # read_file and read_dir; write_file
_FILES = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 5: 0xFFFF}


def set_limits(memory: int, cpu: int, processes: int) -> None:
    """Limit bytes of address space, seconds of processor time, and processes and threads of this user (0: no limit)."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_STACK: 16 << 20,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if processes:
        limits[resource.RLIMIT_NPROC] = processes
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def no_new_rights() -> None:
    """From now on no program that this process runs can give it more rights, as a setuid program would."""
    _check(_libc().prctl(38, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def die_in_time(seconds: float, parent: int) -> None:
    """Have this process killed when its parent dies, and after `seconds` in any case.

    A timer kills it with a signal that cannot be blocked, and the calls that could stop the timer are not in CALLS.
    parent: the parent's process id; 0: not known, since it is in another namespace.
    """
    libc = _libc()
    _check(libc.prctl(1, 9, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if parent and os.getppid() != parent:
        os._exit(1)  # it had died already
    create, start = {"x86_64": (222, 223), "aarch64": (107, 110)}.get(platform.machine(), (0, 0))
    if not create:
        raise OSError(f"no list of system calls for {platform.machine()}")
    timer = ctypes.c_int(0)
    event = struct.pack("Qii48x", 0, 9, 0)  # SIGKILL, as a signal
    _check(libc.syscall(create, 1, event, ctypes.byref(timer)), "timer_create")
    value = struct.pack("qqqq", 0, 0, int(seconds), int(seconds % 1 * 1e9))
    _check(libc.syscall(start, timer, 0, value, None), "timer_settime")


def landlock_version() -> int:
    """The version of the kernel's Landlock interface; 0: the kernel has none."""
    return max(0, _libc().syscall(444, None, ctypes.c_size_t(0), 1))


def only_read(directories: Sequence[str], files: Sequence[str] = ()) -> None:
    """Landlock: allow reading `files` and all below `directories`, and writing /dev/null; nothing else on the file
    system. If the kernel can, also deny TCP, abstract sockets and signals to other processes."""
    libc, version = _libc(), landlock_version()
    if not version:
        raise OSError("the kernel has no Landlock")
    handled = _FILES[max(v for v in _FILES if v <= version)]
    attributes = struct.pack("QQQ", handled, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _check(libc.syscall(444, attributes[:size], ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    rights = [(place, _READ | 1) for place in directories]  # 1: execute, which libraries need
    rights += [(place, 0b100) for place in files] + [("/dev/null", 0b100 | _WRITE)]
    for place, allowed in rights:
        try:
            handle = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rule = struct.pack("=Qi", allowed & handled, handle)
        _check(libc.syscall(445, ruleset, 1, rule, 0), "landlock_add_rule")
        os.close(handle)
    _check(libc.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def only_calls() -> None:
    """seccomp: allow the calls of CALLS under CONDITIONS. Any other call gives EPERM; one of another architecture kills
    the process."""
    program = filter_program(platform.machine(), os.getpid())
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    _check(_libc().prctl(22, 2, head, 0, 0), "prctl(PR_SET_SECCOMP)")


def filter_program(machine: str, pid: int) -> list[Line]:
    """The filter as lines (code, jump if true, jump if false, number); see the kernel's linux/filter.h."""
    if machine not in ARCHITECTURES:
        raise OSError(f"no list of system calls for {machine}")
    audit, column = ARCHITECTURES[machine]
    out = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    out += [(_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]  # x32's calls on x86_64
    for name, numbers in CALLS.items():
        if numbers[column] is None:
            continue
        body = _body(name, pid)
        out += [(_EQUAL, 0, len(body), numbers[column]), *body]
    return [*out, (_RETURN, 0, 0, _EPERM)]


def _body(name: str, pid: int) -> list[Line]:
    if name == "clone3":  # its flags lie in memory, where a filter cannot look; libc then takes clone
        return [(_RETURN, 0, 0, _ENOSYS)]
    if name == "tgkill":
        argument, what, number = 0, "among", (pid,)
    elif name in CONDITIONS:
        argument, what, number = CONDITIONS[name]
    else:
        return [(_RETURN, 0, 0, _ALLOW)]
    load, ends = (_LOAD, 0, 0, 16 + 8 * argument), [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
    if what == "no bit of":
        return [load, (_BITS, 1, 0, number), *ends]
    if what == "a bit of":
        return [load, (_BITS, 0, 1, number), *ends]
    tests = [(_EQUAL, len(number) - 1 - i, 0 if i < len(number) - 1 else 1, x) for i, x in enumerate(number)]
    return [load, *tests, *ends]


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result
