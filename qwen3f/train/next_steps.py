"""The lines that a finished run prints: where its files are, and which commands to run next."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from qwen3f import presets, usage
from qwen3f.config import ModelConfig
from qwen3f.interop.source import FREE_FIELDS
from qwen3f.train import workdir as W

# Commands for Stage.next that several stages name.
ASK = '--config experiments/generate.py --config.init_from={workdir} --config.prompt="What is 17 + 25?"'
ASK_PICTURE = (
    "--config experiments/generate.py --config.init_from={workdir} --config.images=a.png "
    '--config.prompt="What is in the picture?"'
)
EXPORT = "--config experiments/export_hf.py --config.init_from={workdir} --config.out={workdir}-hf"


def next_steps(workdir: Path, cfg: ModelConfig, step: int, commands: Sequence[str]) -> list[str]:
    """The lines to print. step: the last checkpoint's. commands: as Stage.next."""
    there = [f"{W.CHECKPOINTS}/{step}", "metrics.jsonl", "tensorboard", W.CONFIG, W.TOKENIZER]
    fill = {"workdir": shlex.quote(str(workdir)), "preset": find_preset(cfg)}
    return [
        f"done at step {step}; in {workdir}: {', '.join(there)}",
        "what next:",
        *(f"  python {shlex.quote(usage.launcher())} {command.format(**fill)}" for command in commands),
        f"  tensorboard --logdir {shlex.quote(str(workdir / 'tensorboard'))}",
    ]


def find_preset(cfg: ModelConfig) -> str:
    """The name of the preset with the sizes of `cfg`; if there is none, of the nearest in size of those of its kind."""
    kinds = {name: presets.get(name) for name in presets.PRESETS if _kind(presets.get(name)) == _kind(cfg)}
    exact = next((name for name, other in kinds.items() if _sizes(other) == _sizes(cfg)), "")
    size = math.log(cfg.total_params_estimate())
    return exact or min(kinds, key=lambda name: abs(math.log(kinds[name].total_params_estimate()) - size))


def _kind(cfg: ModelConfig) -> tuple[bool, bool]:
    return cfg.vision_enabled, bool(cfg.sparse_layers)


def _sizes(cfg: ModelConfig) -> dict[str, object]:
    """What distinguishes presets. A reward model is of the preset of the model that it started from."""
    return {name: x for name, x in cfg.to_dict().items() if name not in FREE_FIELDS | {"scalar_head"}}
