"""A run's directory: config.json, tokenizer/, metrics.jsonl, tensorboard/, checkpoints/, nonfinite/; for the report
run.json (run_record), answers/ (answers_folder) and report.html itself.

An old config.json is copied before it is overwritten, and checkpoints are moved aside, not deleted. When a run resumes
from a step, log entries of later steps are dropped. A directory with another model or tokenizer is refused. Checkpoints
record both, protected by their manifests; where they differ from the files in the directory, the checkpoints count.
"""

import io
import itertools
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3f.checkpoint import manifest
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.config import ModelConfig
from qwen3f.data.chat.recognise import kind_of, write_template
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.files import write_atomically
from qwen3f.params import abstract_params
from qwen3f.strict_json import read_object
from qwen3f.train.hyper import AdamW, parse_rates
from qwen3f.train.optimizer import trainable

CONFIG, TOKENIZER, CHECKPOINTS, NONFINITE = "config.json", "tokenizer", "checkpoints", "nonfinite"


# Fields of the model that only affect training: the function of the model and the form of a state don't depend on them.
TRAINING_FIELDS = frozenset({
    "gradient_checkpointing", "attention_dropout", "router_aux_loss_coef", "router_balance", "router_z_loss_coef",
    "moe_drop_tokens", "moe_capacity_factor", "initializer_range", "embed_initializer_range",
})  # fmt: skip


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The content of config.json in `workdir`, or None if there is none. UserError if no run wrote that file."""
    path = workdir / CONFIG
    if not path.exists():
        return None
    try:
        config = read_object(path)
        if not all(isinstance(config.get(section), dict) for section in ("model", "optimizer")):
            raise UserError("it has no section model or optimizer")
    except UserError as error:
        raise UserError(
            f"{path} is not what a run writes ({error}): put it back, delete it (its checkpoints hold the "
            "configuration too), or choose another --workdir"
        ) from error
    return config


def check_same_run(workdir: Path, config: dict[str, Any]) -> None:
    """Raises UserError, with what differs, if `workdir` belongs to a run whose state `config` can't continue.

    Checked are stage, model and optimizer, by the last readable checkpoint (else config.json; both must agree);
    config.data.tokenizer and config.chat_template, if set; and that the tokenizer's files are unchanged since the run
    began.
    """
    there, meta = read_config(workdir), _last_meta(workdir)
    saved = meta.get("config") or there or config
    for key, (old, new) in _differences(saved, config).items():
        kind = key.partition(".")[0]
        what = "to another model: its" if kind == "model" else f"to a run of another {kind}: its"
        raise UserError(
            f"{workdir} belongs {what} {key} is {old}, this run's is {new}; choose another --workdir, or "
            "--config.init_from to start from its weights"
        )
    for key, (old, new) in _differences(saved, there or saved).items():
        raise UserError(
            f"{workdir / CONFIG} was changed: it says that {key} is {new}, the checkpoints {old}; put it back, or "
            "delete it (the run writes it anew)"
        )
    check_tokenizer(workdir, meta)
    chosen, kept = config["data"]["tokenizer"], workdir / TOKENIZER
    if chosen and kept.exists() and load_tokenizer(chosen).fingerprint != load_tokenizer(kept).fingerprint:
        raise UserError(
            f"--config.data.tokenizer={chosen} is not the tokenizer that the run in {workdir} began with, which {kept} "
            "holds; leave the flag out, or choose another --workdir"
        )
    if (kind := config.get("chat_template")) and kept.exists() and (has := kind_of(load_tokenizer(kept)).name) != kind:
        raise UserError(
            f"--config.chat_template={kind} is not the chat template that the run in {workdir} began with, which is "
            f"{has}; leave the flag out, or choose another --workdir"
        )


def check_tokenizer(workdir: Path, meta: Mapping[str, Any]) -> None:
    """Compares the workdir's tokenizer/ with the sizes and checksums in a checkpoint's meta["tokenizer"].

    Raises UserError, with the file that was changed, removed or added. A meta without that key is not checked.
    """
    place, wanted = workdir / TOKENIZER, meta.get(TOKENIZER)
    if wanted is None:
        return
    there = manifest.describe_all(place)
    for name in sorted(wanted | there):
        if wanted.get(name) != there.get(name):
            what = "was removed" if name not in there else "was added" if name not in wanted else "has changed"
            raise UserError(
                f"{place / name} {what} since the checkpoints beside it were trained: the same text would get other "
                "ids; restore the directory as it was, or choose another --workdir"
            )


def write_config(workdir: Path, config: dict[str, Any], step: int) -> list[str]:
    """Write config.json. Returns 'key: old -> new' for every key that differs from the old config.json.

    step: N in the name of the old file's copy, config.until-step-N.json. Earlier copies stay.
    """
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
        numbers = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
        copies = (workdir / f"config.until-step-{step}{number}.json" for number in numbers)
        shutil.copy2(workdir / CONFIG, next(copy for copy in copies if not copy.exists()))
    write_atomically(workdir / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return changes


def keep_tokenizer(workdir: Path, tokenizer: Tokenizer) -> dict[str, manifest.Entry]:
    """Save the tokenizer in the workdir, unless one is there: a run keeps its first one. `load_tokenizer` opens it.

    Returns file name -> size and sha256, for a checkpoint's meta: see `check_tokenizer`.
    """
    place = workdir / TOKENIZER
    if not place.exists():
        temporary = workdir / f".{TOKENIZER}.{uuid.uuid4().hex}"
        try:
            tokenizer.save(temporary)
            write_template(tokenizer, temporary, always=False)
            temporary.rename(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest.describe_all(place)


def keep_batch(workdir: Path, step: int, batch: Mapping[str, np.ndarray]) -> Path:
    """Write a step's batch to nonfinite/step-N.npz, one array per key, so that the step can be repeated alone."""
    write_atomically(path := workdir / NONFINITE / f"step-{step}.npz", to_npz(batch))
    return path


def to_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def _last_meta(workdir: Path) -> dict[str, Any]:
    """The meta of the last checkpoint whose meta can be read; {} if there is none."""
    with Checkpointer(workdir / CHECKPOINTS, every=0, keep=0) as checkpoints:
        for step in reversed(checkpoints.steps()):
            try:
                return checkpoints.read_meta(step)
            except DamagedCheckpoint:
                continue  # the run reports it, and resumes from the one before
    return {}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (old, new), for keys whose values make it another stage, model or optimizer."""
    keys = [("model", key) for key in new["model"] if key not in TRAINING_FIELDS] + [("optimizer", "kind")]
    values = {f"{section}.{key}": (old.get(section, {}).get(key), new[section].get(key)) for section, key in keys}
    values["stage"] = old.get("stage"), new.get("stage")
    rates = [section.get("optimizer", {}).get("rates", "") for section in (old, new)]
    if _frozen(rates[0], new["model"]) != _frozen(rates[1], new["model"]):
        values["optimizer.rates"] = rates[0], rates[1]  # the state has moments for other leaves
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def _frozen(rates: str, model: Mapping[str, Any]) -> set[str]:
    paths = abstract_params(ModelConfig.from_dict(dict(model)))
    return set(paths) - trainable(AdamW(rates=parse_rates(rates)), paths)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
