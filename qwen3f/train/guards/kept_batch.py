"""Saves the batch of a faulty step, with the rows of all ranks, in a file."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from qwen3f.processes.world import World
from qwen3f.train import workdir as W
from sharding.axes import Axes


def keep_batch(workdir: Path, step: int, batch: Mapping[str, Tensor], world: World, axes: Axes, parts: int) -> str:
    """Write a step's prepared batch, with the rows of all ranks in the global batch's order.

    Returns words for a message: "kept in" and the path; or "lost" and why the file could not be written (a full disk
    does not end the run). parts: number of micro-batches of the step; every rank has rows of each. All ranks call it
    together.
    """
    own = {key: value.cpu().numpy() for key, value in batch.items()}
    rank, ranks = axes.rows
    first = all(axes[name].index == 0 for name in ("pp", "cp", "tp"))  # one rank of those that have the same rows
    told = world.gather_bytes(rank.to_bytes(4) + W.to_npz(own) if first else b"") if world.size > 1 else []
    if not world.main:
        return "kept"
    if ranks > 1:
        shares = {int.from_bytes(content[:4]): dict(np.load(io.BytesIO(content[4:]))) for content in told if content}
        own = {key: _join([shares[r][key] for r in range(ranks)], parts) for key in own}
    try:
        return f"kept in {W.keep_batch(workdir, step, own)}"
    except OSError as error:
        return f"lost, because it could not be written ({error})"


def _join(shares: list[np.ndarray], parts: int) -> np.ndarray:
    """[B, …] in the global order, from the ranks' shares [B / ranks, …], which have their rows micro-batch by
    micro-batch."""
    if shares[0].ndim == 0:
        return shares[0]
    parts = parts if len(shares[0]) % parts == 0 else 1
    cut = np.stack([share.reshape(parts, -1, *share.shape[1:]) for share in shares], 1)
    return cut.reshape(-1, *shares[0].shape[1:])
