"""Checks of a configuration that need nothing else: words, numbers and paths. Imports no torch, so they are fast.

`cli.run_stage` runs them before it imports a stage; `setup.make_setup` runs them for callers that skip the command
line.
"""

import functools
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen3f.config import ModelConfig
from qwen3f.data.chat.kinds import KINDS as CHAT_TEMPLATES
from qwen3f.errors import UserError
from qwen3f.files import exists, user_path
from qwen3f.limits import COLDEST, HOTTEST, check_layers
from qwen3f.train.hyper import KINDS as OPTIMIZERS
from qwen3f.train.hyper import make_hyper
from sharding.mesh import divisors, hybrid, nearest, parse_mesh

# The allowed words of each key. Tests compare them with the modules that use them.
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float64"),
    "compile": ("auto", "off", "block", "step"),
    "attention": ("auto", "reference", "sdpa", "flash", "invariant"),
    "wandb": ("off", "offline", "online"),
    "chat_template": ("", *CHAT_TEMPLATES),
    "fsdp.reduce": ("compute", "float32"),
    "pipeline.schedule": ("1f1b", "interleaved", "zero_bubble", "zbv"),
    "optimizer.kind": tuple(OPTIMIZERS),
    "schedule.kind": ("cosine", "wsd", "constant"),
    "schedule.decay_shape": ("linear", "cosine"),
    "checkpoint.on_failure": ("stop", "go_on"),
    "checkpoint.backend": ("orbax", "dcp"),
    "backend": ("orbax", "dcp"),
    "checkpoint.best_mode": ("min", "max"),
    "data.packing": ("concat", "best_fit"),
    "data.long_documents": ("cut", "drop"),
    "data.turns": ("last", "all"),
    "data.long_chats": ("drop", "cut_end", "error"),
    "data.on_bad_row": ("error", "skip"),
    "sandbox": ("auto", "bubblewrap", "landlock", "none"),
    "advantages.baseline": ("mean", "leave_one_out"),
    "advantages.scale": ("group", "batch", "none"),
    "advantages.combine": ("sum_then_normalize", "normalize_then_sum"),
    "grpo.loss": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "gspo", "luspo", "vespo"),
    "grpo.kl": ("k1", "k2", "k3"),
    "rollout.correction": ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "rollout.old_logprobs": ("auto", "trainer", "sampler"),
    "dpo.loss": (
        "sigmoid", "sigmoid_norm", "hinge", "ipo", "cdpo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
        "apo_zero", "apo_down",
    ),
    "dpo.reference_log_probs": ("cached", "live"),
    "online.judge": ("task", "rule", "reward_model"),
}  # fmt: skip
CHOICES_OF = {  # stage -> its own words, in place of those above
    "export_hf": {"dtype": ("bfloat16", "float16", "float32", "stored")},
    "eval": {"attention": ("auto", "reference", "sdpa", "flash")},
}
POSITIVE = (
    "steps", "batch_size", "seq_len", "log_every", "eval.batch_size", "spike.window", "collective_timeout",
    "data.num_threads", "data.problems", "data.max_heldout", "eval.max_new_tokens", "max_new_tokens", "samples",
    "eval.benchmark_questions", "online.max_new_tokens", "online.rounds", "updates", "rollout.samples",
    "rollout.max_new_tokens", "rollout.rows", "rollout.microbatch_rows", "rollout.draws", "judge.processes", "chunk",
)  # fmt: skip
NOT_NEGATIVE = (
    "microbatches", "seed", "eval.every", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_every",
    "checkpoint.keep_best", "checkpoint.timeout", "spike.threshold", "spike.rollbacks", "nonfinite_skips", "restarts",
    "watchdog", "resume", "schedule.peak_lr", "schedule.warmup", "schedule.decay", "pipeline.layers", "fsdp.shard_size",
    "data.workers", "data.max_samples", "data.shuffle_buffer", "data.temperature", "sample.tokens",
    "sample.temperature", "eval.temperature", "eval.max_docs", "eval.max_rows", "eval.questions", "show_samples",
    "context_warmup.length", "temperature", "questions", "keep", "eval.cache_tokens", "online.cache_tokens",
    "eval.benchmark_tokens", "samples.keep", "samples.show", "rollout.cache_tokens", "limit", "batch_tokens",
)  # fmt: skip
SHARES = ("schedule.min_ratio", "data.holdout", "data.switches")  # from 0 to 1
TRAINED = ("rollout.temperature", "online.temperature")  # of answers that a run trains on
PLACES = ("init_from", "out", "path")  # paths that tools (stages without a model) must be given
_OPTIONAL = {"generate": ("out",)}  # stage -> PLACES that it does not need
_ZERO = {"eval": ("max_new_tokens",)}  # stage -> POSITIVE keys that may be 0 there
SECONDS = ("watchdog", "checkpoint.timeout", "collective_timeout", "judge.deadline")
_LONGEST = 10**6  # seconds, 11 days; poll counts milliseconds in 31 bits
MOST_MICROBATCHES = 2**12  # per step; a plan simulates each one
ROWS = ("batch_size", "eval.batch_size")


