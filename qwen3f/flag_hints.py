"""Hints for wrong flags: the key that was probably meant, the type of its value, and keys written as flags."""

import difflib
import re
from collections.abc import Sequence

from absl import flags

from qwen3f.errors import UserError

# Our key -> its names in other training programs, where a similar spelling would suggest a wrong key.
ALIASES = {
    "schedule.peak_lr": "lr learning_rate max_lr base_lr peak_learning_rate",
    "schedule.min_ratio": "min_lr lr_min final_lr",
    "schedule.warmup": "warmup_steps warmup_ratio num_warmup_steps lr_warmup_steps",
    "schedule.kind": "lr_scheduler lr_scheduler_type scheduler lr_schedule lr_decay_style",
    "steps": "max_steps num_steps train_steps training_steps total_steps train_iters max_iters iterations "
    "num_iterations num_train_epochs num_epochs epochs",
    "batch_size": "bs global_batch_size train_batch_size per_device_train_batch_size",
    "microbatches": "gradient_accumulation_steps grad_accum grad_accum_steps accumulation_steps micro_batch_size "
    "num_microbatches",
    "seq_len": "max_seq_len max_seq_length max_length seq_length sequence_length block_size context_length n_ctx",
    "seed": "random_seed rng_seed",
    "mesh": "tp dp pp cp ep tensor_parallel tensor_parallel_size pipeline_parallel_size tensor_model_parallel_size "
    "data_parallel_size world_size devices num_gpus",
    "dtype": "precision bf16 fp16 mixed_precision",
    "log_every": "logging_steps log_interval log_steps log_freq",
    "eval.every": "eval_steps eval_interval eval_freq",
    "checkpoint.every": "save_steps save_interval save_every ckpt_every checkpoint_interval save_freq",
    "checkpoint.keep": "save_total_limit keep_last",
    "resume": "resume_from_checkpoint resume_from resume_step",
    "init_from": "model_name_or_path pretrained pretrained_model load_from load ckpt model_path init_checkpoint",
    "optimizer.clip_norm": "max_grad_norm grad_clip clip_grad gradient_clip_val clip_grad_norm gradient_clipping",
    "optimizer.b1": "beta1 adam_beta1",
    "optimizer.b2": "beta2 adam_beta2",
    "optimizer.eps": "adam_eps adam_epsilon epsilon",
    "optimizer.weight_decay": "wd adam_weight_decay",
    "optimizer.kind": "optim",
    "data.mixture": "dataset datasets data_path dataset_name train_data train_file data_dir",
    "data.workers": "num_workers dataloader_num_workers",
    "model.num_hidden_layers": "n_layers n_layer num_layers layers depth",
    "model.hidden_size": "d_model dim n_embd hidden_dim embed_dim width model_dim",
    "model.num_attention_heads": "n_heads n_head num_heads heads",
    "model.num_key_value_heads": "n_kv_heads num_kv_heads num_query_groups kv_heads",
    "model.intermediate_size": "d_ff ffn_dim ffn_hidden_size mlp_dim ff_dim",
    "model.vocab_size": "n_vocab padded_vocab_size vocab",
    "model.rope_theta": "rope_base rotary_base theta rope_freq_base",
    "model.max_position_embeddings": "max_positions max_context context_window",
    "model.gradient_checkpointing": "remat activation_checkpointing activation_checkpoint recompute ac",
    "model.attention_dropout": "dropout",
}
_BY_NAME = {name: key for key, names in ALIASES.items() for name in names.split()}
_PARSERS = {
    int: (flags.IntegerParser(), "a whole number"),
    float: (flags.FloatParser(), "a number"),
    bool: (flags.BooleanParser(), "True or False"),
}
_MOST = 12  # keys in a list, at most


def hint(name: str, known: Sequence[str]) -> str:
    """A hint for the unknown `name`: one of `known` to write instead. Names look like "config.optimizer.kind".

    The last part of a name is compared first, since people forget sections. If several keys have the same last part,
    such as steps, the one most similar to the whole name is taken.
    """
    inside = [key for key in known if key.startswith(f"{name}.")]
    if inside:
        kind = next((key for key in inside if key.endswith((".kind", ".mixture"))), "")
        return f"{name} is a section; {f'did you mean {kind}? It' if kind else 'it'} has {_listed(inside)}"
    parent, _, last = name.rpartition(".")
    if parent in known:
        return f"{parent} is one value: write --{parent}=…, as in experiments, with {last!r} inside if it is a dict"
    if (alias := f"config.{_BY_NAME.get(last)}") in known:
        return f"did you mean {alias}?"
    lasts = [key.rpartition(".")[2] for key in known]
    close = difflib.get_close_matches(last, lasts, n=1, cutoff=0.75) or [part for part in lasts if last in part]
    if close:
        alike = [key for key, part in zip(known, lasts) if part == close[0]]
        return f"did you mean {difflib.get_close_matches(name, alike, n=1, cutoff=0.0)[0]}?"
    section = [key for key in known if name.count(".") > 1 and key.startswith(name.rpartition(".")[0] + ".")]
    if section:
        return f"known there: {_listed(section)}"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {_listed(list(dict.fromkeys(_short(key) for key in known)))}"


def check_value(flag: str, value: str, kind: type) -> None:
    """Raises UserError unless `value` can be parsed as the type of its key."""
    parser, words = _PARSERS.get(kind, (None, ""))
    try:
        if parser is not None:
            parser.parse(value)
    except (ValueError, TypeError):
        raise UserError(f"--{flag}={value}: write {words}") from None


def as_flags(text: str, keys: Sequence[str]) -> str:
    """`text`, where flags replace keys: "data.packing" and "config.steps" become --config.data.packing and so on."""
    longest_first = sorted(keys, key=len, reverse=True)
    every = "|".join(map(re.escape, longest_first))
    dotted = "|".join(re.escape(key) for key in longest_first if "." in key) or "(?!)"
    return re.sub(rf"(?<![\w./-])(?:config\.({every})|({dotted}))(?![\w-]|\.\w)", r"--config.\1\2", text)


def _short(key: str) -> str:
    """The section of a key, such as "config.data.…"."""
    first, dot, rest = key.partition(".")
    section, below, _ = rest.partition(".")
    return f"{first}{dot}{section}.…" if below else key


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _MOST} more (--help lists all)" if len(keys) > _MOST else ""
    return ", ".join(keys[:_MOST]) + more
