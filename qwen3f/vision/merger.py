"""Merges neighbouring patches to tokens of the language model.

A block of m × m patches makes one token. The patches of a block are consecutive.

B rows · P patches · K = P/m² tokens · C tower width · D width of the language model
"""

import torch.nn.functional as F
from torch import Tensor, nn

from qwen3f.config import ModelConfig
from qwen3f.vision.vit import EPS


class MLPMerger(nn.Module):
    """Qwen3-VL's merger: concatenates the m² patches and applies two linear layers with a GELU between them.

    joined: LayerNorm over the concatenated patches (mergers of taps), else over each patch.
    """

    def __init__(self, cfg: ModelConfig, joined: bool) -> None:
        super().__init__()
        self.count = cfg.vision_merger_spatial_factor**2
        width = cfg.vision_hidden_size * self.count
        self.norm = nn.LayerNorm(width if joined else cfg.vision_hidden_size, EPS)
        self.linear_fc1 = nn.Linear(width, width)
        self.linear_fc2 = nn.Linear(width, cfg.hidden_size)
        self.joined = joined

    def forward(self, x_BPC: Tensor) -> tuple[Tensor]:
        if self.joined:
            x = self.norm(x_BPC.unflatten(1, (-1, self.count)).flatten(2))
        else:
            x = self.norm(x_BPC).unflatten(1, (-1, self.count)).flatten(2)
        return (self.linear_fc2(F.gelu(self.linear_fc1(x))),)


class PoolMerger(nn.Module):
    """The mean of the m² patches, through one layer."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.count = cfg.vision_merger_spatial_factor**2
        self.linear = nn.Linear(cfg.vision_hidden_size, cfg.hidden_size)

    def forward(self, x_BPC: Tensor) -> tuple[Tensor]:
        return (self.linear(x_BPC.unflatten(1, (-1, self.count)).mean(2)),)


def make_merger(cfg: ModelConfig, tap: bool) -> nn.Module:
    """The skeleton of the tower's merger or of a tap's, by cfg.vision_merger; x [B, P, C] -> ([B, K, D],)."""
    return MLPMerger(cfg, joined=tap) if cfg.vision_merger == "mlp" else PoolMerger(cfg)
