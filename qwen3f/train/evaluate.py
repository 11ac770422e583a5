"""Validation: loss and bits per byte on the held-out split."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from qwen3f.data.packing import bits_per_byte, eval_coverage, eval_windows
from qwen3f.data.token_cache import TokenCache
from qwen3f.params import Params

EvalStep = Callable[[Params, dict[str, Tensor]], tuple[Tensor, Tensor]]


def evaluate(
    eval_step: EvalStep,
    params: Params,
    heldout: TokenCache,
    *,
    seq_len: int,
    batch_size: int,
    vocab_size: int,
    max_docs: int,
    device: torch.device,
) -> dict[str, float]:
    """{"val_loss": nats a predicted token, "val_bpb": bits a byte of text}, over every held-out token once.

    max_docs: only the first so many documents (0: all). See packing.bits_per_byte for what is charged.
    """
    nats = torch.zeros((), dtype=torch.float64, device=device)
    weight = torch.zeros((), dtype=torch.float64, device=device)
    for batch in _batches(heldout, seq_len, batch_size, max_docs or None):
        part_nats, part_weight = eval_step(params, {k: v.to(device) for k, v in batch.items()})
        nats += part_nats
        weight += part_weight
    total = nats.item()
    coverage = eval_coverage(heldout, max_docs or None)
    return {"val_loss": total / max(weight.item(), 1.0), "val_bpb": bits_per_byte(total, coverage, vocab_size)}


def _batches(heldout: TokenCache, seq_len: int, batch_size: int, max_docs: int | None) -> Iterator[dict[str, Tensor]]:
    """Batches of one shape: the last is filled up with rows that predict nothing."""
    windows = eval_windows(heldout, seq_len, max_docs)
    while rows := list(islice(windows, batch_size)):
        blank = {key: np.zeros_like(value) for key, value in rows[0].items()}
        rows += [blank] * (batch_size - len(rows))
        yield {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in blank}
