"""How ranks start: the decision as a table of environments, and real gloo processes that meet and gather."""

import contextlib
import datetime
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore
from torch.distributed.run import parse_args

from qwen3f.errors import TrainingError, UserError
from qwen3f.processes.ranks import Decision, all_devices, decide, first_host, found, meet, start, torchrun_line
from sharding.mesh import parse_mesh

ROOT = Path(__file__).parents[2]
COMMAND = ["launch.py", "--config", "experiments/pretrain_s1.py:large", "--config.data.mixture=embedded=0.7,x=0.3"]
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu01", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[01-02]",
    "SLURM_JOB_ID": "4000123",
}  # fmt: skip


@pytest.mark.parametrize(
    "environment, world, devices, device, wanted",
    [
        ({}, 1, 0, "cuda", Decision("single", 1, "cuda")),
        ({}, 4, 4, "cuda", Decision("start", 4, "cuda")),
        ({}, 4, 8, "cpu", Decision("start", 4, "cpu")),
        (TORCHRUN, 8, 4, "cuda", Decision("join", 8, "cuda", 5, 1, "env://")),
        ({**TORCHRUN, **SLURM}, 8, 4, "cuda", Decision("join", 8, "cuda", 5, 1, "env://")),  # torchrun under srun
        (SLURM, 8, 4, "cuda", Decision("join", 8, "cuda", 5, 1, "tcp://gpu01:10123")),
        (SLURM, 8, 1, "cuda", Decision("join", 8, "cuda", 5, 0, "tcp://gpu01:10123")),  # --gpus-per-task=1
        ({**SLURM, "MASTER_ADDR": "h", "MASTER_PORT": "7"}, 8, 4, "cpu", Decision("join", 8, "cpu", 5, 1, "tcp://h:7")),
        # a shell that srun gave one task, and a batch script: their ranks are still to be started
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, 2, 4, "cuda", Decision("start", 2, "cuda")),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 2, 4, "cuda", Decision("start", 2, "cuda")),
    ],
)
def test_decisions(environment, world, devices, device, wanted):
    got = decide(environment, world, devices, device, COMMAND)
    assert got == wanted
    assert got.backend == {"cpu": "gloo", "cuda": "nccl"}[device]


@pytest.mark.parametrize(
    "environment, world, devices, words",
    [
        (
            {},
            16,
            8,
            "run this on each of 2 such hosts, with the name of one of them as HOST: torchrun --nnodes=2",
        ),
        ({}, 2, 0, "needs 2 devices, this host has 0"),
        (TORCHRUN, 16, 8, "torchrun started 8 ranks, but config.mesh has 16 devices; make --nnodes times"),
        (TORCHRUN, 1, 8, "write a --config.mesh of 8 devices"),
        (SLURM, 4, 8, "srun started 8 ranks, but config.mesh has 4 devices; make --ntasks 4"),
        ({**TORCHRUN, "MASTER_PORT": ""}, 8, 8, "torchrun left MASTER_PORT unset"),
        ({**TORCHRUN, "RANK": "five"}, 8, 8, "RANK='five' is not a number"),
        ({**TORCHRUN, "MASTER_PORT": "abc"}, 8, 8, "MASTER_PORT='abc' is not a number"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, 8, 8, "MASTER_PORT=65536 is not a port"),
        ({**SLURM, "MASTER_PORT": "abc"}, 8, 8, "MASTER_PORT='abc' is not a number"),
        ({**TORCHRUN, "RANK": "8"}, 8, 8, "there is no rank 8 of 8: the ranks are 0 to 7"),
        ({**SLURM, "SLURM_PROCID": "8"}, 8, 8, "there is no rank 8 of 8"),
        ({**SLURM, "SLURM_STEP_NODELIST": "a[1-"}, 8, 8, "SLURM_STEP_NODELIST='a[1-' names no host"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, 8, 4, "at most 4 ranks per host"),
        (TORCHRUN, 8, 0, "no cuda device"),
    ],
)
def test_what_does_not_fit_together_is_an_error(environment, world, devices, words):
    with pytest.raises(UserError) as caught:
        decide(environment, world, devices, "cuda", COMMAND)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("world, devices, nodes, each", [(64, 8, 8, 8), (12, 8, 2, 6), (7, 4, 7, 1), (2, 0, 2, 1)])
