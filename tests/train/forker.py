"""A process that imports everything once and forks a victim for each call: many kills need only one import."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Forker:
    """A context manager. `start` begins a victim, one at a time; `wait` tells how it ended.

    preload: a library to load at its start (LD_PRELOAD). directory: where the victims' output goes.
    """

    def __init__(self, directory, preload=None):
        self._log, self._victim = directory / "victim.log", None
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if preload:
            environment["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.forker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def __enter__(self):
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error):
        if self._victim:  # a test has failed before it could wait
            os.kill(self._victim, signal.SIGKILL)
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def start(self, function, *args):
        """Call a function of victims.py in a new process, whose number it returns."""
        self._process.stdin.write(json.dumps([function, args, str(self._log)]) + "\n")
        self._process.stdin.flush()
        self._victim = int(self._process.stdout.readline())
        return self._victim

    def wait(self):
        """(exit code, or minus the signal that ended it; what it printed)."""
        code, self._victim = int(self._process.stdout.readline()), None
        return code, self._log.read_text()

    def call(self, function, *args):
        self.start(function, *args)
        return self.wait()


def serve():
    import traceback

    from tests.train import victims

    victims.warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        function, args, log = json.loads(line)
        pid = os.fork()
        if pid == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = 1
            try:
                getattr(victims, function)(*args)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
