"""run.json in the workdir: facts for the report that are not in the configuration or the metrics.

Versions, commit, machine, the lines that the stage printed at the start, placement of parameters, and time.
"""

import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3f.errors import UserError
from qwen3f.files import write_atomically
from qwen3f.params import abstract_params
from qwen3f.strict_json import read_object
from qwen3f.train.metrics import peak_flops, peak_source
from qwen3f.train.setup import Setup
from sharding import rules
from sharding.mesh import AXES
from sharding.pipeline.cut import make_slices

RUN = "run.json"
_DIGITS = 5  # decimals of an expert's share


class RunRecord:
    """Writes run.json; each `save` rewrites the whole file. It keeps the sessions of earlier processes of the run.

    facts: from `facts`. start: steps done before. say: called with a line, once, if the file cannot be written.
    """

    def __init__(self, workdir: Path, facts: Mapping[str, Any], start: int, say: Callable[[str], None]) -> None:
        self._path, self._facts, self._say, self._failed = workdir / RUN, dict(facts), say, False
        self._before = _sessions(self._path) if start else []
        self._session = {"start": start, "step": start, "began": time.time(), "seconds": 0.0}
        self._clock = time.perf_counter()
        self._load: dict[str, Any] = {}

    def save(self, step: int, expert_load: Tensor | None = None) -> None:
        """step: steps done so far. expert_load: [S, E], from balance.load_metrics; None keeps the last one."""
        self._session |= {"step": step, "seconds": round(time.perf_counter() - self._clock, 3)}
        if expert_load is not None:
            shares = [[round(share, _DIGITS) for share in layer] for layer in expert_load.tolist()]
            self._load = {"expert_load": {"step": step, "shares": shares}}
        went = step > self._session["start"] or not self._before
        sessions = [*self._before, *([self._session] if went else [])]
        record = {**self._facts, **self._load, "sessions": sessions}
        try:
            write_atomically(self._path, (json.dumps(record) + "\n").encode(errors="replace"))
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._say(f"{self._path} cannot be written ({error.strerror or error}); the run goes on without")


def facts(setup: Setup, lines: Sequence[str]) -> dict[str, Any]:
    """The facts that are known when a run starts. lines: Stage.lines."""
    shape = setup.layout.axes.shape
    return {
        "commit": _commit(),
        "command": sys.argv,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": _machine(setup.device),
        "parameters": setup.model.total_params_estimate(),
        "active_parameters": setup.model.active_params_estimate(),
        "mesh": {axis: getattr(shape, axis) for axis in AXES},
        "microbatches": setup.microbatches,
        "dtype": str(setup.compute_dtype).removeprefix("torch."),
        "compile": setup.execution.compile,
        "peak_flops": peak_flops(setup.device) * shape.size,
        "peak_source": peak_source(setup.device),
        "lines": list(lines),
        "placement": _placement(setup),
    }


def _placement(setup: Setup) -> list[dict[str, Any]]:
    """For every parameter: its whole shape, which axis cuts which dimension, and the shape of one rank's shard."""
    layout, shape = setup.layout, setup.layout.axes.shape
    slices = make_slices(setup.model, layout.pipeline, shape.pp)
    rows, placed = [], layout.place(setup.model)
    for path, spec in abstract_params(setup.model).items():
        where = placed[path]
        local = rules.local_shape(spec, where, shape, slices)
        cuts = {axis: where.cuts[axis] for axis in AXES if axis in where.cuts}
        rows.append(
            {"path": path, "shape": list(spec.shape), "cuts": cuts, "fsdp": list(where.fsdp), "local": list(local)}
        )
    return rows


def _machine(device: torch.device) -> dict[str, Any]:
    """The computer, without its name."""
    found = {"system": platform.system(), "processor": _processor(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "card_memory": card.total_memory, "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the running code, with the suffix "-dirty" if files were changed; "" if git cannot tell."""
    command = ["git", "-C", str(Path(__file__).parents[2]), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _sessions(path: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(UserError, OSError):
        there = read_object(path).get("sessions")
        return [one for one in there if isinstance(one, dict)] if isinstance(there, list) else []
    return []
