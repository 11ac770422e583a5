"""A run's directory: config.json, tokenizer/, metrics.jsonl, tensorboard/, checkpoints/, nonfinite/.

Nothing that a run wrote is overwritten without a copy; a directory of another model is refused.
"""

import io
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.files import write_atomically

CONFIG, TOKENIZER, CHECKPOINTS, NONFINITE = "config.json", "tokenizer", "checkpoints", "nonfinite"


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The configuration that a run left in `workdir`, or None."""
    path = workdir / CONFIG
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); choose another --workdir") from error


def check_same_run(workdir: Path, config: dict[str, Any]) -> None:
    """Raises UserError if `workdir` belongs to a run whose state has another form: another model or optimizer."""
    there = read_config(workdir)
    if there is None:
        return
    free = {
        "gradient_checkpointing",
        "attention_dropout",
        "router_aux_loss_coef",
        "router_balance",
        "router_z_loss_coef",
        "moe_drop_tokens",
        "moe_capacity_factor",
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
    old, new = there.get("optimizer", {}).get("kind"), config["optimizer"]["kind"]
    if old != new:
        raise UserError(
            f"{workdir} belongs to a run with optimizer.kind={old}, this run's is {new}; choose another --workdir, and "
            "--config.init_from to start from its weights"
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
    write_atomically(workdir / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return changes


def keep_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Save the tokenizer in the workdir, once: a run keeps the one it began with. `load_tokenizer` opens it there."""
    place = workdir / TOKENIZER
    if place.exists():
        return
    temporary = workdir / f".{TOKENIZER}.{uuid.uuid4().hex}"
    try:
        tokenizer.save(temporary)
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def keep_batch(workdir: Path, step: int, batch: Mapping[str, Tensor]) -> Path:
    """Write a step's batch to nonfinite/step-N.npz, an array a key, so that the step can be run again alone."""
    content = io.BytesIO()
    np.savez(content, **{key: value.numpy() for key, value in batch.items()})
    write_atomically(path := workdir / NONFINITE / f"step-{step}.npz", content.getvalue())
    return path


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
