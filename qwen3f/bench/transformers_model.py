"""Our weights in transformers' module of the same model."""

from typing import Any

import torch

from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.interop import keys
from qwen3f.interop.config import to_hf


def copied(cfg: ModelConfig, params: P.Params, attention: str = "sdpa") -> Any:
    """transformers' module with the weights `params`, on their device and in their dtype."""
    import transformers

    weight = params[P.EMBED]
    config = transformers.AutoConfig.for_model(**to_hf(cfg, weight.dtype))
    with torch.device(weight.device):
        module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=weight.dtype, attn_implementation=attention
        )
    tensors = {key: keys.fetch(slot, params) for key, slot in keys.slots(cfg).items()}
    missing, unknown = module.load_state_dict(tensors, strict=False)
    if unknown or set(missing) - {P.HEAD}:  # a tied head is the embedding
        raise ValueError(f"transformers' module lacks {unknown}, and has {missing}, which ours lacks")
    return module