def check(config: ConfigDict, workdir: Path | None = None) -> None:
    """Raises UserError, with key and value, for a configuration that no run or tool can execute.

    workdir: of the run; None: init_from's path is not checked. If the workdir has a run, init_from may be gone.
    """
    values = dict(_values(config))
    for key, value in values.items():
        if value or key not in _ZERO.get(config.stage, ()):
            _check_number(key, value)
    for key, allowed in (CHOICES | CHOICES_OF.get(config.stage, {})).items():
        if values.get(key, allowed[0]) not in allowed:
            words = ", ".join(word for word in allowed if word)
            raise UserError(f"config.{key}={values[key]!r} is unknown; use one of {words}")
    if "device" in values and values["device"].partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise UserError(f"config.device={values['device']!r}: write auto, cpu or cuda")
    if "model" not in config:
        for key in PLACES:
            if not values.get(key, " ") and key not in _OPTIONAL.get(config.stage, ()):
                raise UserError(f"config.{key} is missing; write --config.{key}=DIR")
    looked = workdir is not None and not (workdir / "config.json").is_file()
    if looked and (place := values.get("init_from")) and not exists(user_path(place, "config.init_from")):
        raise UserError(
            f"config.init_from={place}: there is no {place}; write a workdir, its checkpoints/N, or a Hugging Face "
            "directory"
        )
    if "model" in config:
        _check_run(config)


def check_workdir(workdir: Path) -> None:
    """UserError unless a run could write in `workdir`. Creates nothing; files in the workdir are checked later."""
    try:
        workdir.lstat() if "\0" in str(workdir) else None  # raises for a NUL byte; exists() would return False
        place = next(place for place in (workdir, *workdir.absolute().parents) if place.exists() or place.is_symlink())
        if not place.exists():
            raise UserError(
                f"--workdir={workdir} cannot be made: {place} is a link to {place.readlink()}, which is not there; "
                "choose another"
            )
        if not place.is_dir():
            raise UserError(f"--workdir={workdir} cannot be a directory: {place} is a file; choose another")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"--workdir={workdir} cannot be written: {place} is read-only; choose another")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--workdir={str(workdir)[:80]!r} cannot be written ({getattr(error, 'strerror', None) or error}); choose "
            "another"
        ) from error


def at_least(config: ConfigDict, key: str, low: int) -> None:
    """Raises UserError if the value of a key, such as "eval.every", is less than `low`."""
    if not (value := get(config, key)) >= low:
        raise UserError(f"config.{key} must be at least {low}, got {value}")


def find_model(config: ConfigDict) -> ModelConfig:
    """config.model. Raises UserError for an invalid model (also as limits.check_layers), and for a config.seq_len with
    more tokens than the model has positions."""
    cfg = ModelConfig.from_dict(config.model.to_dict())
    names = ("num_hidden_layers", "vision_num_hidden_layers", "num_experts")
    check_layers(cfg, ", ".join(f"config.model.{name}" for name in names))
    if config.seq_len > cfg.max_position_embeddings:
        raise UserError(
            f"config.seq_len={config.seq_len} exceeds config.model.max_position_embeddings="
            f"{cfg.max_position_embeddings}; lower seq_len or raise max_position_embeddings"
        )
    return cfg


def get(config: ConfigDict, key: str) -> Any:
    """The value of a key with dots."""
    return functools.reduce(lambda section, name: section[name], key.split("."), config)


def steps_of(config: ConfigDict, key: str, updates: int = 1) -> int:
    """The number of updates that a key stands for. A value below 1 is a share of config.steps, any other a number of
    steps. updates: updates per step."""
    return int(_exact_steps(config, key) * updates)


