"""The command lines that a pipeline starts: launch.py with a stage's experiment and its flags."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen3f import usage
from qwen3f.pipeline.chain import Step, flags_of
from qwen3f.pipeline.process import Command
from qwen3f.pipeline.stages import differing

EVAL = "experiments/eval.py"
LAUNCHER = usage.ROOT / "launch.py"
FORESEE = ("-m", "qwen3f.pipeline.foresee")


def training(step: Step, init_from: str, workdir: Path, progress: bool) -> list[str]:
    more = [f"--config.init_from={init_from}"] if init_from else []
    return _launch(step.stage.experiment, [*flags_of(step.overrides), *more], workdir, progress)


def planning(step: Step, workdir: Path) -> list[str]:
    own = {key: value for key, value in step.overrides.items() if key != "device"}
    return _launch(step.stage.experiment, [*flags_of(own), "--config.plan=True"], workdir, True)


def foreseeing(described: list[dict[str, Any]]) -> Command:
    """The command that checks stages before they start. described: what foresee.described returns."""
    ways = os.pathsep.join([str(usage.ROOT), *filter(None, sys.path)])  # works from any current directory
    return Command([sys.executable, *FORESEE, json.dumps(described)], environment={"PYTHONPATH": ways})


def asking(config: ConfigDict, init_from: str, mode: str, workdir: Path) -> list[str]:
    """The command that asks a model questions. config: of experiments/eval.py. mode: thinking or plain."""
    own = {k: v for k, v in differing(config, EVAL).items() if k not in ("init_from", "thinking")}
    flags = [*flags_of(own), f"--config.init_from={init_from}", f"--config.thinking={mode == 'thinking'}"]
    return _launch(EVAL, flags, workdir, False)


def showing(step: Step, init_from: str, picture: Path, prompt: str, out: Path) -> list[str]:
    """The command that asks a model a question about a picture."""
    more: dict[str, Any] = {"init_from": init_from, "images": picture, "prompt": prompt, "out": out}
    return _launch(step.stage.experiment, flags_of({**step.overrides, **more}), out.parent, False)


def _launch(experiment: str, flags: list[str], workdir: Path, progress: bool) -> list[str]:
    quiet = [] if progress else ["--noprogress"]
    return [
        sys.executable,
        str(LAUNCHER),
        "--config",
        str(usage.ROOT / experiment),
        *flags,
        f"--workdir={workdir}",
        *quiet,
    ]
