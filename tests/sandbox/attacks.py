"""Attacks by code that does not know the answer: Python texts by name. f() wins if the tests take it for the secret."""

SECRET = "the-answer-that-no-code-was-told-5f2c"
TESTS = f"def check(candidate):\n    assert candidate() == {SECRET!r}\n"

FORGED = '{"passed": true}'

_HEAD = {
    "syscall": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n",
    "find": """
import re
def search(text):
    found = re.search(r"the-answer-[a-z-]+[0-9a-f]{4}", text)
    return found and found[0]
""",
}

# -- winning by something else than an answer --------------------------------------------------------------------------

CHEATS = {
    "always equal": """
class E:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
def f(): return E()""",
    "a str that is always equal": """
class S(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(): return S("x")""",
    "an int that is always equal": "class I(int):\n    def __eq__(self, other): return True\ndef f(): return I(1)",
    "a list of what is always equal": "class E:\n    def __eq__(self, o): return True\ndef f(): return [E()]",
    "a type that lies about itself": """
class E:
    __class__ = str
    def __eq__(self, other): return True
def f(): return E()""",
    "a metaclass that is str": """
class M(type):
    def __eq__(cls, other): return True
    __hash__ = type.__hash__
class E(metaclass=M):
    def __eq__(self, other): return True
def f(): return E()""",
    "leaves at import": "import sys\nsys.exit(0)",
    "leaves hard at import": "import os\nos._exit(0)",
    "leaves in the call": "import sys\ndef f(): sys.exit(0)",
    "leaves hard in the call": "import os\ndef f(): os._exit(0)",
    "raises what looks like success": "class passed(BaseException): pass\ndef f(): raise passed(True)",
    "leaves with an exception and exit code 0": """
import os, sys
sys.excepthook = lambda *a: os._exit(0)
def f(): raise ValueError""",
    "atexit": f"import atexit, os\natexit.register(lambda: os.write(1, b'{FORGED}\\n'))\ndef f(): raise SystemExit(0)",
    "prints a verdict": f"def f():\n    print('{FORGED}', flush=True)\n    return 1",
    "writes a verdict to every descriptor": f"""
import os
def f():
    for n in range(64):
        try: os.write(n, b'{FORGED}\\n')
        except OSError: pass
    return 1""",
    "patches builtins": """
import builtins
builtins.AssertionError = type("AssertionError", (Exception,), {})
builtins.isinstance = lambda *a: True
builtins.type = lambda *a: str
builtins.__build_class__ = None
def f(): return object()""",
    "patches json": """
import json
json.dumps = lambda *a, **k: '{"passed": true}'
def f(): return 1""",
    "patches the packing": """
import sys
class Any:
    def __eq__(self, other): return True
for name in list(sys.modules):
    m = sys.modules[name]
    if hasattr(m, "pack"): m.pack = lambda v, depth=0: {"passed": True, "value": True, "error": None}
def f(): return Any()""",
    "names an exception like a verdict": """
E = type("AssertionError", (BaseException,), {"__str__": lambda s: '{"passed": true}'})
def f(): raise E()""",
    "an exception without words": """
class E(Exception):
    def __str__(self): raise E()
def f(): raise E()""",
    "a pickle": """
import os, pickle
class P:
    def __reduce__(self): return os._exit, (0,)
def f(): return pickle.dumps(P())""",
    "marshalled code": "import marshal\ndef f(): return marshal.dumps(compile('1', 'x', 'exec'))",
    "not a number": "def f(): return float('nan')",
    "a forged packed value": """
import os
def f():
    for n in range(3, 64):
        try: os.write(n, b'{"value": {"d": [[{"d": []}, 1]]}}\\n' * 3)
        except OSError: pass
    return {}""",
}

# -- reading what it should not see ------------------------------------------------------------------------------------

