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

from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.files import write_atomically
from qwen3f.params import abstract_params
from qwen3f.train.optimizer import AdamW, parse_rates

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
    """Raises UserError if `workdir` belongs to another stage, or its state has another form: model, optimizer, frozen
    leaves."""
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
    if (old := there.get("stage")) != (new := config["stage"]):
        raise UserError(
            f"{workdir} belongs to a run of config.stage={old}, this run's is {new}; choose another --workdir, and "
            "--config.init_from to start from its weights"
        )
    old, new = there.get("optimizer", {}).get("kind"), config["optimizer"]["kind"]
    rates = [section.get("optimizer", {}).get("rates", "") for section in (there, config)]
    hypers = [AdamW(rates=parse_rates(text)) for text in rates]
    paths = abstract_params(ModelConfig.from_dict(config["model"]))
    changed = [path for path in paths if bool(hypers[0].rate(path)) != bool(hypers[1].rate(path))]
    if changed:
        raise UserError(
            f"{workdir} belongs to a run with config.optimizer.rates={rates[0]!r}, this run's is {rates[1]!r}, which "
            f"freezes others, {changed[0]} first; choose another --workdir, and --config.init_from to start from its "
            "weights"
        )
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


def keep_batch(workdir: Path, step: int, batch: Mapping[str, np.ndarray]) -> Path:
    """Write a step's batch to nonfinite/step-N.npz, an array a key, so that the step can be run again alone."""
    write_atomically(path := workdir / NONFINITE / f"step-{step}.npz", to_npz(batch))
    return path


def to_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
