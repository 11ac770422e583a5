"""How a process gets its rank: it runs alone, starts ranks on this host, or joins those of torchrun or Slurm.

`decide` is pure: from the environment, the mesh's size and this host's devices it makes a Decision. `start` runs the
command once per local rank; these processes find torchrun's variables and so join. `joined` makes the process group.
"""

import contextlib
import dataclasses
import datetime
import os
import re
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from qwen3f.errors import TrainingError, UserError
from qwen3f.processes.launcher import end_with_parent, run_ranks
from qwen3f.processes.world import World, open_world
from sharding.mesh import MeshShape

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
CPU_RANKS = 8  # a host with fewer cores may run this many ranks too, slowly, so that a mesh can be tried
_POLL = 0.05  # seconds
_LINGER = 5.0  # seconds; more than launcher._GRACE, after which the launcher kills the other ranks
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What this process has to do.

    mode: "single", run without process groups; "start", start `world` ranks on this host; "join", be rank `rank` of
    `world` with device `local_rank` of this host. device: cpu or cuda. init: where ranks meet, as
    torch.distributed.init_process_group takes it; empty unless mode is "join".
    """

    mode: str
    world: int
    device: str
    rank: int = 0
    local_rank: int = 0
    init: str = ""

    @property
    def backend(self) -> str:
        return BACKENDS[self.device]


def decide(
    environment: Mapping[str, str], world: int, local_devices: int, device: str, command: Sequence[str]
) -> Decision:
    """The Decision for a mesh of `world` devices on a host with `local_devices` of kind `device` (cpu or cuda).

    command: this process's arguments, for the hint what to run instead. Raises UserError if a launcher started a number
    of ranks other than the mesh's, or set its variables incompletely; and if the mesh needs more devices than this host
    has. The last message contains the torchrun command for several hosts.
    """
    if "TORCHELASTIC_RUN_ID" in environment or "WORLD_SIZE" in environment:
        return _torchrun(environment, world, local_devices, device)
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _slurm(environment, world, local_devices, device)
    if world == 1:
        return Decision("single", 1, device)
    if world > local_devices:
        raise UserError(
            f"config.mesh needs {world} devices, this host has {local_devices} ({device}); {_how(world, local_devices)}"
            f": {torchrun_line(world, local_devices, command)}"
        )
    return Decision("start", world, device)


def _how(world: int, local_devices: int) -> str:
    nodes = world // _a_host(world, local_devices)
    return f"run this on each of {nodes} such hosts, with the name of one of them as HOST" if nodes > 1 else "run"


def _a_host(world: int, local_devices: int) -> int:
    """Ranks per host: the largest number that divides the mesh's size, so that all hosts run the same command."""
    return max(n for n in range(1, max(1, local_devices) + 1) if world % n == 0)


def torchrun_line(world: int, local_devices: int, command: Sequence[str]) -> str:
    """The command for each host; command: this program and its arguments, without the interpreter."""
    ranks = _a_host(world, local_devices)
    return (
        f"torchrun --nnodes={world // ranks} --nproc-per-node={ranks} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
        f"--rdzv-id=qwen3f {shlex.join(command)}"
    )


