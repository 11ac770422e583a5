"""Rewards that go wrong, each in its way, and some that do not."""

import math
import os
import sys
import time

import numpy as np

from qwen3f.rl.rewards import Sample
from qwen3f.sandbox.tiers import find_tier


def small_letters(sample: Sample) -> float:
    """The share of characters that are small letters: random text earns it unequally."""
    return sum("a" <= letter <= "z" for letter in sample.text) / max(1, len(sample.text))


def fine(sample: Sample) -> float:
    return float(len(sample.text))


def of_numpy(sample: Sample) -> np.floating | np.integer:
    return np.float32(0.5) if "raise" in sample.text else np.int64(2)


def sometimes(sample: Sample) -> float:
    if "raise" in sample.text:
        raise RuntimeError("on this one")
    return 1.0


def raises(sample: Sample) -> float:
    raise KeyError("gold")


def lines(sample: Sample) -> float:
    raise RuntimeError("one\ntwo")


def hangs(sample: Sample) -> float:
    while True:
        time.sleep(1)


def dies(sample: Sample) -> float:
    os._exit(0)


def says_nothing(sample: Sample) -> None:
    return None


def nan(sample: Sample) -> float:
    return math.nan


def text(sample: Sample) -> str:
    return "1.0"


def huge(sample: Sample) -> float:
    return 1e9


def shouts(sample: Sample) -> float:
    print('{"value": 1000}', flush=True)
    os.write(1, b'{"value": 1000}\n')
    return 0.5


def unconfined(sample: Sample) -> float:
    """Whether code would be run without a sandbox here."""
    return float(find_tier() == "none")


def verifier_is_loaded(sample: Sample) -> float:
    return float("qwen3f.tasks.verifier" in sys.modules)


number = 3


def picky(sample: Sample) -> float:
    if len(sample.text) % 2 == 0:
        raise RuntimeError("of even length")
    return 1.0
