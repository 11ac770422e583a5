"""Tiny models in Hugging Face form: transformers' own, and directories that it wrote."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.utils.logging.disable_progress_bar()

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
CASES = {
    "tied": {"tie_word_embeddings": True},
    "untied, bias": {"attention_bias": True, "rope_theta": 1e6},
    "one kv head, gelu": {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_act": "gelu"},
    "yarn": {"rope_scaling": YARN, "rope_theta": 1e6},
    "yarn, every key": {"rope_scaling": {**YARN, "truncate": False, "attention_factor": 1.2, "beta_fast": 20.0}},
    "moe": {**EXPERTS, "norm_topk_prob": True},
    "moe, unnormalised, a dense layer": {**EXPERTS, "mlp_only_layers": [1]},
    "moe, every second layer": {**EXPERTS, "decoder_sparse_step": 2, "num_hidden_layers": 4},
}


def hf_model(case, dtype=torch.float32):
    """transformers' model of one of CASES, random in every parameter."""
    values = {**SIZES, **CASES[case]}
    moe = "num_experts" in values
    kind = transformers.Qwen3MoeConfig if moe else transformers.Qwen3Config
    model = (transformers.Qwen3MoeForCausalLM if moe else transformers.Qwen3ForCausalLM)(kind(**values)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.add_(0.1 * torch.randn_like(leaf))  # norms and biases leave their initial constants
    return model.to(dtype)


def tensors(directory):
    """Every tensor of a directory, read by the safetensors library."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def edit_config(directory, **changes):
    """Change keys of config.json; None-valued ones are written as null, `...` removes a key."""
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(directory, **changes):
    """Change tensors of model.safetensors, keys written with __ for dots; `...` removes one."""
    path = directory / "model.safetensors"
    values = load_file(path) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in values.items() if value is not ...}, path, {"format": "pt"})
