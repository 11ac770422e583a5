"""What a plan knows of the devices: rates, memory and how they are joined."""

import dataclasses
import difflib
import math
import re

import torch

from qwen3f.errors import UserError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device. Rates are a device's, in FLOP/s or bytes/s, at what large operators reach in practice.

    peak: dense bf16 of the datasheet, which MFU is counted against. products: matrix products; grouped: those of
    experts. attention_forward, attention_backward: causal attention, of the 2 and the 5 products it needs, the mask's
    half left out. copy: memory, read plus written. memory: nominal, in bytes: what torch finds on a card of that name,
    never what is free on one. node: devices that links join. link, network: what a device sends to others of its node,
    and beyond it, in collectives. latency: seconds a collective takes beside its bytes.
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
# in 33.8 ms (30B-A3B, 4 layers, B4 T 4,096, forward and backward). memory: what torch finds. link: NCCL's gather and
# scatter between two H200s of a host, of 34 MB a rank, as tp has them (208 and 201 GB/s; an all-to-all of 268 MB 290).
# Not measured, assumed: network at 0.8 of DGX H100's 400 Gb/s a GPU; latency.
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
# H200 SXM: the H100's processor with other memory (datasheet: 141 GB, 4.8 TB/s, of which the H100's share is assumed).
_H200 = dataclasses.replace(_H100, name="h200", copy=4.3e12, memory=139.7 * 2**30)

TABLE: dict[str, Hardware] = {hardware.name: hardware for hardware in (_H100, _H200)}
_NAMES = ((r"NVIDIA H100 80GB HBM3", "h100"), (r"NVIDIA H200", "h200"))  # of cards, as CUDA gives them; no MIG slice


def card(name: str, memory: int) -> Hardware:
    """The card that CUDA gives this name and so many bytes: a row of the table, or one with the card's own name.

    That one's memory is rounded down to whole GiB, since drivers differ in a little of it; its rates are the H100's, so
    only its memory is of use.
    """
    row = next((row for pattern, row in _NAMES if re.fullmatch(pattern, name)), None)
    return TABLE[row] if row else dataclasses.replace(_H100, name=name, memory=float(memory >> 30 << 30))


def this_card() -> Hardware | None:
    """That of the current CUDA device; None where there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return card(found.name, found.total_memory)


def parse_hardware(text: str, auto: Hardware = _H100) -> Hardware:
    """`h100`, or a row of the table with other numbers: `h100,node=4,link=2e11`; `auto` is the row given.

    Raises UserError, naming the part.
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