def _exact_steps(config: ConfigDict, key: str) -> Fraction:
    value = Fraction(str(get(config, key)))  # exact decimal: 0.29 of 100 is 29, but 0.29 * 100 as floats is not
    return value * config.steps if value < 1 else value


def _check_run(config: ConfigDict) -> None:
    if config.microbatches > MOST_MICROBATCHES:
        raise UserError(f"config.microbatches={config.microbatches} must be at most {MOST_MICROBATCHES}")
    if config.microbatches and config.batch_size % config.microbatches:
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be cut into config.microbatches={config.microbatches} equal "
            "parts; make batch_size a multiple"
        )
    _check_keep_best(config)
    warmup, decay = (_exact_steps(config, key) for key in ("schedule.warmup", "schedule.decay"))
    if warmup + (decay if config.schedule.kind == "wsd" else 0) > config.steps:
        what = "and config.schedule.decay " if config.schedule.kind == "wsd" else ""
        raise UserError(
            f"config.schedule.warmup={config.schedule.warmup:g} {what}take more than config.steps={config.steps}; "
            "write shares of the steps below 1, or fewer steps"
        )
    make_hyper(**config.optimizer.to_dict())
    shape = None
    if "-1" not in config.mesh:  # its size depends on the number of devices
        shape = hybrid(parse_mesh(config.mesh), config.fsdp.shard_size, config.fsdp.enabled)
    if config.init_from:  # its model will replace config.model
        return
    cfg = find_model(config)
    if shape is not None:
        _check_tp(config, cfg, shape.tp)


def _check_keep_best(config: ConfigDict) -> None:
    """A held-out metric chooses among checkpoints, so some steps before the last must both measure it and save."""
    keep, metric = config.checkpoint.keep_best, config.checkpoint.best_metric
    if not keep or not metric.startswith("val_"):
        return
    measured, saved = config.eval.every, config.checkpoint.every
    what = f"config.checkpoint.keep_best={keep} needs config.checkpoint.best_metric={metric}, but with "
    if not measured:
        raise UserError(f"{what}config.eval.every=0 that is measured only at the end; write config.eval.every=STEPS")
    if 0 < saved < config.steps and measured < config.steps <= math.lcm(measured, saved):
        raise UserError(
            f"{what}config.eval.every={measured} and config.checkpoint.every={saved} no step before the last of "
            f"config.steps={config.steps} both measures and saves; write config.checkpoint.every={measured}"
        )


def _check_tp(config: ConfigDict, cfg: ModelConfig, tp: int) -> None:
    if not _divides(cfg, tp):
        sizes = [n for n in divisors(cfg.num_attention_heads) if _divides(cfg, n)]
        raise UserError(
            f"config.mesh={config.mesh}: tp={tp} does not divide the model's {cfg.num_attention_heads} heads of "
            f"queries, {cfg.num_key_value_heads} of keys, widths and vocabulary; write in config.mesh "
            f"{nearest('tp', tp, sizes)} (tp may be {', '.join(map(str, sizes))})"
        )


def _divides(cfg: ModelConfig, tp: int) -> bool:
    widths = [cfg.num_attention_heads, cfg.vocab_size]
    widths += [cfg.intermediate_size] if cfg.dense_layers else []
    widths += [cfg.moe_intermediate_size] if cfg.sparse_layers else []
    keys = cfg.num_key_value_heads
    return all(width % tp == 0 for width in widths) and (keys % tp == 0 or tp % keys == 0)


def _check_number(key: str, value: Any) -> None:
    if type(value) not in (int, float):
        return
    bits = 32 if key in ROWS or (key.startswith("model.") and type(value) is int) else 63
    if not abs(value) < 2**bits:  # also refuses nan; first, because a huge int can't become a float
        raise UserError(f"config.{key}={str(value)[:40]}: write a finite number below 2^{bits}")
    if key in SECONDS and value > _LONGEST:
        raise UserError(f"config.{key} must be at most {_LONGEST:,} seconds, got {value}")
    if key in TRAINED and not COLDEST <= value <= HOTTEST:
        raise UserError(f"config.{key}={value}: write a number from {COLDEST:g} to {HOTTEST:g}, such as 1.0")
    low = 1 if key in POSITIVE else 0 if key in NOT_NEGATIVE or key in SHARES else -math.inf
    if value < low:
        raise UserError(f"config.{key} must be at least {low}, got {value}")
    if key in SHARES and value > 1:
        raise UserError(f"config.{key} must be a share from 0 to 1, got {value}")


def _values(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
