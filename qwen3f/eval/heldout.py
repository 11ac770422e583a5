"""Validation: loss and bits per byte on the held-out split."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from qwen3f.data.cache.token_cache import TokenCache
from qwen3f.data.loader import ALL_ROWS, Share
from qwen3f.data.packing.concat import (
    IGNORED_TARGET,
    EvalCoverage,
    Example,
    bits_per_byte,
    eval_coverage,
    eval_windows,
)
from qwen3f.params import Params

EvalStep = Callable[[Params, dict[str, Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class HeldOut:
    """How held-out documents are read.

    Attributes:
        seq_len, batch_size: of the batches, over all ranks. vocab_size: the model's.
        max_docs: read only the first max_docs documents of each source; 0: all.
        device: where the batches go. share: which rows of each batch this rank computes.
    """

    seq_len: int
    batch_size: int
    vocab_size: int
    max_docs: int
    device: torch.device
    share: Share = ALL_ROWS


def evaluate(
    eval_step: EvalStep, params: Params, heldout: Mapping[str, TokenCache], options: HeldOut
) -> dict[str, float]:
    """{"loss": nats per predicted token, "bpb": bits per byte of text}, over every held-out token once.

    For several sources: over all of them, and for each as "loss/NAME" and "bpb/NAME". eval_step must return sums over
    all ranks. `packing.concat.bits_per_byte` says what bpb counts.
    """
    totals, own = {}, torch.from_numpy(options.share.rows(options.batch_size))
    for name, cache in heldout.items():
        nats = torch.zeros((), dtype=torch.float64, device=options.device)
        windows = eval_windows(cache, options.seq_len, options.max_docs or None)
        for batch in batches_of_one_shape(windows, options.batch_size):
            nats += eval_step(params, {k: v[own].to(options.device) for k, v in batch.items()})[0]
        totals[name] = (nats.item(), eval_coverage(cache, options.max_docs or None))
    coverages = [coverage for _, coverage in totals.values()]
    together = (sum(nats for nats, _ in totals.values()), EvalCoverage(*map(sum, zip(*map(astuple, coverages)))))
    out = _values(*together, options.vocab_size, "")
    for name, total in totals.items() if len(totals) > 1 else ():
        out |= _values(*total, options.vocab_size, f"/{name}")
    return out


def batches_of_one_shape(rows: Iterable[Example], size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` rows each; the last is filled up with rows of targets -100 and weights 0."""
    rest = iter(rows)
    while part := list(islice(rest, size)):
        blank = {key: np.full_like(value, IGNORED_TARGET if key == "targets" else 0) for key, value in part[0].items()}
        part += [blank] * (size - len(part))
        yield {key: torch.from_numpy(np.stack([row[key] for row in part])) for key in blank}


def _values(nats: float, coverage: EvalCoverage, vocab_size: int, suffix: str) -> dict[str, float]:
    return {
        f"loss{suffix}": nats / max(coverage.predicted_tokens, 1),
        f"bpb{suffix}": bits_per_byte(nats, coverage, vocab_size),
    }
