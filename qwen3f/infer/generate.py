"""Sampling from a model, one token at a time, by running the whole sequence again for each.

B batch · T prompt length · N new tokens · V vocabulary
"""

import torch
from torch import Tensor

from qwen3f import model, rng
from qwen3f.config import ModelConfig
from qwen3f.params import Params


@torch.no_grad()
def generate(
    cfg: ModelConfig, params: Params, tokens_BT: Tensor, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Tensor:
    """Continue prompts of one length: int64 [B, T] -> [B, T + N].

    temperature 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature) by the Gumbel-max trick with
    counter-based noise, so the result depends on the arguments alone.
    """
    batch, prompt = tokens_BT.shape
    # Room for the answer from the start: causal attention never sees it, and shapes stay the same.
    tokens = torch.nn.functional.pad(tokens_BT, (0, max_new_tokens))
    forward = model.make_forward(cfg)
    head = model.head_weight(cfg, params)
    place = torch.arange(batch * cfg.vocab_size, device=tokens.device).view(batch, cfg.vocab_size)
    for position in range(prompt, prompt + max_new_tokens):
        hidden = forward(params, {"tokens": tokens})[:, position - 1]
        logits = (hidden @ head.t()).to(torch.float32)
        if temperature > 0:
            uniform = rng.uniform(rng.key("generate", seed, position), place)
            logits = logits / temperature - torch.log(-torch.log(uniform.clamp(min=1e-7)))
        tokens[:, position] = logits.argmax(-1)
    return tokens
