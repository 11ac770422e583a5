"""The batch of a step that went wrong, from all ranks, in a file."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from qwen3f.processes.world import World
from qwen3f.train import workdir as W
from sharding.axes import Axes


def keep_batch(workdir: Path, step: int, batch: Mapping[str, Tensor], world: World, axes: Axes, parts: int) -> str:
    """Write a step's batch, as it was prepared, with the rows of all ranks in the batch's order.

    Returns the words "kept in" and where; or, as a full disk is no reason to end a run that passes such steps over, why
    it could not be kept.

    parts: micro-batches of a step, each of which the ranks share. All ranks call it together.
    """
    own = {key: value.cpu().numpy() for key, value in batch.items()}
    rank, ranks = axes.rows
    first = all(axes[name].index == 0 for name in ("pp", "cp", "tp"))  # of the ranks with the same rows
    told = world.gather_bytes(rank.to_bytes(4) + W.to_npz(own) if first else b"") if world.size > 1 else []
    if not world.main:
        return "kept"
    if ranks > 1:
        shares = {int.from_bytes(content[:4]): dict(np.load(io.BytesIO(content[4:]))) for content in told if content}
        own = {key: _join([shares[r][key] for r in range(ranks)], parts) for key in own}
    try:
        return f"kept in {W.keep_batch(workdir, step, own)}"
    except OSError as error:
        return f"which could not be kept ({error})"


def _join(shares: list[np.ndarray], parts: int) -> np.ndarray:
    """[B, …] from the ranks' [B / ranks, …], each of which has its rows of one micro-batch after another."""
    if shares[0].ndim == 0:
        return shares[0]
    parts = parts if len(shares[0]) % parts == 0 else 1
    cut = np.stack([share.reshape(parts, -1, *share.shape[1:]) for share in shares], 1)
    return cut.reshape(-1, *shares[0].shape[1:])