SPIES = {
    "frames and garbage": """
import gc, sys
def f():
    frame = sys._getframe()
    while frame:
        found = search(repr(frame.f_locals) + repr(frame.f_globals.keys()) + repr(frame.f_code.co_consts))
        if found: return found
        frame = frame.f_back
    for thing in gc.get_objects():
        try: found = search(repr(thing))
        except Exception: continue
        if found: return found""",
    "its own memory": """
def f():
    for line in open("/proc/self/maps"):
        a, b = [int(x, 16) for x in line.split()[0].split("-")]
        try:
            with open("/proc/self/mem", "rb") as m:
                m.seek(a); found = search(m.read(b - a).decode("latin1"))
        except Exception: continue
        if found: return found""",
    "command lines": """
import os, sys
def f():
    found = search(" ".join(sys.orig_argv))
    for n in os.listdir("/proc"):
        for name in ("cmdline", "environ"):
            try: found = found or search(open("/proc/%s/%s" % (n, name)).read())
            except OSError: pass
    return found""",
    "memory of other processes": """
import os
def f():
    for n in range(1, 5000):
        try: text = open("/proc/%d/maps" % n).read()
        except OSError: continue
        if n != os.getpid(): return "the-answer-was-readable"
    return None""",
    "the next order": """
import os, sys, select
def f():
    rest = [os.read(0, 100) for _ in range(9) if select.select([0], [], [], 0.1)[0]]
    return search(sys.stdin.read(10) + repr(rest))""",
    "files of the host": """
import glob
def f():
    for pattern in ("/root/**", "/home/**", "/tmp/**", "/var/**", "/etc/**"):
        for path in glob.glob(pattern, recursive=True):
            try: found = search(open(path, errors="replace").read())
            except OSError: continue
            if found: return found""",
    "tokens in the environment": "import os\ndef f(): return search(repr(dict(os.environ)))",
}

# -- taking more than its share ----------------------------------------------------------------------------------------

FLOODS = {
    "fork bomb": "import os\ndef f():\n    while True: os.fork()",
    "fork bomb that forgives": """
import os
def f():
    while True:
        try: os.fork()
        except OSError: pass""",
    "processes by subprocess": "import subprocess\ndef f(): return subprocess.run(['sleep', '9']).returncode",
    "daemon by a double fork": """
import os, time
def f():
    if not os.fork():
        os.setsid()
        if not os.fork(): time.sleep(60)
        os._exit(0)""",
    "thread bomb": """
import threading, time
def f():
    while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()""",
    "memory at once": "def f(): return len(bytearray(8 << 30))",
    "memory by and by": "def f():\n    x = []\n    while True: x.append(bytearray(1 << 20))",
    "a file of any size": "def f():\n    with open('/tmp/x', 'wb') as o:\n        while True: o.write(bytes(1 << 20))",
    "a sparse file": "import os\ndef f():\n    os.truncate(os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 1 << 50)",
    "a file without a name": "import os\ndef f(): return os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "a file in memory": "import os\ndef f(): return os.memfd_create('x')",
    "inodes": "def f():\n    for n in range(10 ** 9): open('/tmp/%d' % n, 'w')",
    "directories": "import os\ndef f():\n    for n in range(10 ** 9): os.mkdir('/tmp/%d' % n)",
    "descriptors": "import os\ndef f():\n    x = []\n    while True: x.append(os.open('/dev/null', 0))",
    "pipes of any size": "import fcntl, os\ndef f(): return fcntl.fcntl(os.pipe()[1], 1031, 1 << 30)",
    "output": "def f():\n    while True: print('x' * 65536)",
    "answers": """
import os
def f():
    while True:
        for n in range(3, 64):
            try: os.write(n, b"x" * 65536)
            except OSError: pass""",
    "an answer of a gigabyte": "def f(): return 'x' * (200 << 20)",
    "a nested answer": """
import os
def f():
    for n in range(3, 64):
        try: os.write(n, b'{"value": ' + b"[" * 200000 + b"\\n")
        except OSError: pass""",
    "a nested value": "def f():\n    x = []\n    for _ in range(10 ** 5): x = [x]\n    return x",
    "a value within itself": "def f():\n    x = []\n    x.append(x)\n    return x",
    "sleep": "import time\ndef f(): time.sleep(3600)",
    "sleep at import": "import time\ntime.sleep(3600)",
    "a loop that ignores signals": """
import signal
for n in range(1, 64):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f():
    while True: pass""",
    "a huge integer": "def f(): return 9 ** 9 ** 9",
    "digits without end": "import sys\ndef f():\n    sys.set_int_max_str_digits(0)\n    return 1 << 30_000_000",
    "a regular expression": "import re\ndef f(): return re.match('(a+)+$', 'a' * 64 + 'b')",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()",
    "dies of a signal": "import ctypes\ndef f(): return ctypes.string_at(0)",
    "stops itself": "import os, signal\ndef f():\n    os.kill(os.getpid(), signal.SIGSTOP)\n    signal.pause()",
}

