"""A run's directory: config.json, tokenizer.model, metrics.jsonl, tensorboard/, checkpoints/.

Nothing that a run wrote is overwritten without a copy; a directory of another model is refused.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from qwen3f.errors import UserError

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer.model", "checkpoints"


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The configuration that a run left in `workdir`, or None."""
    path = workdir / CONFIG
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); choose another --workdir") from error


def check_same_model(workdir: Path, config: dict[str, Any]) -> None:
    """Raises UserError if `workdir` belongs to a run of another model. What doesn't change the model may differ."""
    there = read_config(workdir)
    if there is None:
        return
    free = {
        "gradient_checkpointing",
        "attention_dropout",
        "router_aux_loss_coef",
        "initializer_range",
        "embed_initializer_range",
    }
    for key, value in config["model"].items():
        old = there.get("model", {}).get(key)
        if key not in free and old != value:
            raise UserError(
                f"{workdir} belongs to another model: its model.{key} is {old}, this run's is {value}; choose another "
                "--workdir, or --config.init_from to start from its weights"
            )


def write_config(workdir: Path, config: dict[str, Any], step: int) -> list[str]:
    """Write config.json; returns 'key: old -> new' for what differs from the one there, which is kept beside it."""
    old = read_config(workdir)
    if old == config:
        return []
    workdir.mkdir(parents=True, exist_ok=True)
    changes: list[str] = []
    if old is not None:
        before, after = _flat(old), _flat(config)
        changes = [
            f"{key}: {before.get(key)} -> {after.get(key)}"
            for key in sorted(before | after)
            if before.get(key) != after.get(key)
        ]
        shutil.copy2(workdir / CONFIG, workdir / f"config.until-step-{step}.json")
    _write_atomically(workdir / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return changes


def keep_tokenizer(workdir: Path, model_file: Path) -> None:
    """Copy the tokenizer into the workdir, once: a run keeps the one it began with."""
    if not (workdir / TOKENIZER).exists():
        _write_atomically(workdir / TOKENIZER, model_file.read_bytes())


def split_source(path: str) -> tuple[Path, int | None]:
    """(workdir, step or None) of an `init_from`: a workdir, or a workdir's checkpoints/N."""
    place = Path(path)
    if place.parent.name == CHECKPOINTS and place.name.isdigit():
        workdir, step = place.parent.parent, int(place.name)
    else:
        workdir, step = place, None
    if not (workdir / CHECKPOINTS).is_dir():
        raise UserError(
            f"config.init_from={path}: there is no {workdir / CHECKPOINTS}; give a workdir or its checkpoints/N"
        )
    return workdir, step


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
