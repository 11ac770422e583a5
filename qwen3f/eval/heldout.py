"""Validation: loss and bits per byte on the held-out split."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from qwen3f.data.cache.token_cache import TokenCache
from qwen3f.data.loader import ALL_ROWS, Share
from qwen3f.data.packing.concat import EvalCoverage, bits_per_byte, eval_coverage, eval_windows
from qwen3f.params import Params

EvalStep = Callable[[Params, dict[str, Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class HeldOut:
    """How held-out documents are read.

    Attributes:
        seq_len, batch_size: of the batches, over all ranks. vocab_size: the model's.
        max_docs: only the first so many documents of each source; 0: all.
        device: where the batches go. share: this rank's rows of each batch.
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
    """{"loss": nats a predicted token, "bpb": bits a byte of text}, over every held-out token once.

    Of several sources all together, and each as "loss/NAME" and "bpb/NAME". eval_step's sums are those of all ranks.
    See packing.concat.bits_per_byte for what is charged.
    """
    totals, own = {}, torch.from_numpy(options.share.rows(options.batch_size))
    for name, cache in heldout.items():
        nats = torch.zeros((), dtype=torch.float64, device=options.device)
        for batch in _batches(cache, options.seq_len, options.batch_size, options.max_docs or None):
            nats += eval_step(params, {k: v[own].to(options.device) for k, v in batch.items()})[0]
        totals[name] = (nats.item(), eval_coverage(cache, options.max_docs or None))
    coverages = [coverage for _, coverage in totals.values()]
    together = (sum(nats for nats, _ in totals.values()), EvalCoverage(*map(sum, zip(*map(astuple, coverages)))))
    out = _values(*together, options.vocab_size, "")
    for name, total in totals.items() if len(totals) > 1 else ():
        out |= _values(*total, options.vocab_size, f"/{name}")
    return out


def _values(nats: float, coverage: EvalCoverage, vocab_size: int, suffix: str) -> dict[str, float]:
    return {
        f"loss{suffix}": nats / max(coverage.predicted_tokens, 1),
        f"bpb{suffix}": bits_per_byte(nats, coverage, vocab_size),
    }


def _batches(heldout: TokenCache, seq_len: int, batch_size: int, max_docs: int | None) -> Iterator[dict[str, Tensor]]:
    """Batches of one shape: the last is filled up with rows that predict nothing."""
    windows = eval_windows(heldout, seq_len, max_docs)
    while rows := list(islice(windows, batch_size)):
        blank = {key: np.zeros_like(value) for key, value in rows[0].items()}
        rows += [blank] * (batch_size - len(rows))
        yield {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in blank}