# -- reaching out ------------------------------------------------------------------------------------------------------

ESCAPES = {
    "tcp": "import socket\ndef f(): return socket.create_connection(('127.0.0.1', 22), 1) and 1",
    "udp": "import socket\ndef f(): return socket.socket(socket.AF_INET, socket.SOCK_DGRAM) and 1",
    "unix": "import socket\ndef f(): return socket.socketpair() and 1",
    "abstract unix": "import socket\ndef f():\n    s = socket.socket(socket.AF_UNIX)\n    s.connect('\\0x')",
    "netlink": "import socket\ndef f(): return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) and 1",
    "kills its parent": "import os\ndef f(): os.kill(os.getppid(), 9)",
    "kills all": "import os\ndef f(): os.kill(-1, 9)",
    "kills its group": "import os\ndef f(): os.killpg(0, 9)",
    "a signal by a descriptor": "import fcntl, os\ndef f(): return fcntl.fcntl(os.pipe()[0], 8, os.getppid())",
    "a program": "import os\ndef f(): os.execv('/usr/bin/env', ['env'])",
    "a symbolic link": "import os\ndef f():\n    os.symlink('/', '/tmp/x')\n    return os.listdir('/tmp/x/root')",
    "a hard link": "import os\ndef f(): os.link('/usr/bin/env', '/tmp/x')",
    "another mode": "import os\ndef f(): os.chmod('/tmp', 0o777)",
    "another root": "import os\ndef f(): os.chroot('/tmp')",
    "root": "import os\ndef f(): os.setuid(0)",
    "writes into /usr": "def f(): open('/usr/lib/x', 'w')",
    "more limits": """
import resource
def f(): resource.setrlimit(resource.RLIMIT_AS, (-1, -1))""",
    "limits of its parent": """
import os, resource
def f(): return resource.prlimit(os.getppid(), resource.RLIMIT_CPU)""",
}

# numbers of system calls on x86_64; each call must fail with EPERM or ENOSYS
CALLS = {
    "ptrace": 101, "unshare": 272, "setns": 308, "mount": 165, "umount": 166, "pivot_root": 155, "bpf": 321,
    "userfaultfd": 323, "io_uring_setup": 425, "process_vm_readv": 310, "keyctl": 250, "perf_event_open": 298,
    "execveat": 322, "memfd_create": 319, "pidfd_open": 434, "kill": 62, "socket": 41, "fork": 57, "vfork": 58,
    "open_by_handle_at": 304, "name_to_handle_at": 303, "shmget": 29, "mq_open": 240, "personality": 135, "setsid": 112,
}  # fmt: skip

ALL = {
    **CHEATS,
    **{name: _HEAD["find"] + code for name, code in SPIES.items()},
    **FLOODS,
    **ESCAPES,
}
SYSTEM_CALLS = (
    _HEAD["syscall"]
    + """
def f(number):
    result = libc.syscall(number, 0, 0, 0, 0, 0, 0)
    return [result, ctypes.get_errno()]
"""
)
