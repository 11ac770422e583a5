"""From a configuration to the Case that is planned, for cards that this machine need not have."""

import dataclasses
import math

import torch
from ml_collections import ConfigDict

from qwen3f.errors import UserError
from qwen3f.eval import hook as benchmarks
from qwen3f.plan.case import Case, make_case
from qwen3f.plan.hardware import TABLE, Hardware, parse_hardware, this_card
from qwen3f.train.checks import MOST_MICROBATCHES, check
from qwen3f.train.setup import Setup, setup_on
from qwen3f.train.stage import find_stage


def from_config(config: ConfigDict) -> Case:
    """The Case of a configuration. Raises UserError, with key and value, for whatever a run's checks refuse."""
    check(config)
    hardware = find_hardware(config.hardware)
    setup = setup_on(config, torch.device("cuda"), hardware)
    find_stage(config.stage).check(_with_weights(setup))
    benchmarks.check(setup)
    read = setup.model, setup.optimizer, setup.execution, setup.layout, setup.compute_dtype, hardware
    case = make_case(config, *read, setup.microbatches)
    return _of_answers(config, case) if "rollout" in config else case


def _with_weights(setup: Setup) -> Setup:
    """The setup with a name in config.init_from: a plan need not have the weights that some stages start from, and
    their checks do not read them."""
    config = setup.config.copy_and_resolve_references()
    config.init_from = config.init_from or "W"
    return dataclasses.replace(setup, config=config)


def _of_answers(config: ConfigDict, case: Case) -> Case:
    """The case of one update of grpo. Its rows are packed from answers; planned is the largest number of rows, one per
    answer."""
    rows, ranks = config.rollout.microbatch_rows, case.mesh.dr * case.mesh.dp * case.mesh.ep
    most = math.ceil(config.batch_size * config.rollout.samples / (config.updates * rows * ranks))
    parts = case.microbatches * min(math.ceil(most / case.microbatches), MOST_MICROBATCHES // case.microbatches)
    return dataclasses.replace(
        case, batch_size=parts * rows * ranks, microbatches=parts, automatic=False, of_answers=True
    )


def find_hardware(text: str) -> Hardware:
    """The Hardware that config.hardware names. `auto` is this machine's card, or an H100 if it has none. UserError if
    that card's rates are not known."""
    hardware = parse_hardware(text, this_card() or TABLE["h100"])
    if hardware.name not in TABLE:
        raise UserError(
            f"config.hardware={text}: the rates of this machine's card, {hardware.name}, are not known; write "
            f"{' or '.join(TABLE)}, or one with changed numbers, e.g. h100,peak=312e12,products=250e12,memory=79e9"
        )
    return hardware
