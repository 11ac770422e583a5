"""Vision in the engine: features of the pictures in a prefill pass, whose chunks may begin or end within an image.

B rows of the pass · T tokens of a chunk · K features of the row that has the most · D width
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.infer.request import Row
from qwen3f.infer.scheduler import Chunk
from qwen3f.model.transformer import make_outer
from qwen3f.vision.deepstack import Features
from qwen3f.vision.tower import make_tower
from sharding.layout import ONE_DEVICE


class Sight:
    """Runs the vision tower for rows with pictures.

    The tower runs when the first token of a row's pictures is prefilled; its output is kept until the last one is. If
    all these tokens are found in shared pages, the tower does not run. If a row has lost its pages, it runs again.
    """

    def __init__(self, cfg: ModelConfig, execution: model.Execution) -> None:
        self._cfg = cfg.replace(gradient_checkpointing="none")
        self._tower = make_tower(self._cfg, execution.attention, "off")
        self._outer = make_outer(self._cfg, ONE_DEVICE)
        self._invariant = execution.invariant

    def look(
        self, params: P.Params, batch: Mapping[str, np.ndarray], chunks: Sequence[Chunk]
    ) -> tuple[dict[str, np.ndarray], Features | None]:
        """(the batch with rotary [B, 3, T] and visual_index [B, T], and image_token_id as the id of placeholders;
        features of its rows, or None if no token belongs to a picture)."""
        rows, width = len(chunks), batch["tokens"].shape[1]
        rotary, index = np.zeros((rows, 3, width), np.int64), np.zeros((rows, width), np.int32)
        for number, chunk in enumerate(chunks):
            places, here = chunk.row.places, slice(chunk.start, chunk.start + chunk.count)
            known = places.index[here]
            index[number, : len(known)] = known
            rotary[number, :, : chunk.count] = np.arange(chunk.start, chunk.start + chunk.count) + places.offset
            rotary[number, :, : len(known)] = places.rotary[:, here]
        tokens = np.where(index > 0, self._cfg.image_token_id, batch["tokens"])
        batch = {**batch, "tokens": tokens, "rotary": rotary, "visual_index": index}
        seen = [self._features(params, chunk.row) if index[n].any() else None for n, chunk in enumerate(chunks)]
        for chunk in chunks:
            if not chunk.row.places.index[chunk.start + chunk.count :].any():
                chunk.row.features = None  # frees some megabytes for each picture
        return batch, _joined([features for features in seen if features is not None], seen)

    @torch.no_grad()
    def _features(self, params: P.Params, row: Row) -> Features:
        if self._invariant:
            raise UserError("model.INVARIANT is for prompts without images; use another execution")
        if row.features is None:
            pictures, device = row.request.pictures, params[P.EMBED].device
            pixels, grids = (x[None].to(device) for x in (pictures.pixels, pictures.grids))
            row.features = self._tower(self._outer(params), pixels, grids)
        return row.features


def _joined(known: Sequence[Features], rows: Sequence[Features | None]) -> Features | None:
    """Features of all rows, [B, K, D]; zeros where a row has none. None if no row has any."""
    if not known:
        return None
    most = max(features.merged.shape[1] for features in known)

    def together(parts: Sequence[Tensor | None]) -> Tensor:
        like = next(part for part in parts if part is not None)
        blank = like.new_zeros(1, most, like.shape[2])
        return torch.cat([blank if x is None else F.pad(x, (0, 0, 0, most - x.shape[1])) for x in parts])

    merged = together([None if features is None else features.merged for features in rows])
    taps = [
        together([None if features is None else features.taps[number] for features in rows])
        for number in range(len(known[0].taps))
    ]
    return Features(merged, tuple(taps))
