"""`--config.plan=True`: prints what a mesh would do in each stage that can be planned, and why others cannot."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.pipeline import commands
from qwen3f.pipeline.chain import Step, in_pipeline
from qwen3f.pipeline.process import Command, Signals

_SAMPLES = ("grpo", "dpo_online")  # stages in which every rank generates answers with a whole copy of the model


def run(config: ConfigDict, steps: Sequence[Step], directory: Path) -> None:
    """Prints a plan for each stage, made in its own process; pictures go to DIRECTORY/plan.

    Raises UserError, at the end, if no stage could be planned.
    """
    from qwen3f.plan.config import find_hardware  # imports torch

    find_hardware(config.hardware)  # an unknown card is an error at once, not for each stage
    planned, refused = list[str](), dict[str, str]()
    with Signals().caught() as signals:
        for step in steps:
            if step.skipped:
                continue
            print(f"--- {step.number} {step.name}: {step.stage.purpose}", flush=True)
            why = _not_planned(step)
            if not why:
                failure = signals.run(Command(commands.planning(step, directory / "plan" / step.workdir)))
                if signals.name:
                    return
                if failure:
                    why = in_pipeline(failure.error, step.name, step.config, step.shared) or f"exit code {failure.code}"
            if why:
                refused[step.name] = why
                print(f"not planned: {why}", flush=True)
            else:
                planned.append(step.name)
    if not planned:
        name, why = next(iter(refused.items()))
        raise UserError(f"no stage can be planned; {name}: {why}")
    print(f"planned: {', '.join(planned)}" + (f"; not: {', '.join(refused)}" if refused else ""), flush=True)


def _not_planned(step: Step) -> str:
    """Why a stage cannot be planned; "" if it can."""
    from qwen3f.plan.config import find_hardware

    if step.kind != "training":
        return "it does not train: each device answers its share of the questions with the whole model"
    if step.config.stage not in _SAMPLES:
        return ""
    cfg = ModelConfig.from_dict(step.config.model.to_dict())
    need = 2 * cfg.total_params_estimate()
    try:
        card = find_hardware(step.config.hardware)
    except UserError as error:
        return in_pipeline(str(error), step.name, step.config, step.shared)
    if need <= card.memory:
        return ""
    return (
        f"each rank answers with the whole model, {need / 2**30:,.0f} GiB in bfloat16, and a {card.name} has "
        f"{card.memory / 2**30:.0f}; a model of at most {card.memory / 2e9:.0f} billion parameters fits, or "
        f"--config.skip={step.name}"
    )
