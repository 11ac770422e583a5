"""The stages of a pipeline, and the configuration that experiments/pipeline.py makes from them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from qwen3f import cli, usage
from qwen3f.train import checks

MEASURE = "measure"  # section of config.set for the shared questions, which every checkpoint answers


@dataclasses.dataclass(frozen=True)
class PipelineStage:
    """One stage: an experiment that starts from the stage before it.

    Attributes:
        name: its name in --config.stages and --config.set.
        purpose: what it is for, in a plain sentence for tables and the report.
        experiment: "experiments/X.py[:preset]".
        seconds: its time budget, with the shared questions to its checkpoint (with config.overlap: to the checkpoints
            before it); 0: none. A stage that exceeds its budget is not stopped; the end of the pipeline says so.
    """

    name: str
    purpose: str
    experiment: str
    seconds: int = 0


Overrides = Mapping[str, Any]  # key with dots -> value


def pipeline_config(
    preset: str, stages: Sequence[tuple[PipelineStage, Overrides]], measure: Overrides, *, overlap: bool = False
) -> ConfigDict:
    """The configuration of a pipeline. config.set has the configuration of each stage, with its overrides.

    measure: overrides of experiments/eval.py for the shared questions.
    """
    config = ConfigDict()
    config.stage = "pipeline"
    config.preset = preset
    config.chain = tuple(stage for stage, _ in stages)  # PipelineStage objects, in order
    # Run only these stages, such as grpo,dpo. A stage that is done runs again: its old directory is moved aside, and
    # the results of later stages that came from it become stale. "": all stages that are not done.
    config.stages = ""
    config.skip = ""  # leave these stages out; a stage after them starts from the last stage before them
    config.seed = 0  # of every stage that does not set its own
    config.mesh = ""  # of every training stage; questions run on one device
    config.device = "auto"  # of every stage: auto, cpu or cuda
    config.plan = False  # only print what the mesh would do in each stage; needs no device
    config.hardware = "auto"  # the card that a plan is for
    config.overlap = overlap  # ask a checkpoint's questions while the next stage trains; the device must have room
    config.report = True  # keep report.html of all stages up to date; --config.set.STAGE.report is for a stage's own
    # Keys of each stage: --config.set.grpo.steps=10 does what --config.steps=10 does for that experiment alone.
    config.set = ConfigDict({stage.name: resolved(stage.experiment, overrides) for stage, overrides in stages})
    config.set[MEASURE] = resolved("experiments/eval.py", measure)
    return config


def resolved(experiment: str, overrides: Overrides) -> ConfigDict:
    """An experiment's configuration with some keys changed. It must have all of them."""
    config = cli.load_experiment(str(usage.ROOT / experiment))
    config.update_from_flattened_dict(dict(overrides))
    return config


def differing(config: ConfigDict, experiment: str) -> dict[str, Any]:
    """Key -> value for keys whose values differ from those of the experiment. A dict that replaces a single value, such
    as model.rope_scaling, counts as a value."""
    before = dict(usage.flat(resolved(experiment, {})))
    out = {}
    for key, value in usage.flat(config):
        while key not in before and "." in key:
            key = key.rpartition(".")[0]
            value = checks.get(config, key).to_dict()
        if value != before.get(key):
            out[key] = value
    return out
