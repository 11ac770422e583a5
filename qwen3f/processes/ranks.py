"""How a process comes to its rank: alone, started here, or joining torchrun or Slurm.

`decide` is pure: from the environment, the mesh's size and this host's devices to a Decision. `start` runs the command
once a local rank; each of these finds torchrun's variables and so joins. `joined` makes the process group.
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
CPU_RANKS = 8  # that a host with fewer cores offers too: to try a mesh, however slowly
_POLL = 0.05  # seconds
_LINGER = 5.0  # seconds; longer than processes.run_ranks leaves ranks to live on after one has failed
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What this process is to do.

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

    command: what this process was called with, for the hint of what to run instead. Raises UserError if a launcher
    started another number of ranks than the mesh has, if the launcher's variables are incomplete, or if the mesh needs
    more devices than this host has: with the torchrun line that starts it on several.
    """
    if "TORCHELASTIC_RUN_ID" in environment or "WORLD_SIZE" in environment:
        return _torchrun(environment, world, local_devices, device)
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _slurm(environment, world, local_devices, device)
    if world == 1:
        return Decision("single", 1, device)
    if world > local_devices:
        raise UserError(
            f"the mesh needs {world} devices, this host has {local_devices} ({device}); {_how(world, local_devices)}: "
            f"{torchrun_line(world, local_devices, command)}"
        )
    return Decision("start", world, device)


def _how(world: int, local_devices: int) -> str:
    nodes = world // _a_host(world, local_devices)
    return f"run this on each of {nodes} such hosts, with one of them for HOST" if nodes > 1 else "run"


def _a_host(world: int, local_devices: int) -> int:
    """Ranks a host: the most that divide the mesh, so that all hosts run the same command."""
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
    # the agent serves the store itself and tells so by a variable, which env:// looks for
    return _join(world, device, local_devices, values["RANK"], values["LOCAL_RANK"], "env://")


def _slurm(environment: Mapping[str, str], world: int, local_devices: int, device: str) -> Decision:
    whole = [name for name in _SLURM if name != "SLURM_STEP_NODELIST"]
    values = _numbers("srun", environment, _SLURM, whole)
    _check_world("srun", values["SLURM_STEP_NUM_TASKS"], world, "--ntasks")
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    # Slurm knows no port. A job's number gives the same one on all hosts, and two jobs on a host seldom the same.
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
        local_rank = 0  # with --gpus-per-task a rank sees one device alone
    if local_rank >= local_devices:
        raise UserError(
            f"rank {rank} is number {local_rank} of its host, which has {local_devices} devices ({device}); start at "
            f"most {local_devices} ranks a host"
        )
    return Decision("join", world, device, rank, local_rank, init)


def _check_world(launcher: str, started: int, world: int, option: str) -> None:
    if started != world:
        raise UserError(
            f"{launcher} started {started} ranks, the mesh has {world} devices; make {option} {world}, or choose a "
            f"mesh of {started} with --config.mesh"
        )


