"""Checks the settings of all stages before the first one starts, so that none is refused when its turn comes.

    python -m qwen3f.pipeline.foresee '[{"name": "grpo", …}]'

Runs each stage's own checks, with the model that the stages before it will produce. They read no weights, and of the
data they only check that directories exist. The checks import torch, so they run in their own process: the pipeline's
process imports no torch.
"""

import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen3f import cli, usage
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.files import exists, user_path
from qwen3f.pipeline.chain import Step, in_pipeline
from qwen3f.pipeline.commands import EVAL
from qwen3f.pipeline.stages import MEASURE, differing
from qwen3f.train import checks

_TO_COME = "(of the pipeline)"  # stands for weights that an earlier stage will write
_WEIGHTS = ("dpo.reference", "online.reward_model", "judge.reward_model")  # keys for weights beside the stage's own
_DATA = {  # keys that may name directories; their form: several names with weights, several names, or one directory
    "data.mixture": "weights", "tasks": "weights", "benchmarks": "names", "eval.benchmarks": "names",
    "eval.task": "names", "online.task": "names", "data.root": "place", "data.tokenizer": "place",
}  # fmt: skip


def described(
    steps: Sequence[Step], names: Collection[str], questions: ConfigDict, directory: Path
) -> list[dict[str, Any]]:
    """The argument of `main`, ready for JSON: all steps that are not skipped, and the shared questions, if any.

    names: the steps to check; the others only pass their model on. directory: of the pipeline.
    """
    found = [
        {
            "name": step.name,
            "kind": step.kind,
            "experiment": step.stage.experiment,
            "overrides": step.overrides,
            "shared": step.shared,
            "follows": bool(step.source),
            "init_from": "" if step.source else step.config.get("init_from", ""),
            "workdir": str(directory / step.workdir),
            "looked_at": step.name in names,
        }
        for step in steps
        if not step.skipped
    ]
    if questions.benchmarks and any(step.asks for step in steps):
        own = {key: value for key, value in differing(questions, EVAL).items() if key != "init_from"}
        found.append(
            {"name": MEASURE, "kind": "evaluation", "experiment": EVAL, "overrides": own, "shared": [], "follows": True,
             "init_from": "", "workdir": "", "looked_at": True}
        )  # fmt: skip
    return found


def check(described_: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError, with the pipeline's flags, for the first stage whose own checks fail."""
    model: ConfigDict | None = None
    to_come: list[str] = []  # where earlier stages will write weights
    for one in described_:
        config = _config(one)
        try:
            if one["kind"] == "training":
                config = _with_model(config, model, one)
                if one["looked_at"]:
                    _check_training(config, to_come)
                    to_come.append(one["workdir"])
                model = config.model
            elif one["looked_at"]:
                _check_asking(config, model, to_come)
        except UserError as error:
            said = in_pipeline(str(error), one["name"], config, one["shared"])
            raise UserError(f"{one['name']}: {said}") from error


def _config(one: Mapping[str, Any]) -> ConfigDict:
    config = cli.load_experiment(str(usage.ROOT / one["experiment"]))
    for key, value in one["overrides"].items():
        tuples = isinstance(value, list) and isinstance(checks.get(config, key), tuple)
        config.update_from_flattened_dict({key: tuple(value) if tuples else value})
    if one["init_from"]:
        config.init_from = one["init_from"]
    return config


def _with_model(config: ConfigDict, model: ConfigDict | None, one: Mapping[str, Any]) -> ConfigDict:
    """`config` with the model of the weights that the stage will start from."""
    from qwen3f.train.inherit import inherit_from, inherit_model

    if one["follows"]:
        config = inherit_from(config, ModelConfig.from_dict(model.to_dict()), one["overrides"])
        config.init_from = _TO_COME
        return config
    return inherit_model(config, Path(one["workdir"]), one["overrides"])


def _check_training(config: ConfigDict, to_come: Collection[str]) -> None:
    from qwen3f.eval import hook
    from qwen3f.processes import ranks
    from qwen3f.train.choices import find_device
    from qwen3f.train.setup import make_setup
    from qwen3f.train.stage import find_stage

    _check_places(config, to_come)
    setup = make_setup(config, ranks.all_devices(os.environ, find_device(config.device).type))
    named = {key: place for key, place in usage.flat(config) if key in _WEIGHTS and place}
    if not any(_is_to_come(place, f"config.{key}", to_come) for key, place in named.items()):
        find_stage(config.stage).check(setup)
    hook.check(setup)


def _check_asking(config: ConfigDict, model: ConfigDict | None, to_come: Collection[str]) -> None:
    """The checks of an evaluation, or of questions about pictures."""
    from qwen3f.eval import run as evaluation
    from qwen3f.infer import run as generation
    from qwen3f.interop import source
    from qwen3f.processes import ranks
    from qwen3f.train.choices import find_device

    _check_places(config, to_come)
    devices = ranks.all_devices(os.environ, find_device(config.device).type)
    own = bool(config.init_from) or model is None
    cfg = source.read_model_config(config.init_from) if own else ModelConfig.from_dict(model.to_dict())
    config.init_from = config.init_from or _TO_COME
    if config.stage == "eval":
        evaluation.check(config, cfg)
        evaluation.find_mesh(config.mesh, devices)
    else:
        if not cfg.vision_enabled:
            raise UserError(
                "its model has no vision tower: keep a stage that trains one, write config.init_from=W, or add this "
                "stage to --config.skip"
            )
        config.prompt, config.images = "?", "picture"
        generation.check(config)
        generation.find_mesh(config, devices)
        generation.check_shown(config, cfg)


def _check_places(config: ConfigDict, to_come: Collection[str]) -> None:
    """Raises UserError if a key names data that does not exist."""
    from qwen3f.data.mixture import parse_weights

    for key, value in usage.flat(config):
        if not value or key not in _DATA:
            continue
        where, named = f"config.{key}", [f"@{value}"]  # one place alone
        if _DATA[key] == "weights":
            named = [name for name, _ in parse_weights(value, where)]
        elif _DATA[key] == "names":
            named = value.split(",")
        for place in (name.partition("@")[2].strip() for name in named):
            if place and not exists(user_path(place, where)) and not _is_to_come(place, where, to_come):
                raise UserError(f"{where}={value}: there is no {place}; name a directory that exists")


def _is_to_come(place: str, where: str, to_come: Collection[str]) -> bool:
    """Whether `place` does not exist yet, but an earlier stage will write it. where: as for user_path."""
    path = user_path(place, where).absolute()
    return not exists(path) and any(path.is_relative_to(Path(one).absolute()) for one in to_come)


def main(words: Sequence[str]) -> int:
    try:
        check(json.loads(words[0]))
    except UserError as error:
        return cli.report(error, 2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
