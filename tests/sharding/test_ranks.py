"""Ranks: the decision as a table of environments, and two real gloo processes that add up."""

import shlex
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import parse_args

from qwen3f.errors import TrainingError, UserError
from sharding import ranks
from sharding.ranks import Decision, decide, first_host, start, torchrun_line

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
            "run this on each of 2 such hosts, with one of them for HOST: torchrun --nnodes=2 --nproc-per-node",
        ),
        ({}, 2, 0, "needs 2 devices, this host has 0"),
        (TORCHRUN, 16, 8, "torchrun started 8 ranks, the mesh has 16 devices; make --nnodes times --nproc-per-node 16"),
        (TORCHRUN, 1, 8, "mesh of 8 with --config.mesh"),
        (SLURM, 4, 8, "srun started 8 ranks, the mesh has 4 devices; make --ntasks 4"),
        ({**TORCHRUN, "MASTER_PORT": ""}, 8, 8, "torchrun left MASTER_PORT unset"),
        ({**TORCHRUN, "RANK": "five"}, 8, 8, "RANK='five' is not a rank"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, 8, 4, "at most 4 ranks a host"),
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
    [("gpu1", "gpu1"), ("a[01-03,07],b", "a01"), ("a[7]", "a7"), ("a,b[1-2]", "a"), ("r[1-4]-ib", "r1-ib")],
)
def test_first_host_of_slurms_list(nodelist, host):
    assert first_host(nodelist) == host


MEET = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from sharding import ranks
decision = ranks.decide(os.environ, 2, ranks.local_devices("cpu"), "cpu", sys.argv)
with ranks.joined(decision, timeout=30.0) as device:
    x = torch.tensor([decision.rank + 1.0], device=device)
    dist.all_reduce(x)
    open(f"{out}/{{decision.rank}}", "w").write(f"{{x.item()}} of {{dist.get_world_size()}}")
"""
LOSE = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    {end}
time.sleep(3600)
"""


def _start(tmp_path, script):
    (path := tmp_path / "rank.py").write_text(script)
    return start(decide({}, 2, ranks.local_devices("cpu"), "cpu", []), [str(path)])


def test_two_ranks_start_meet_and_add_up(tmp_path):
    assert _start(tmp_path, MEET.format(root=str(ROOT), out=tmp_path)) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["3.0 of 2"] * 2


def test_a_lost_rank_ends_the_others_and_is_named(tmp_path):
    with pytest.raises(TrainingError, match="rank 1 of 2 ended with signal 9; the others were ended"):
        _start(tmp_path, LOSE.format(end="os.kill(os.getpid(), signal.SIGKILL)"))


def test_wrong_input_of_a_rank_is_the_exit_code(tmp_path, capfd):
    """The rank itself says what is wrong, in one line."""
    end = "print('error: wrong', file=sys.stderr, flush=True), sys.exit(2)"
    assert _start(tmp_path, LOSE.format(end=end)) == 2
    assert capfd.readouterr().err == "error: wrong\n"


def test_a_signal_to_the_launcher_is_its_exit_code(monkeypatch):
    def launched(*command):
        raise SignalException("stop", signal.SIGTERM)

    monkeypatch.setattr(ranks, "elastic_launch", lambda config, entrypoint: launched)
    assert start(Decision("start", 2, "cpu"), ["x.py"]) == 143
