"""The stage inspect: prints the content of a checkpoint, and checks whether its files are unchanged."""

from pathlib import Path

from ml_collections import ConfigDict

from qwen3f.checkpoint import manifest
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.checkpoint.tree import LeafSpec
from qwen3f.errors import UserError
from qwen3f.interop import source
from qwen3f.train import workdir as W


def run(config: ConfigDict, workdir: Path, progress: bool = True) -> list[str]:
    """Print and return the lines of `report` for config.path; raises as `report`. The workdir is not used."""
    if not config.path:
        raise UserError("config.path is missing; write --config.path=W, a workdir or its checkpoints/N")
    lines = report(config.path, config.verify, config.backend)
    print("\n".join(lines), flush=True)
    return lines


def report(path: str, verify: bool, backend: str = "orbax") -> list[str]:
    """Lines of text about the checkpoint at `path`. verify: also read all files and compare their checksums. backend:
    see Checkpointer.

    Raises UserError if there is no checkpoint, DamagedCheckpoint, with the file's name, if a file was changed.
    """
    directory, _, step = source.locate(path, "config.path", own=True)
    with Checkpointer(directory / W.CHECKPOINTS, every=0, keep=0, backend=backend) as checkpoints:
        steps = checkpoints.steps()
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise UserError(
                f"config.path={path}: {checkpoints.directory} holds no checkpoint; give a workdir that has trained"
            )
        try:
            place = checkpoints.path(step)
        except UserError as error:
            raise UserError(f"config.path={path}: {error}") from error
        files = manifest.verify(place) if verify else None
        tree, meta = checkpoints.read_tree(step), checkpoints.read_meta(step)
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    width = max(len(".".join(name)) for name in tree)
    lines = [f"{'.'.join(name):<{width}}  {spec}" for name, spec in tree.items()]
    totals: dict[str, list[LeafSpec]] = {}
    for name, spec in tree.items():
        totals.setdefault(name[0], []).append(spec)
    lines += [
        f"{field}: {len(specs)} leaves, {sum(spec.bytes for spec in specs):,} bytes" for field, specs in totals.items()
    ]
    for first, end in meta.get("spikes", {}).get("skipped", ()):
        lines.append(f"left out after a loss spike: examples {first} to {end - 1} of the data order")
    config = meta.get("config", {})
    lines.append(
        f"stage {config.get('stage')}, seed {config.get('seed')}; checkpoints of steps {steps}; this is {step}"
    )
    checked = "not checked" if files is None else f"{files} files, every checksum as written"
    return [*lines, f"{place}: {size:,} bytes on disk, {checked}"]
