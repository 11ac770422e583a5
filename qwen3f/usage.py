"""What launch.py says of itself: experiments, presets, the keys that are used most. Imports no torch."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from qwen3f import presets
from qwen3f.files import exists, is_file

ROOT = Path(__file__).resolve().parents[1]  # where launch.py and experiments/ are

_HELP = ("help", "helpshort", "helpfull", "h", "?")

# What most people set, of any training run's keys; all of them are in qwen3f/train/defaults.py and stages/configs.py.
COMMON = {
    "data.mixture": "embedded, reasoning, files@DIR, a data set's name with @DIR, or several with weights",
    "init_from": "start from these weights: a workdir, its checkpoints/N, or a Hugging Face directory",
    "steps": "of training",
    "batch_size": "rows of a step, over all devices",
    "seq_len": "tokens of a row",
    "schedule.peak_lr": "learning rate",
    "optimizer.kind": "adamw or muon",
    "mesh": "devices by axis, such as dp4,tp2; empty: one",
    "microbatches": "parts that a step's batch is cut into; 0: chosen",
    "model.gradient_checkpointing": "none, full or selective: recompute to save memory",
    "eval.every": "steps between evaluations",
    "checkpoint.every": "steps between checkpoints",
    "resume": "a step of the workdir to go back to, once; else its last",
    "plan": "True: only say what the mesh would do, without devices",
    "device": "auto, cpu or cuda",
    "wandb": "off, offline or online",
}


def locate(argv: list[str]) -> list[str]:
    """The command line with an experiment that is not here, but beside launch.py, by its full path."""
    out = list(argv)
    for i, before, name in _experiments(argv):
        file, colon, argument = name.partition(":")
        if file and not exists(file) and is_file(ROOT / file):
            out[i] = f"{before}{ROOT / file}{colon}{argument}"
    return out


def asked(argv: list[str]) -> bool:
    """Whether the command line asks for help, before anything that is no flag."""
    return any(argument.startswith("-") and argument.lstrip("-") in _HELP for argument in argv[1:])


def given(argv: list[str]) -> list[str]:
    """What the command line gives as --config, however often."""
    return [name for _, _, name in _experiments(argv)]


def experiments() -> dict[str, str]:
    """experiments/X.py -> the first sentence of what it says of itself."""
    files = sorted((ROOT / "experiments").glob("*.py"))
    return {str(path.relative_to(ROOT)): _description(path).splitlines()[0] for path in files}


def overview() -> str:
    """The text of --help."""
    lines = [
        "Runs an experiment: python launch.py --config experiments/X.py[:preset] [--workdir DIR] [--config.key=value …]"
    ]
    lines += ["", "experiments:", *_table(experiments())]
    lines += ["", f"presets (model sizes): {', '.join(presets.PRESETS)}"]
    lines += ["", "keys that are used most, in a training run:"]
    lines += _table({f"--config.{key}": meaning for key, meaning in COMMON.items()})
    lines += ["", "flags:"]
    lines += _table({
        "--workdir": "directory of the run; default: runs/ and the experiment's name",
        "--noprogress": "no progress bars, and of log lines the warnings alone, on stderr",
        "--config X --help": "what this experiment is, and all of its keys",
    })  # fmt: skip
    lines += [
        "",
        "The same command again goes on from the workdir's last checkpoint. Wrong input ends with one line and exit",
        "code 2, a run that broke with exit code 1. Begin with: python launch.py --config experiments/demo.py",
    ]
    return "\n".join(lines)


def of_experiment(name: str, config: ConfigDict) -> str:
    """The text of --config NAME --help: the experiment's own words, and its keys with their values."""
    keys = sorted(f"--config.{key}={value!r}" for key, value in flat(config) if can_be_written(value))
    lines = [_description(Path(name.partition(":")[0])), ""]
    if "chain" in config:
        lines += ["stages, in order:", *_table({stage.name: stage.purpose for stage in config.chain}), ""]
    return "\n".join([*lines, "keys, with their values:", *(f"  {key}" for key in keys)])


def can_be_written(value: object) -> bool:
    """Whether a key with this value can be set on the command line."""
    return not isinstance(value, tuple) or all(isinstance(one, str | int | float) for one in value)


def launcher() -> str:
    """How the user has written launch.py, for commands that are printed."""
    return sys.argv[0] if Path(sys.argv[0]).name == "launch.py" else "launch.py"


def flat(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(key with dots, value) of every key that is no section."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _experiments(argv: list[str]) -> Iterator[tuple[int, str, str]]:
    """(place in argv, what stands before the name there, name) of each --config."""
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