def test_the_line_for_several_hosts_starts_exactly_the_mesh(world, devices, nodes, each):
    """torchrun's own parser reads it: so many nodes and ranks, and this program with its arguments."""
    program, *arguments = shlex.split(torchrun_line(world, devices, COMMAND))
    got = parse_args(arguments)
    assert program == "torchrun"
    assert (got.nnodes, got.nproc_per_node) == (str(nodes), str(each))
    assert [got.training_script, *got.training_script_args] == COMMAND


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("gpu1", "gpu1"),
        ("a[01-03,07],b", "a01"),
        ("a[7]", "a7"),
        ("a,b[1-2]", "a"),
        ("r[1-4]-ib", "r1-ib"),
        ("r[1-2]n[3-4],x", "r1n3"),
    ],
)
def test_first_host_of_slurms_list(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    "environment, devices",
    [
        ({"WORLD_SIZE": "6"}, 6),
        ({"WORLD_SIZE": "1"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({}, os.cpu_count()),
        ({"SLURM_STEP_NUM_TASKS": "1"}, os.cpu_count()),
    ],
)
def test_what_an_open_axis_fills(environment, devices):
    assert all_devices(environment, "cpu") == devices


MEET = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from qwen3f.processes import ranks
from sharding.mesh import parse_mesh
shape = parse_mesh("{mesh}")
decision = ranks.decide(os.environ, shape.size, ranks.local_devices("cpu"), "cpu", sys.argv)
def main():  # a World that outlives the interpreter's end has threads that abort it
    with ranks.joined(decision, shape, timeout=30.0) as world:
        print(world.rank, world.local_rank, world.gather(world.rank * 10), flush=True)
        open(f"{out}/{{world.rank}}", "w").write(f"{{world.axes.shape}}")
main()
"""
# Without torch: a launcher learns from exit codes alone how its ranks ended.
RANK = """
import os, signal, sys, time
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
def say(*words):
    os.write(1, (" ".join(words) + chr(10)).encode())  # in one piece: the other rank writes to the same pipe
def stop(number, frame):
    say("stopped", rank)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
{body}
say("rank", rank, str(os.getpid()))
time.sleep(60)
"""
START = """
import sys
sys.path.insert(0, {root!r})
from qwen3f.processes.ranks import decide, start
sys.exit(start(decide({{}}, 2, 2, "cpu", []), [{script!r}]))
"""


def _script(tmp_path, body):
    (path := tmp_path / "rank.py").write_text(RANK.format(body=body))
    return str(path)


def _start(tmp_path, body, restarts=0):
    return start(decide({}, 2, 2, "cpu", []), [_script(tmp_path, body)], restarts=restarts)


@contextlib.contextmanager
def _started(tmp_path, body=""):
    """A process that starts two ranks, and {rank: process number}, once both run."""
    code = START.format(root=str(ROOT), script=_script(tmp_path, body))
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        pids = {rank: int(pid) for _, rank, pid in (launcher.stdout.readline().split() for _ in range(2))}
        yield launcher, pids
    finally:
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()


def _met(server, rank, world, seconds=20.0):
    """What `meet` gives rank `rank`, which has its own connection to the store that the agent serves."""
    store = TCPStore("127.0.0.1", server.port, is_master=False)
    return meet(store, rank, world, timeout=datetime.timedelta(seconds=seconds))


@pytest.fixture
def server():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize("late", [0, 2])
def test_ranks_that_start_again_share_a_part_of_the_store_that_is_new(server, late):
    """Also after an attempt in which rank 1 came and no other rank did."""
    with ThreadPoolExecutor(3) as threads:

        def attempt():
            ranks = sorted(range(3), key=lambda rank: rank == late)
            coming = []
            for rank in ranks:
                time.sleep(0.3 if rank == late else 0.0)
                coming.append(threads.submit(_met, server, rank, 3))
            return [part.result() for part in coming]

        for count in range(3):
            parts = attempt()
            assert not any(part.check(["address"]) for part in parts)
            parts[0].set("address", str(count))
            assert [part.get("address") for part in parts] == [str(count).encode()] * 3
            with pytest.raises(TrainingError, match="rank 0 of 3 did not join within 0.2 s"):
                _met(server, 1, 3, seconds=0.2)


def test_ranks_that_do_not_come_are_named(server):
    with pytest.raises(TrainingError, match="of 3 ranks these did not join within 0.2 s: 1, 2"):
        _met(server, 0, 3, seconds=0.2)


@pytest.mark.parametrize("rank, words", [(0, "1/2 clients joined"), (1, "127.0.0.1")])
def test_a_meeting_to_which_no_other_rank_comes(rank, words):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    decision = Decision("join", 2, "cpu", rank, 0, f"tcp://127.0.0.1:{port}")
    with pytest.raises(TrainingError, match=f"rank {rank} of 2 could not meet the others .*{words}") as caught:
        found(decision, timeout=datetime.timedelta(seconds=0.5))
    assert "\n" not in str(caught.value)


def test_two_ranks_start_meet_and_add_up(tmp_path, capfd):
    (path := tmp_path / "rank.py").write_text(MEET.format(root=str(ROOT), out=tmp_path, mesh="tp2"))
    assert start(decide({}, 2, 2, "cpu", []), [str(path)]) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [str(parse_mesh("tp2"))] * 2
    assert capfd.readouterr().out == "0 0 [0, 10]\n"  # only rank 0 prints


@pytest.mark.parametrize("mesh, ranks", [("dp2", 2), pytest.param("dp2,tp2", 4, marks=pytest.mark.nightly)])
def test_torchruns_agents_on_two_nodes_start_ranks_that_join(mesh, ranks, tmp_path):
    """Two agents on this host stand for two nodes, with as many ranks each."""
    (path := tmp_path / "rank.py").write_text(MEET.format(root=str(ROOT), out=tmp_path, mesh=mesh))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = torchrun_line(ranks, ranks // 2, [str(path)]).replace("HOST:29500", f"127.0.0.1:{port}")
    command = [sys.executable, "-m", "torch.distributed.run", *line.split()[1:]]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        out = "".join(agent.communicate(timeout=120)[0] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0]
    assert out == f"0 0 {[10 * rank for rank in range(ranks)]}\n"
    assert [(tmp_path / str(rank)).read_text() for rank in range(ranks)] == [str(parse_mesh(mesh))] * ranks


def test_a_lost_rank_ends_the_others_and_is_named(tmp_path):
    begin = time.monotonic()
    with pytest.raises(TrainingError, match="rank 1 of 2 ended with signal 9; the others were ended"):
        _start(tmp_path, "if rank == '1': os.kill(os.getpid(), signal.SIGKILL)")
    assert time.monotonic() - begin < 20  # the other one would sleep for 60 s


def test_all_ranks_start_again_after_one_is_lost_as_often_as_allowed(tmp_path, capfd):
    dies = "if rank == '0' and attempt != '{}': os.kill(os.getpid(), signal.SIGKILL)"
    goes_on = "say('on', rank), sys.exit(0)"
    assert _start(tmp_path, f"{dies.format(1)}\n{goes_on}", restarts=1) == 0
    said = capfd.readouterr()
    assert said.err == "rank 0 of 2 ended with signal 9; the others were ended; starting all again (1 of 1)\n"
    assert sorted(said.out.splitlines()) == ["on 0", "on 1", "on 1"]
    with pytest.raises(TrainingError, match="rank 0 of 2 ended with signal 9"):
        _start(tmp_path, f"{dies.format(2)}\n{goes_on}", restarts=1)


def test_wrong_input_of_a_rank_is_the_exit_code(tmp_path, capfd):
    """The rank itself says what is wrong, in one line. It is not started again: the input would be as wrong."""
    end = "if rank == '1': print('error: wrong', file=sys.stderr, flush=True), sys.exit(2)"
    assert _start(tmp_path, end, restarts=3) == 2
    assert capfd.readouterr().err == "error: wrong\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_every_rank_once(tmp_path, number):
    with _started(tmp_path, f"signal.signal({int(number)}, stop)") as (launcher, _):
        launcher.send_signal(number)
        assert launcher.wait(timeout=20) == 0
        assert sorted(launcher.stdout.read().split()) == ["0", "1", "stopped", "stopped"]


def test_a_rank_that_a_signal_ends_is_the_exit_code(tmp_path):
    with _started(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_DFL)") as (launcher, _):
        launcher.terminate()
        assert launcher.wait(timeout=20) == 128 + signal.SIGTERM


def test_ranks_do_not_outlive_what_started_them(tmp_path):
    body = (
        f"sys.path.insert(0, {str(ROOT)!r})\nfrom qwen3f.processes.launcher import end_with_parent\nend_with_parent()"
    )
    with _started(tmp_path, body) as (launcher, _):
        launcher.kill()
        assert sorted(launcher.stdout.read().split()) == ["0", "1", "stopped", "stopped"]
