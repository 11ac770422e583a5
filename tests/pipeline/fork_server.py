"""Runs real stages without starting Python and importing torch for each: forks of one process run launch.py.

The pipeline starts fork_client.py in place of launch.py. The client asks this server for a fork, passes signals on to
it, and ends as the fork ends.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


class ForkServer:
    """A context manager. environment: variables by which fork_client.py finds this server."""

    def __init__(self, directory):
        self.environment = {"FORK_SERVER": str(directory / "fork.socket")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.fork_server", self.environment["FORK_SERVER"]],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def serve(path):
    import torch
    import torch._dynamo
    import torch.utils.tensorboard

    import qwen3f.eval.run
    import qwen3f.infer.run
    import qwen3f.report.write
    import qwen3f.train.launch  # noqa: F401
    from qwen3f import stages
    from qwen3f.checkpoint import orbax
    from qwen3f.train.metrics import peak_flops
    from qwen3f.train.stage import find_stage

    orbax.import_jax_and_orbax()
    peak_flops(torch.device("cpu"))
    for name in stages.names():
        find_stage(name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                attend(client)
            client.close()
            while os.waitpid(-1, os.WNOHANG) != (0, 0):  # reap ended children; the new one still runs
                pass


def attend(client):
    """Runs in its own process: forks the stage, sends its process id, then its exit code."""
    message, files, _, _ = socket.recv_fds(client, 1 << 20, 2)
    arguments = json.loads(message)
    pid = os.fork()
    if pid == 0:
        for number, file in enumerate(files, 1):
            os.dup2(file, number)
        stage(arguments)
    client.sendall(f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    client.sendall(f"{code}\n".encode())
    os._exit(0)


def stage(arguments):
    code = 1
    try:
        sys.argv = [str(ROOT / "launch.py"), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
