"""transformers' Qwen3 and Qwen3-MoE models for tests, and their tensors in the form of our parameter table.

Written apart from qwen3f.interop on purpose: each checks the other.
"""

import torch
import transformers
from torch.overrides import TorchFunctionMode

from qwen3f import params
from qwen3f.config import ModelConfig

SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
SIZES += ["intermediate_size", "vocab_size", "max_position_embeddings"]
CONFIG = [*SIZES, "rms_norm_eps", "hidden_act", "tie_word_embeddings", "attention_bias"]
MOE_CONFIG = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"]


class Widen(TorchFunctionMode):
    """Inside, float64 wherever the code says float32: transformers writes float32 into its norms, softmax and RoPE."""

    def __torch_function__(self, fn, types, args=(), kwargs=None):
        if fn is torch.Tensor.float:
            fn = torch.Tensor.double
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return fn(*args, **kwargs)


def small_config(**changes) -> ModelConfig:
    """No two sizes equal, so that a transposed or misplaced tensor cannot fit."""
    return ModelConfig(**{**dict(zip(SIZES, (48, 3, 4, 2, 16, 80, 97, 64))), **changes})


def hf_model(cfg: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model with random weights that give logits of about ±10; norms and biases random too."""
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling is not None:
        rope |= {k: v for k, v in cfg.to_dict()["rope_scaling"].items() if v is not None}
    options = {name: getattr(cfg, name) for name in CONFIG} | {"rope_parameters": rope, "attn_implementation": "eager"}
    if cfg.num_experts:
        options |= {name: getattr(cfg, name) for name in MOE_CONFIG} | {"mlp_only_layers": list(cfg.mlp_only_layers)}
        config = transformers.Qwen3MoeConfig(**options, experts_implementation="eager")
        model = transformers.Qwen3MoeForCausalLM(config).eval()
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**options)).eval()
    g = torch.Generator().manual_seed(seed)
    for name, leaf in model.named_parameters():
        noise = torch.randn(leaf.shape, generator=g)
        if name.endswith("norm.weight"):
            leaf.data = (1 + 0.3 * noise).to(dtype)
        else:
            gain = 2.4 if name.startswith(("lm_head", "model.embed")) else 1.5
            leaf.data = (noise * gain / (leaf.shape[-1] ** 0.5 if leaf.dim() > 1 else 5)).to(dtype)
    model.tie_weights()
    return model


def from_hf(cfg: ModelConfig, tensors: dict[str, torch.Tensor]) -> params.Params:
    """Our stacked parameters from transformers' tensors by name (or gradients from gradients). Every tensor is used."""

    def one(layer: int, name: str) -> torch.Tensor:
        name = f"{params.LAYERS}{layer}.{name}"
        if ".experts." not in name:
            return tensors[name]
        block, kind = name.removesuffix("_proj.weight").rsplit(".", 1)
        if kind == "down":
            return tensors[f"{block}.down_proj"]
        gate, up = tensors[f"{block}.gate_up_proj"].split(cfg.moe_intermediate_size, dim=1)
        return gate if kind == "gate" else up

    out = {}
    for path, spec in params.abstract_params(cfg).items():
        name = path.removeprefix(params.LAYERS)
        out[path] = tensors[path] if spec.layers is None else torch.stack([one(i, name) for i in spec.layers])
    assert sum(x.numel() for x in out.values()) == sum(x.numel() for x in tensors.values())
    params.check_params(cfg, out)
    return out
