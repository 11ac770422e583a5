"""Benchmark: the cost of writing and reading a state, here and with Orbax's own handler for jax.Arrays.

    python -m qwen3f.checkpoint.bench --preset=qwen3-1.7b --dir=DIR

The state has a preset's parameters and AdamW's two moments, float32, on the CPU. Each case runs in its own process, and
prints seconds by the clock, seconds of CPU time, and the peak memory in addition to the state.

Cases: ours_write, ours_read, orbax_write, orbax_read: the whole state; orbax_write saves jax.Arrays of the same memory.
ours_read_half: the half that one of two ranks needs. orbax_write_4, orbax_read_2: arrays on 4, or 2, devices of one
process. ours_stall: the time for which a save stops training: the second copy of a state, on the GPU if there is one,
into host memory. DIR needs room for two states.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import app, flags

from qwen3f import params as P
from qwen3f import presets
from qwen3f.checkpoint import orbax
from qwen3f.checkpoint.shards import Shard, whole
from qwen3f.checkpoint.snapshot import Snapshot
from qwen3f.checkpoint.tree import Name, Part, nest, spec_of

_PRESET = flags.DEFINE_string("preset", "debug", "The preset whose parameters and moments the state has.")
_LAYERS = flags.DEFINE_integer("layers", 0, "Number of layers; 0: the preset's.")
_DIR = flags.DEFINE_string("dir", None, "A new directory on the disk to measure.")
_CASE = flags.DEFINE_string("case", "", "Run only this case, in this process.")

CASES = (
    "ours_stall",
    "ours_write",
    "ours_read",
    "ours_read_half",
    "orbax_write",
    "orbax_read",
    "orbax_write_4",
    "orbax_read_2",
)
_FIELDS = ("params", "m", "v")


def main(argv: list[str]) -> None:
    if not _DIR.value:  # not required=True, which would apply to every process that imports this module
        sys.exit("error: --dir is missing; write --dir=NEW, a directory on the disk to measure")
    place = Path(_DIR.value)
    if _CASE.value:
        cfg = presets.get(_PRESET.value)
        cfg = cfg.replace(num_hidden_layers=_LAYERS.value) if _LAYERS.value else cfg
        print(measure(_CASE.value, place, P.abstract_params(cfg)), flush=True)
        return
    if place.exists():  # the directory is deleted at the end
        raise app.UsageError(f"--dir={place} exists already; write a new directory")
    place.mkdir(parents=True)
    for case in CASES:
        state = [f"--preset={_PRESET.value}", f"--layers={_LAYERS.value}"]
        command = [sys.executable, "-m", "qwen3f.checkpoint.bench", f"--case={case}", f"--dir={place}", *state]
        subprocess.run(command, check=True)
    shutil.rmtree(place)


def measure(case: str, place: Path, table: Mapping[str, P.ParamSpec]) -> str:
    """Run one case; returns a line with its cost. table: path -> ParamSpec of the parameters."""
    backend, what, *devices = case.split("_")
    device = {"read": "meta", "stall": "cuda" if torch.cuda.is_available() else "cpu"}.get(what, "cpu")
    state = {(field, path): _filled(spec.shape, device) for field in _FIELDS for path, spec in table.items()}
    size = sum(4 * leaf.numel() for leaf in state.values())
    before = time.perf_counter()
    open_case = _ours if backend == "ours" else _orbaxs
    run = open_case(what, devices, place, state)
    imported, processors, memory = time.perf_counter(), time.process_time(), _peak()
    run()
    done = time.perf_counter()
    return (
        f"{case:<15} {size / 1e9:.2f} GB: {done - imported:6.2f} s, {time.process_time() - processors:6.2f} s of CPU "
        f"time, {(_peak() - memory) / 1e9:5.2f} GB more memory; before that {imported - before:.2f} s to import and "
        f"open, {memory / 1e9:.2f} GB"
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _filled(shape: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.empty(shape, device=device) if device == "meta" else torch.randn(shape, device=device)


def _ours(what: str, devices: list[str], place: Path, state: dict[Name, torch.Tensor]) -> Callable[[], Any]:
    directory = place / "ours"
    if what == "stall":
        snapshot = Snapshot()
        _copy(snapshot, state)  # like the first save, which accesses the memory for the first time
        snapshot.finish()
        return lambda: _copy(snapshot, state)
    orbax.load(what == "write")
    if what == "write":
        directory.mkdir()
        parts = {name: Part(spec_of(leaf), whole(leaf.shape), leaf) for name, leaf in state.items()}
        return lambda: orbax.write(directory, parts, True)
    shard = _half if devices else lambda shape: whole(shape)
    wanted = {name: Part(spec_of(leaf), shard(leaf.shape)) for name, leaf in state.items()}
    return lambda: orbax.read(directory, wanted)


def _copy(snapshot: Snapshot, state: dict[Name, torch.Tensor]) -> None:
    """Copy the state as a save does, and wait for it as the next write into the state would."""
    snapshot.begin(state)
    snapshot.join()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _half(shape: torch.Size) -> Shard:
    """The Shard of one of two ranks: the first half of the largest dimension."""
    cut = max(range(len(shape)), key=lambda d: shape[d])
    local = [size // 2 if d == cut else size for d, size in enumerate(shape)]
    box = tuple(slice(0, size) for size in local)
    return Shard(tuple(shape), tuple(local), tuple(local), ((box, box),))


def _orbaxs(what: str, devices: list[str], place: Path, state: dict[Name, torch.Tensor]) -> Callable[[], Any]:
    """As _ours, with Orbax's unchanged handler, without our zarr.py."""
    count = int(devices[0]) if devices else 1
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(count, 1)}"
    jax, ocp = orbax.import_jax_and_orbax()
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:count]), ("x",))

    def sharding(shape: torch.Size) -> Any:
        cut = max(range(len(shape)), key=lambda d: shape[d])
        names = [("x" if d == cut and shape[cut] % count == 0 else None) for d in range(len(shape))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    directory = place / f"orbax{'_mesh' if devices else ''}"
    if what == "write":
        arrays = nest({name: jax.dlpack.from_dlpack(leaf) for name, leaf in state.items()})
        if count > 1:
            arrays = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf.shape)), arrays)
        directory.mkdir()
        return lambda: handler.save(orbax.epath(directory), args=ocp.args.PyTreeSave(arrays))
    like = jax.tree.map(
        lambda leaf: ocp.type_handlers.ArrayRestoreArgs(sharding=sharding(leaf.shape), dtype=np.float32), nest(state)
    )

    def read() -> None:
        arrays = handler.restore(orbax.epath(directory), args=ocp.args.PyTreeRestore(restore_args=like))
        jax.block_until_ready(arrays)

    return read


if __name__ == "__main__":
    app.run(main)
