"""Images and video in an engine's prompts: what they are, where they stand, and how the page pool tells them apart.

Two prompts with the same placeholders and other pixels must not share keys. So in a row's tokens a placeholder is a
number of its own, below zero, that follows from the pixels of its image and its place in it: pages are then found by
tokens, as those of words are.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwen3f.config import ModelConfig
from qwen3f.data.sources.documents import stable_hash
from qwen3f.errors import UserError
from qwen3f.vision.mrope import is_visual, merged_grids, next_position, position_ids, visual_index


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """A prompt's images and videos, in order: pixels float32 [N, patch values], grids int [n, 3], as
    vision.preprocess.image_patches and vision.video.video_patches give them, one behind the other."""

    pixels: Tensor
    grids: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[np.ndarray, Sequence[int]]]) -> "Pictures":
        """From (patches, grid) of each."""
        pixels = torch.from_numpy(np.concatenate([patches for patches, _ in parts]))
        return cls(pixels, torch.tensor([tuple(grid) for _, grid in parts]))


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Of a prompt of T tokens: tokens, placeholders as above; index int32 [T], see mrope.visual_index; rotary int64
    [3, T]; offset: what to add to the place of a token behind the prompt for its position on all three axes."""

    tokens: list[int]
    index: np.ndarray
    rotary: np.ndarray
    offset: int


def place(prompt: Sequence[int], pictures: Pictures | None, cfg: ModelConfig) -> Places:
    """Raises UserError where placeholders and features are not as many, or a placeholder ends the prompt."""
    tokens = torch.tensor([list(prompt)])
    grids = torch.zeros(1, 1, 3, dtype=torch.int64) if pictures is None else pictures.grids[None]
    rotary = position_ids(tokens, grids, cfg)
    if is_visual(tokens[:, -1:], cfg).any():
        raise UserError("a prompt ends within an image; write <|vision_end|> and what is asked behind it")
    index = visual_index(tokens, cfg)[0].numpy()
    keys = list(prompt)
    if pictures is not None:
        numbers = _numbers(pictures, cfg)
        for at in np.flatnonzero(index).tolist():
            keys[at] = numbers[index[at] - 1]
    return Places(keys, index, rotary[0].numpy(), int(next_position(rotary)) - len(keys))


def _numbers(pictures: Pictures, cfg: ModelConfig) -> list[int]:
    """A number below zero for each merged feature."""
    if pictures.pixels.shape[0] != int(pictures.grids.prod(-1).sum()):
        raise UserError(f"{pictures.pixels.shape[0]} patches are given for the grids {pictures.grids.tolist()}")
    out: list[int] = []
    done = 0
    features = merged_grids(pictures.grids[None], cfg)[0].prod(-1).tolist()
    for grid, count in zip(pictures.grids.tolist(), features):
        size = grid[0] * grid[1] * grid[2]
        pixels = pictures.pixels[done : done + size].to(torch.float32).contiguous().numpy()
        first = stable_hash(repr(grid).encode() + pixels.tobytes()) >> 2
        out += [-1 - (first + number) % 2**62 for number in range(count)]
        done += size
    return out


def vision_ids(cfg: ModelConfig) -> tuple[int, ...]:
    """What a model never writes: an image has its place in prompts alone."""
    if not cfg.vision_enabled:
        return ()
    return (cfg.image_token_id, cfg.video_token_id, cfg.vision_start_token_id, cfg.vision_end_token_id)
