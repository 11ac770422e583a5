"""The help of launch.py: experiments, presets, and the most used keys. Imports no torch."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from qwen3f import presets
from qwen3f.files import exists, is_file

ROOT = Path(__file__).resolve().parents[1]  # where launch.py and experiments/ are

_HELP = ("help", "helpshort", "helpfull", "h", "?")

# The most used keys of training runs. All keys are in qwen3f/train/defaults.py and qwen3f/stages/configs.py.
COMMON = {
    "data.mixture": "embedded, reasoning, files@DIR, a data set's name with @DIR, or several with weights",
    "init_from": "start from these weights: a workdir, its checkpoints/N, or a Hugging Face directory",
    "steps": "training steps",
    "batch_size": "rows of a step, over all devices",
    "seq_len": "tokens of a row",
    "schedule.peak_lr": "learning rate",
    "optimizer.kind": "adamw or muon",
    "mesh": "devices by axis, such as dp4,tp2; empty: one device",
    "microbatches": "parts that a step's batch is split into; 0: chosen automatically",
    "model.gradient_checkpointing": "none, full or selective: recompute to save memory",
    "eval.every": "steps between evaluations",
    "checkpoint.every": "steps between checkpoints",
    "resume": "a step of the workdir to go back to, once; default: its last checkpoint",
    "plan": "True: only print what the mesh would do; needs no device",
    "device": "auto, cpu or cuda",
    "wandb": "off, offline or online",
}


def locate(argv: list[str]) -> list[str]:
    """The command line, where an experiment that is not here but beside launch.py gets its full path."""
    out = list(argv)
    for i, before, name in _experiments(argv):
        file, colon, argument = name.partition(":")
        if file and not exists(file) and is_file(ROOT / file):
            out[i] = f"{before}{ROOT / file}{colon}{argument}"
    return out


def asked(argv: list[str]) -> bool:
    """Whether the command line has a flag for help."""
    return any(argument.startswith("-") and argument.lstrip("-") in _HELP for argument in argv[1:])


def given(argv: list[str]) -> list[str]:
    """The values of all --config flags on the command line."""
    return [name for _, _, name in _experiments(argv)]


def experiments() -> dict[str, str]:
    """experiments/X.py -> the first line of its docstring."""
    files = sorted((ROOT / "experiments").glob("*.py"))
    return {str(path.relative_to(ROOT)): _description(path).splitlines()[0] for path in files}


def overview() -> str:
    """The text of --help."""
    lines = [
        "Runs an experiment: python launch.py --config experiments/X.py[:preset] [--workdir DIR] [--config.key=value …]"
    ]
    lines += ["", "experiments:", *_table(experiments())]
    lines += ["", f"presets (model sizes): {', '.join(presets.PRESETS)}"]
    lines += ["", "the most used keys of a training run:"]
    lines += _table({f"--config.{key}": meaning for key, meaning in COMMON.items()})
    lines += ["", "flags:"]
    lines += _table({
        "--workdir": "directory of the run; default: runs/ and the experiment's name",
        "--noprogress": "no progress bars, and only warnings in the log on stderr",
        "--config X --help": "the description of an experiment, and all of its keys",
    })  # fmt: skip
    lines += [
        "",
        "The same command again resumes from the workdir's last checkpoint. Wrong input ends with one line and exit",
        "code 2, a failed run with exit code 1. Begin with: python launch.py --config experiments/demo.py",
    ]
    return "\n".join(lines)


def of_experiment(name: str, config: ConfigDict) -> str:
    """The text of --config NAME --help: the experiment's docstring, and its keys with their values."""
    keys = sorted(f"--config.{key}={value!r}" for key, value in flat(config) if can_be_written(value))
    lines = [_description(Path(name.partition(":")[0])), ""]
    if "chain" in config:
        lines += ["stages, in order:", *_table({stage.name: stage.purpose for stage in config.chain}), ""]
    return "\n".join([*lines, "keys, with their values:", *(f"  {key}" for key in keys)])


def can_be_written(value: object) -> bool:
    """Whether a key with this value can be set on the command line."""
    return not isinstance(value, tuple) or all(isinstance(one, str | int | float) for one in value)


def launcher() -> str:
    """The path of launch.py as the user has written it, for commands that are printed."""
    return sys.argv[0] if Path(sys.argv[0]).name == "launch.py" else "launch.py"


def flat(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(key with dots, value) of every key that is not a section."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _experiments(argv: list[str]) -> Iterator[tuple[int, str, str]]:
    """(index in argv, text before the name in that argument, name) of each --config."""
    for i, argument in enumerate(argv[1:], 1):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            if equals:
                yield i, f"{flag}=", value
            else:
                yield i + 1, "", argv[i + 1] if i + 1 < len(argv) else ""


def _description(path: Path) -> str:
    try:
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8-sig"))) or path.stem
    except (OSError, ValueError, SyntaxError) as error:
        return f"cannot be read: {error}"


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {meaning}" for name, meaning in rows.items()]
