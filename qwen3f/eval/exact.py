"""How often a model's greedy answer equals the held-out answer exactly, without generating anything.

A greedy decoder writes exactly the held-out answer iff each token of that answer is the most likely one after the
tokens before it. So one forward pass over held-out rows decides this for all their documents.

B rows · T places · S = T documents a row at most
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import model
from qwen3f.config import ModelConfig
from qwen3f.params import Params
from qwen3f.train.objective import document_sums

ExactFn = Callable[[Params, Mapping[str, Tensor]], Tensor]


def make_exact(cfg: ModelConfig, execution: model.Execution = model.EAGER) -> ExactFn:
    """exact(params, batch) -> bool [B, S]; entry k − 1: are all trained tokens of segment k the most likely ones?

    On one device. Also True for a segment that a row does not have, or in which nothing is trained.
    """
    cfg = cfg.replace(gradient_checkpointing="none")
    forward = model.make_forward(cfg, execution)

    @torch.no_grad()
    def exact(params: Params, batch: Mapping[str, Tensor]) -> Tensor:
        hidden, _ = forward(params, batch)
        likely = F.linear(hidden, model.head_weight(cfg, params)).argmax(-1)
        wrong = (likely != batch["targets"]) & (batch["loss_weights"] > 0)
        return document_sums(wrong.float(), batch["segments"], wrong.shape[1]) == 0

    return exact