def _torchrun(environment: Mapping[str, str], world: int, local_devices: int, device: str) -> Decision:
    values = _numbers("torchrun", environment, _TORCHRUN, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    _check_world("torchrun", values["WORLD_SIZE"], world, "--nnodes times --nproc-per-node")
    # torchrun's agent serves the store; env:// knows from a variable that it has to connect to it
    return _join(world, device, local_devices, values["RANK"], values["LOCAL_RANK"], "env://")


def _slurm(environment: Mapping[str, str], world: int, local_devices: int, device: str) -> Decision:
    whole = [name for name in _SLURM if name != "SLURM_STEP_NODELIST"]
    values = _numbers("srun", environment, _SLURM, whole)
    _check_world("srun", values["SLURM_STEP_NUM_TASKS"], world, "--ntasks")
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    # Slurm gives no port. The job's number gives the same port on all hosts, and rarely the same for two jobs.
    port = 10_000 + values["SLURM_JOB_ID"] % 50_000
    if environment.get("MASTER_PORT"):
        port = _numbers("srun", environment, (), ("MASTER_PORT",))["MASTER_PORT"]
    init = f"tcp://{host}:{port}"
    return _join(world, device, local_devices, values["SLURM_PROCID"], values["SLURM_LOCALID"], init)


def _join(world: int, device: str, local_devices: int, rank: int, local_rank: int, init: str) -> Decision:
    if rank >= world:
        raise UserError(f"there is no rank {rank} of {world}: the ranks are 0 to {world - 1}; start them again")
    if local_devices < 1:
        raise UserError(f"rank {rank}: this host has no {device} device; write --config.device=cpu")
    if device == "cuda" and local_devices == 1:
        local_rank = 0  # with srun's --gpus-per-task every rank sees only one device
    if local_rank >= local_devices:
        raise UserError(
            f"rank {rank} is number {local_rank} of its host, which has {local_devices} devices ({device}); start at "
            f"most {local_devices} ranks per host"
        )
    return Decision("join", world, device, rank, local_rank, init)


def _check_world(launcher: str, started: int, world: int, option: str) -> None:
    if started != world:
        raise UserError(
            f"{launcher} started {started} ranks, but config.mesh has {world} devices; make {option} {world}, or write "
            f"a --config.mesh of {started} devices"
        )


def _numbers(
    launcher: str, environment: Mapping[str, str], needed: Sequence[str], whole: Sequence[str]
) -> dict[str, int]:
    """A launcher's variables as numbers: those of `whole`. UserError if one of `needed` is unset, or no number."""
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(f"{launcher} left {', '.join(missing)} unset; start the ranks with {launcher} again")
    for name in whole:
        if not environment[name].isdecimal():
            raise UserError(f"{name}={environment[name]!r} is not a number; start the ranks with {launcher}")
    values = {name: int(environment[name]) for name in whole}
    if values.get("MASTER_PORT", 1) not in range(1, 2**16):
        raise UserError(f"MASTER_PORT={values['MASTER_PORT']} is not a port; set a number from 1 to {2**16 - 1}")
    return values


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: `gpu[01-03,07],login` -> gpu01, `rack[1-2]n[3-4]` -> rack1n3."""
    match = re.match(r"([^,\[\]]|\[\w[^\]]*\])+(?=,|$)", nodelist)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodelist!r} names no host; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def local_devices(device: str) -> int:
    """How many ranks this host can run with devices of a kind (cpu or cuda)."""
    return torch.cuda.device_count() if device == "cuda" else max(CPU_RANKS, os.cpu_count() or 1)


def all_devices(environment: Mapping[str, str], device: str) -> int:
    """The number of devices that an axis of size -1 fills: the ranks that a launcher started, else this host's devices
    or cores."""
    started = environment.get("WORLD_SIZE") or environment.get("SLURM_STEP_NUM_TASKS", "1")
    if started.isdecimal() and ("WORLD_SIZE" in environment or started != "1"):
        return int(started)
    return torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1


def start(decision: Decision, command: Sequence[str], *, restarts: int = 0) -> int:
    """Run `python command…` once per rank on this host, and wait; result and errors as launcher.run_ranks."""
    if decision.mode != "start":
        raise ValueError(f"start takes a decision to start ranks, got {decision}")
    environment = dict(os.environ)
    if decision.device == "cpu" and "OMP_NUM_THREADS" not in environment:
        # ranks on a CPU share its cores, so each gets an equal part, unless the user set the variable
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // decision.world))
    return run_ranks(command, decision.world, environment, restarts)


def meet(store: dist.Store, rank: int, world: int, *, timeout: datetime.timedelta) -> dist.Store:
    """Wait for all ranks; returns a part of the store (a prefix) that only the ranks of this attempt use.

    When torchrun restarts ranks, they get the store of the previous attempt, which still has the addresses of dead
    ranks. TORCHELASTIC_RESTART_COUNT can't serve as prefix: an agent counts only failures of its own host. So rank 0
    draws a random prefix. Every other rank writes a random key of its own under here/RANK, and waits for rank 0 to
    answer under that key. Then it confirms under taken/PREFIX/RANK. A rank of the previous attempt can't confirm,
    because it is dead. Raises TrainingError if this takes longer than `timeout`.
    """
    store.set_timeout(timeout)
    drawn = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", drawn)
        try:
            name = store.get(f"name/{drawn}").decode()
        except dist.DistStoreError as error:
            raise TrainingError(f"rank 0 of {world} did not join within {timeout.total_seconds():g} s") from error
        store.set(f"taken/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    missing = list(range(1, world))
    until = time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > until:
            who = ", ".join(map(str, missing))
            raise TrainingError(f"of {world} ranks these did not join within {timeout.total_seconds():g} s: {who}")
        for other in missing:
            if store.check([f"here/{other}"]):
                store.set(f"name/{store.get(f'here/{other}').decode()}", drawn)
        time.sleep(_POLL)
        missing = [other for other in missing if not store.check([f"taken/{drawn}/{other}"])]
    return dist.PrefixStore(drawn, store)


def found(decision: Decision, *, timeout: datetime.timedelta) -> dist.Store:
    """Connect to the store of a decision to join, and `meet` there.

    Raises TrainingError if a rank, or the host of the store, does not answer in time, or ends meanwhile.
    """
    try:
        store, rank, world = next(dist.rendezvous(decision.init, decision.rank, decision.world, timeout=timeout))
        return meet(store, rank, world, timeout=timeout)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise TrainingError(
            f"rank {decision.rank} of {decision.world} could not meet the others ({str(error).splitlines()[0]}); check "
            "that all ranks have started, and that they can reach the host and port of rank 0"
        ) from error


@contextlib.contextmanager
def joined(decision: Decision, shape: MeshShape, *, timeout: float) -> Iterator[World]:
    """A context that joins the process group of all ranks, and yields this rank's World.

    timeout: seconds after which a collective on CUDA whose peers are missing ends the process (gloo notices a lost peer
    at once). Only rank 0 prints to stdout. A rank that fails waits a few seconds before it raises: usually it has lost
    a peer, and the launcher should see that peer's failure first. Only rank 0 raises UserError and TrainingError at
    once, because usually all ranks have the same one.
    """
    if decision.mode != "join":
        raise ValueError(f"joined takes a decision to join, got {decision}")
    end_with_parent()
    device = torch.device(decision.device, decision.local_rank if decision.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = datetime.timedelta(seconds=timeout)
    dist.init_process_group(
        decision.backend,
        store=found(decision, timeout=patience),
        rank=decision.rank,
        world_size=decision.world,
        timeout=patience,
        device_id=device if device.type == "cuda" else None,
    )
    with contextlib.ExitStack() as quiet:
        if decision.rank:
            quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
        try:
            yield open_world(shape, decision.device, decision.local_rank)
        except Exception as error:  # any error is raised again; the docstring says why it may wait
            if decision.rank or not isinstance(error, UserError | TrainingError):
                time.sleep(_LINGER)
            raise
    dist.destroy_process_group()
