"""What a pipeline is: its stages in order, and the configuration that experiments/pipeline.py makes of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from qwen3f import cli, usage
from qwen3f.train import checks

MEASURE = "measure"  # under config.set, beside the stages: how every checkpoint is asked the same questions


@dataclasses.dataclass(frozen=True)
class PipelineStage:
    """One stage: an experiment that starts from the stage before it.

    Attributes:
        name: what --config.stages and --config.set name it.
        purpose: what it is for, a plain sentence for tables and the report.
        experiment: "experiments/X.py[:preset]".
        seconds: its budget, measures of its checkpoint included (with config.overlap of those before it); 0: none. A
            budget ends nothing; what exceeded its own is said at the end.
    """

    name: str
    purpose: str
    experiment: str
    seconds: int = 0


Overrides = Mapping[str, Any]  # key with dots -> value


def pipeline_config(
    preset: str, stages: Sequence[tuple[PipelineStage, Overrides]], measure: Overrides, *, overlap: bool = False
) -> ConfigDict:
    """The configuration of a pipeline. config.set holds each stage's own, its overrides applied.

    measure: of experiments/eval.py, for the questions that are asked of checkpoints.
    """
    config = ConfigDict()
    config.stage = "pipeline"
    config.preset = preset
    config.chain = tuple(stage for stage, _ in stages)  # of qwen3f.pipeline.stages.PipelineStage, in order
    # Names with commas. stages: run these alone; one that is done runs again, its old directory is moved aside, and
    # what came from it is stale. "": all that are not done yet. skip: leave these out, what follows starts before them.
    config.stages = ""
    config.skip = ""
    config.seed = 0  # of every stage that does not set its own
    config.mesh = ""  # of every training stage; questions are asked on one device
    config.device = "auto"  # of every stage: auto, cpu or cuda
    config.plan = False  # only say what the mesh would do in each stage; needs no device
    config.hardware = "auto"  # the card that a plan is for
    config.overlap = overlap  # ask a checkpoint's questions while the next stage runs, where a device has room for both
    config.report = True  # keep report.html, of all stages, written anew as they go; each stage's own is set below
    # The stages' own keys: --config.set.grpo.steps=10, as --config.steps=10 of that experiment alone.
    config.set = ConfigDict({stage.name: resolved(stage.experiment, overrides) for stage, overrides in stages})
    config.set[MEASURE] = resolved("experiments/eval.py", measure)
    return config


def resolved(experiment: str, overrides: Overrides) -> ConfigDict:
    """An experiment's configuration with keys changed, each of which it must have."""
    config = cli.load_experiment(str(usage.ROOT / experiment))
    config.update_from_flattened_dict(dict(overrides))
    return config


def differing(config: ConfigDict, experiment: str) -> dict[str, Any]:
    """Key -> value of what differs from the experiment by itself. A dict in the place of a value, such as
    model.rope_scaling, is a value too."""
    before = dict(usage.flat(resolved(experiment, {})))
    out = {}
    for key, value in usage.flat(config):
        while key not in before and "." in key:
            key = key.rpartition(".")[0]
            value = checks.get(config, key).to_dict()
        if value != before.get(key):
            out[key] = value
    return out
