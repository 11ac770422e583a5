"""DeepStack (arXiv:2406.04334): outputs of earlier layers of the tower, called taps, in two forms.

llm_inject, Qwen3-VL's form: each tap has its own merger and is added to the hidden states of the visual tokens after
one of the language model's first layers. vit_fuse: taps are added to the tower's last output, each through a LayerNorm
and a linear layer that starts at zero, so at the start of training the taps change nothing.

B rows · T places of a sequence · n this rank's tokens (sharding.tensor) · K merged features of a row · C tower width ·
D width of the language model
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3f.config import ModelConfig
from qwen3f.vision.vit import EPS
from sharding.axes import Axis
from sharding.collectives import shard


class Fusion(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(cfg.vision_hidden_size, EPS)
        self.linear = nn.Linear(cfg.vision_hidden_size, cfg.vision_hidden_size)

    def forward(self, x_BPC: Tensor) -> tuple[Tensor]:
        return (self.linear(self.norm(x_BPC)),)


class Features(NamedTuple):
    """The tower's output for the images of each row: merged [B, K, D], and taps, each [B, K, D], to be injected."""

    merged: Tensor
    taps: tuple[Tensor, ...]


class Visual(NamedTuple):
    """Features and their places in the sequence.

    there: bool [B, T, 1], whether a feature goes to this place. rows: int64 [B, T], its index in the features of all
    rows, flattened to [B·K]. With tp both hold this rank's tokens: [1, n, 1] and [1, n].
    """

    features: Features
    there: Tensor
    rows: Tensor


def place_features(features: Features, visual_index_BT: Tensor, tp: Axis) -> Visual:
    """The places of features. visual_index: 0 for a word, else 1 + the number of the feature in its row; with cp, this
    rank's part."""
    batch, each, _ = features.merged.shape
    first = torch.arange(batch, device=visual_index_BT.device)[:, None] * each
    there = visual_index_BT > 0
    rows = torch.where(there, visual_index_BT.to(torch.int64) - 1 + first, 0)
    if tp.size > 1 and not tp.whole:
        there, rows = (shard(x.flatten(), tp, 0)[None] for x in (there, rows))
    return Visual(features, there[..., None], rows)


def splice(x: Tensor, visual: Visual) -> Tensor:
    """Embedded tokens, where features replace their placeholders."""
    return torch.where(visual.there, _at(visual.features.merged, visual.rows).to(x.dtype), x)


def inject(x: Tensor, visual: Visual, layer: int) -> Tensor:
    """The hidden states after `layer`, plus the tap of this layer if it has one."""
    if layer >= len(visual.features.taps):
        return x
    return x + torch.where(visual.there, _at(visual.features.taps[layer], visual.rows).to(x.dtype), 0)


def _at(features_BKD: Tensor, rows: Tensor) -> Tensor:
    return F.embedding(rows, features_BKD.flatten(0, 1))
