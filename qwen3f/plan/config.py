"""From a configuration to the Case that is planned: as setup reads it, but of cards that need not be here."""

import torch
from ml_collections import ConfigDict

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.plan.case import Case, make_case
from qwen3f.plan.hardware import TABLE, Hardware, parse_hardware, this_card
from qwen3f.train.choices import find_dtype, find_execution, find_layout
from qwen3f.train.hyper import make_hyper
from qwen3f.train.microbatches import check_evaluation, resolve


def from_config(config: ConfigDict) -> Case:
    """Raises UserError, naming key and value, for what cannot run on any device."""
    for key, low in (("batch_size", 1), ("microbatches", 0), ("seq_len", 1)):
        if config[key] < low:
            raise UserError(f"config.{key} must be at least {low}, got {config[key]}")
    cuda = torch.device("cuda")
    cfg, compute = ModelConfig.from_dict(config.model.to_dict()), find_dtype(config.dtype, cuda)
    layout = find_layout(config, None, compute)
    read = (
        cfg,
        make_hyper(**config.optimizer.to_dict()),
        find_execution(config, cuda),
        layout,
        compute,
        find_hardware(config.hardware),
    )
    microbatches = resolve(config, *read)
    case = make_case(config, *read, microbatches)
    check_evaluation(config, microbatches, layout.axes)
    return case


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
