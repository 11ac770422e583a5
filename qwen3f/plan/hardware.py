"""A plan's data about devices: rates, memory and how they are connected."""

import dataclasses
import difflib
import math
import re

import torch

from qwen3f.errors import UserError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device. Rates are per device, in FLOP/s or bytes/s, as large operators reach them in practice.

    peak: dense bf16 rate of the datasheet; MFU is relative to it. products: rate of matrix products. grouped: of the
    experts' grouped products. attention_forward, attention_backward: of causal attention, counting its 2 and 5 matrix
    products without the masked half. copy: memory bandwidth, bytes read plus written. memory: total bytes that torch
    reports for a card of that name (not the free ones). node: devices that fast links connect. link, network: what a
    device sends in collectives to devices of its node, and to other nodes. latency: seconds that a collective takes in
    addition to the time for its bytes.
    """

    name: str
    peak: float
    products: float
    grouped: float
    attention_forward: float
    attention_backward: float
    copy: float
    memory: float
    node: int
    link: float
    network: float
    latency: float


# H100 SXM5 80GB. peak: NVIDIA's datasheet. Measured on one such card (torch 2.11, Triton 3.6): products 690 to 800
# TFLOP/s, copy 3.0 TB/s, cuDNN's causal attention 544 and 428 TFLOP/s (H16 KV8 d128, T 4,096, B4), experts 14.8 TFLOP
# in 33.8 ms (30B-A3B, 4 layers, B4 T 4,096, forward and backward). memory: as torch reports it. link: NCCL's gather and
# scatter of 34 MB per rank between two H200s of a host, as in tp (208 and 201 GB/s; an all-to-all of 268 MB: 290).
# Assumed, not measured: network, 0.8 of a DGX H100's 400 Gb/s per GPU; latency.
_H100 = Hardware(
    name="h100",
    peak=989e12,
    products=700e12,
    grouped=440e12,
    attention_forward=544e12,
    attention_backward=428e12,
    copy=3.0e12,
    memory=79.1 * 2**30,
    node=8,
    link=200e9,
    network=0.8 * 50e9,
    latency=15e-6,
)
# H200 SXM: the H100's processor with other memory (datasheet: 141 GB, 4.8 TB/s). copy is assumed, not measured: about
# the same fraction of the datasheet's rate as on the H100.
_H200 = dataclasses.replace(_H100, name="h200", copy=4.3e12, memory=139.7 * 2**30)

TABLE: dict[str, Hardware] = {hardware.name: hardware for hardware in (_H100, _H200)}
_NAMES = ((r"NVIDIA H100 80GB HBM3", "h100"), (r"NVIDIA H200", "h200"))  # (name that CUDA reports, row); no MIG slices


def card(name: str, memory: int) -> Hardware:
    """The Hardware for a card with the name and the bytes of memory that CUDA reports.

    For an unknown card it has that name, the H100's rates (so only its memory is meaningful), and the memory rounded
    down to whole GiB, because it differs slightly between drivers.
    """
    row = next((row for pattern, row in _NAMES if re.fullmatch(pattern, name)), None)
    return TABLE[row] if row else dataclasses.replace(_H100, name=name, memory=float(memory >> 30 << 30))


def this_card() -> Hardware | None:
    """The Hardware of the current CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return card(found.name, found.total_memory)


def parse_hardware(text: str, auto: Hardware = _H100) -> Hardware:
    """Parse `h100`, or a row of the table with changed numbers: `h100,node=4,link=2e11`. The name `auto` stands for the
    argument `auto`. Raises UserError, with the wrong part.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name != "auto" and name not in TABLE:
        close = difflib.get_close_matches(name.lower(), TABLE, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"write auto or one of {', '.join(TABLE)}"
        raise UserError(f"config.hardware={text!r}: '{name}' is not in the table; {hint}")
    known = [field.name for field in dataclasses.fields(Hardware) if field.name != "name"]
    values: dict[str, float] = {}
    for part in changes:
        key, _, number = (x.strip() for x in part.partition("="))
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
            raise UserError(f"config.hardware={text!r}: unknown key '{key}'; {hint}")
        values[key] = _positive(text, key, number)
    if "node" in values:
        values["node"] = int(values["node"])
    return dataclasses.replace(auto if name == "auto" else TABLE[name], **values)


def _positive(text: str, key: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (key == "node" and value != int(value)):
        wanted = "a whole number of devices" if key == "node" else "a positive number"
        raise UserError(f"config.hardware={text!r}: {key}={number!r} is not {wanted}; write e.g. {key}=8")
    return value
