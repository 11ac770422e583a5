"""Attention of packed rows, document by document, with torch's attention on a CPU.

Scores between different documents are never computed; with a dense mask they would be. Only for uncompiled code,
because the host reads the number and lengths of the documents.

B rows · T positions of a row · H heads · d head_dim · n positions of several documents
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def can(x: Tensor) -> bool:
    """Whether the host can read this tensor's values: a plain tensor on the CPU, and not while compiling."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


class Run(NamedTuple):
    """`count` adjacent documents of `length` positions each; they may be in several rows."""

    count: int
    length: int


def runs_of(starts_BT: Tensor) -> tuple[Run, ...]:
    """All documents, row after row. starts_BT: for each position, the index in its row at which its document begins."""
    rows, length = starts_BT.shape
    first = starts_BT + torch.arange(rows, device=starts_BT.device)[:, None] * length
    lengths = torch.unique_consecutive(first.flatten(), return_counts=True)[1]
    alike = torch.unique_consecutive(lengths, return_counts=True)
    return tuple(Run(count, length) for length, count in zip(*(x.tolist() for x in alike), strict=True))


def attend(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor, runs: tuple[Run, ...], causal: bool) -> Tensor:
    """softmax(q kᵀ/√d) v within documents, [B, H, T, d]."""
    sizes = [run.count * run.length for run in runs]
    parts = (x.transpose(1, 2).flatten(0, 1).split(sizes) for x in (q_BHTd, k_BHTd, v_BHTd))
    out = [_alike(*part, run, causal) for *part, run in zip(*parts, runs, strict=True)]
    return torch.cat(out).unflatten(0, (len(q_BHTd), -1)).transpose(1, 2)


def _alike(q_nHd: Tensor, k_nHd: Tensor, v_nHd: Tensor, run: Run, causal: bool) -> Tensor:
    """Attention of a run's documents as one batch. In a document of one position the result is its value."""
    if run.length == 1:
        return v_nHd
    q, k, v = (x.unflatten(0, run).transpose(1, 2) for x in (q_nHd, k_nHd, v_nHd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(0, 1)
