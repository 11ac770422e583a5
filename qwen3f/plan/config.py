"""From a configuration to the Case that is planned: as setup reads it, but of cards that need not be here."""

import torch
from ml_collections import ConfigDict

from qwen3f.errors import UserError
from qwen3f.plan.case import Case, make_case
from qwen3f.plan.hardware import TABLE, Hardware, parse_hardware, this_card
from qwen3f.train.checks import check
from qwen3f.train.setup import setup_on


def from_config(config: ConfigDict) -> Case:
    """Raises UserError, naming key and value, for what make_setup refuses on any device."""
    check(config)
    hardware = find_hardware(config.hardware)
    setup = setup_on(config, torch.device("cuda"), hardware)
    read = setup.model, setup.optimizer, setup.execution, setup.layout, setup.compute_dtype, hardware
    return make_case(config, *read, setup.microbatches)


def find_hardware(text: str) -> Hardware:
    """What config.hardware names; `auto` is this machine's card, without one an H100. UserError for a card of unknown
    rates."""
    hardware = parse_hardware(text, this_card() or TABLE["h100"])
    if hardware.name not in TABLE:
        raise UserError(
            f"config.hardware={text}: of this machine's {hardware.name} no rates are known; write a card that is, "
            f"{' or '.join(TABLE)}, or with other numbers, as h100,peak=312e12,products=250e12,memory=79e9"
        )
    return hardware
