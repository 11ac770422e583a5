"""The stage export_hf: a workdir, a checkpoint or a Hugging Face directory, written as a Hugging Face directory."""

from pathlib import Path

import torch
from ml_collections import ConfigDict

from qwen3f.errors import UserError
from qwen3f.files import user_path
from qwen3f.interop import hf, source

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "stored": None}


def run(config: ConfigDict, workdir: Path, progress: bool = True) -> None:
    """Write the model at config.init_from, and its tokenizer, to config.out. The workdir is not used.

    Raises UserError, with nothing written, for a key that is missing or wrong and as qwen3f.interop.source and
    .hf do.
    """
    for key in ("init_from", "out"):
        if not config[key]:
            raise UserError(f"config.{key} is missing; write --config.{key}=DIR")
    if config.dtype not in DTYPES:
        raise UserError(f"config.dtype={config.dtype!r}: write one of {', '.join(DTYPES)}")
    if not config.max_shard_gb * 1e9 >= 1:
        raise UserError(f"config.max_shard_gb={config.max_shard_gb} is less than a byte; write a number such as 5.0")
    out = user_path(config.out, "config.out")
    hf.check_writable(out, f"--config.out={config.out}")
    tokenizer = source.read_tokenizer(config.init_from) if config.tokenizer else None
    cfg = source.read_model_config(config.init_from)
    params = source.read_params(config.init_from, cfg, "cpu", DTYPES[config.dtype])
    hf.check_finite(params)
    hf.save_pretrained(out, cfg, params, tokenizer, max_shard_bytes=int(config.max_shard_gb * 1e9))
    print(f"{config.init_from} -> {out}: {cfg.total_params_estimate():,} parameters, {config.dtype}", flush=True)