def _numbers(
    launcher: str, environment: Mapping[str, str], needed: Sequence[str], whole: Sequence[str]
) -> dict[str, int]:
    """The whole numbers among a launcher's variables, all of which must be there."""
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(f"{launcher} left {', '.join(missing)} unset; start the ranks with {launcher} again")
    for name in whole:
        if not environment[name].isdecimal():
            raise UserError(f"{name}={environment[name]!r} is not a number; start the ranks with {launcher}")
    values = {name: int(environment[name]) for name in whole}
    if values.get("MASTER_PORT", 1) not in range(1, 2**16):
        raise UserError(f"MASTER_PORT={values['MASTER_PORT']} is no port; set one from 1 to {2**16 - 1}")
    return values


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: `gpu[01-03,07],login` -> gpu01, `rack[1-2]n[3-4]` -> rack1n3."""
    match = re.match(r"([^,\[\]]|\[\w[^\]]*\])+(?=,|$)", nodelist)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodelist!r} names no host; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def local_devices(device: str) -> int:
    """Devices of a kind that this host offers to ranks."""
    return torch.cuda.device_count() if device == "cuda" else max(CPU_RANKS, os.cpu_count() or 1)


def all_devices(environment: Mapping[str, str], device: str) -> int:
    """What an axis of size -1 is filled up to: the ranks that a launcher has started, else this host's devices or
    cores."""
    started = environment.get("WORLD_SIZE") or environment.get("SLURM_STEP_NUM_TASKS", "1")
    if started.isdecimal() and ("WORLD_SIZE" in environment or started != "1"):
        return int(started)
    return torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1


def start(decision: Decision, command: Sequence[str], *, restarts: int = 0) -> int:
    """Run `python command…` once a rank on this host and wait; as processes.run_ranks."""
    if decision.mode != "start":
        raise ValueError(f"start takes a decision to start ranks, got {decision}")
    environment = dict(os.environ)
    if decision.device == "cpu" and "OMP_NUM_THREADS" not in environment:
        # ranks on CPUs share the cores; unless the user chose, each gets its part, as torchrun's ranks get one
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // decision.world))
    return run_ranks(command, decision.world, environment, restarts)


def meet(store: dist.Store, rank: int, world: int, *, timeout: datetime.timedelta) -> dist.Store:
    """The part of a store that these ranks have for themselves, once all of them are there.

    torchrun's agents start ranks again with the store that those before them had, where a rank would find the addresses
    of dead ones; TORCHELASTIC_RESTART_COUNT tells attempts apart on one host alone, since an agent counts only what its
    own ranks lost. So rank 0 draws a name and tells it to all who say that they are here, each under a name drawn too,
    until those of this attempt have taken it, which nobody from before does. Raises TrainingError if that takes longer
    than `timeout`.
    """
    store.set_timeout(timeout)
    drawn = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", drawn)
        try:
            name = store.get(f"name/{drawn}").decode()
        except dist.DistStoreError as error:
            raise TrainingError(f"rank 0 of {world} has not come in {timeout.total_seconds():g} s") from error
        store.set(f"taken/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    missing = list(range(1, world))
    until = time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > until:
            who = ", ".join(map(str, missing))
            raise TrainingError(f"of {world} ranks these have not come in {timeout.total_seconds():g} s: {who}")
        for other in missing:
            if store.check([f"here/{other}"]):
                store.set(f"name/{store.get(f'here/{other}').decode()}", drawn)
        time.sleep(_POLL)
        missing = [other for other in missing if not store.check([f"taken/{drawn}/{other}"])]
    return dist.PrefixStore(drawn, store)


def found(decision: Decision, *, timeout: datetime.timedelta) -> dist.Store:
    """What `meet` gives, from where the ranks of a decision to join meet.

    Raises TrainingError where a rank, or the host that all ask, does not come in time, or goes again.
    """
    try:
        store, rank, world = next(dist.rendezvous(decision.init, decision.rank, decision.world, timeout=timeout))
        return meet(store, rank, world, timeout=timeout)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise TrainingError(
            f"rank {decision.rank} of {decision.world} could not meet the others ({str(error).splitlines()[0]}); see "
            "whether all have started, and reach the first one's host and port"
        ) from error


@contextlib.contextmanager
def joined(decision: Decision, shape: MeshShape, *, timeout: float) -> Iterator[World]:
    """This rank's World, within the process group of all. timeout: seconds until a collective on CUDA without its peers
    ends the process (gloo notices a peer that is gone at once).

    Standard output is rank 0's alone. A rank that fails with something but our own errors lives on for a few seconds
    before it reports: mostly it has lost a peer, and whoever started the ranks should see that one first. So do ranks
    but 0 with our own errors, which are mostly those of all ranks.
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
        except Exception as error:
            if decision.rank or not isinstance(error, UserError | TrainingError):
                time.sleep(_LINGER)
            raise
    dist.destroy_process_group()
