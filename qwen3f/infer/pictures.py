"""Images and videos in an engine's prompts: their pixels, their positions, and how the page pool tells them apart.

Two prompts with the same placeholders but different pixels must not share keys. So each placeholder in a row's tokens
is replaced by a negative number, a hash of its image's pixels plus its place in the image. The page pool can then
compare images as it compares words, by tokens.
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
    """A prompt's images and videos, concatenated in order.

    pixels: float32 [N patches, values of a patch]. grids: int [n images, 3]. Both as vision.preprocess.image_patches
    and vision.video.video_patches give them.
    """

    pixels: Tensor
    grids: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[np.ndarray, Sequence[int]]]) -> "Pictures":
        """From (patches, grid) of each."""
        pixels = torch.from_numpy(np.concatenate([patches for patches, _ in parts]))
        return cls(pixels, torch.tensor([tuple(grid) for _, grid in parts]))


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Positions of a prompt of T tokens.

    tokens: the prompt, with placeholders replaced by negative numbers as above. index: int32 [T], see
    mrope.visual_index. rotary: int64 [3, T], rotary positions. offset: rotary position of a token after the prompt, the
    same on all three axes, minus its position in the row.
    """

    tokens: list[int]
    index: np.ndarray
    rotary: np.ndarray
    offset: int


def place(prompt: Sequence[int], pictures: Pictures | None, cfg: ModelConfig) -> Places:
    """The Places of a prompt. Raises UserError if the numbers of placeholders and features differ, or if a placeholder
    ends the prompt."""
    tokens = torch.tensor([list(prompt)])
    grids = torch.zeros(1, 1, 3, dtype=torch.int64) if pictures is None else pictures.grids[None]
    rotary = position_ids(tokens, grids, cfg)
    if is_visual(tokens[:, -1:], cfg).any():
        raise UserError("a prompt ends within an image; write <|vision_end|> and the question after it")
    index = visual_index(tokens, cfg)[0].numpy()
    keys = list(prompt)
    if pictures is not None:
        numbers = _numbers(pictures, cfg)
        for at in np.flatnonzero(index).tolist():
            keys[at] = numbers[index[at] - 1]
    return Places(keys, index, rotary[0].numpy(), int(next_position(rotary)) - len(keys))


def _numbers(pictures: Pictures, cfg: ModelConfig) -> list[int]:
    """A negative number for each merged feature, from a hash of its image's pixels and its place in the image."""
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


def check_pictures(pictures: Pictures, cfg: ModelConfig) -> None:
    """Raises UserError for pictures that this model cannot see."""
    if not cfg.vision_enabled:
        raise UserError(
            "a prompt has images, but the model no vision tower (model.vision_enabled=False); leave them out"
        )
    pixels, grids = pictures.pixels.shape, pictures.grids.shape
    if len(pixels) != 2 or len(grids) != 2 or grids[1] != 3:
        raise UserError(
            f"Pictures has pixels {list(pixels)} and grids {list(grids)}; give [patches, values] and [images, 3], or "
            "use Pictures.of"
        )
    if pixels[1] != cfg.vision_patch_values:
        raise UserError(
            f"Pictures has patches of {pixels[1]} values, but the model takes {cfg.vision_patch_values}; make the "
            "patches with the model's own config (image_patches)"
        )


def vision_ids(cfg: ModelConfig) -> tuple[int, ...]:
    """Ids that the engine never draws: images occur only in prompts."""
    if not cfg.vision_enabled:
        return ()
    return (cfg.image_token_id, cfg.video_token_id, cfg.vision_start_token_id, cfg.vision_end_token_id)
