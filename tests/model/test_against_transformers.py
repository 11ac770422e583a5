"""Logits and gradients against transformers' Qwen3 in fp32.

Tolerance 2e-5 on logits of about ±10: fp32 rounding of two different orders of summation; an independent
implementation of the same formulas differs from transformers by 0.8e-5 to 1.1e-5.
"""

import pytest
import torch
import transformers

from qwen3f import model, params
from qwen3f.config import ModelConfig
from qwen3f.train import losses
from qwen3f.transforms import grad_and_value

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "tied": {"tie_word_embeddings": True},
    "untied, bias": {"attention_bias": True},
    "one kv head": {"num_attention_heads": 5, "num_key_value_heads": 1},
    "no sharing": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "gelu": {"hidden_act": "gelu"},
    "yarn": {"rope_scaling": YARN},
    "yarn, no truncate, factor": {"rope_scaling": {**YARN, "truncate": False, "attention_factor": 1.2}},
    "theta 1e4": {"rope_theta": 1e4},
}


def build(changes):
    cfg = ModelConfig(
        **{
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 80,
            "vocab_size": 97,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            **changes,
        }
    )
    rope = {"rope_type": "default", **(changes.get("rope_scaling") or {}), "rope_theta": cfg.rope_theta}
    names = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "attention_bias",
    ]
    hf_config = transformers.Qwen3Config(
        **{n: getattr(cfg, n) for n in names}, rope_parameters=rope, attn_implementation="eager"
    )
    hf = transformers.Qwen3ForCausalLM(hf_config).eval()
    p = params.init_params(cfg, 7)
    p = {k: v + 0.1 * torch.randn_like(v) for k, v in p.items()}  # norms and biases off their initial constants
    with torch.no_grad():
        for name, leaf in hf.named_parameters():
            leaf.copy_(our_tensor(p, name))
    return cfg, p, hf


def our_tensor(tree, hf_name):
    if hf_name.startswith(params.LAYERS):
        index, rest = hf_name.removeprefix(params.LAYERS).split(".", 1)
        return tree[params.LAYERS + rest][int(index)]
    return tree[hf_name]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case):
    torch.manual_seed(0)
    cfg, p, hf = build(CASES[case])
    tokens = torch.randint(0, cfg.vocab_size, (2, 40))
    expected = hf(tokens)
    got = model.apply(cfg, p, {"tokens": tokens}).logits
    assert expected.logits.abs().max() > 3
    assert (got - expected.logits).abs().max() <= 2e-5

    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": torch.ones(2, 39)}
    grads, value = grad_and_value(losses.make_loss(cfg))(p, batch, losses.batch_weight(batch))
    loss = hf(tokens, labels=tokens).loss
    loss.backward()
    torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=0)
    for name, leaf in hf.named_parameters():
        ours = our_tensor(grads, name)
        assert (ours - leaf.grad).norm() <= 2e-5 * leaf.grad.norm(), name


def test_packed_documents_equal_transformers_restarting_positions():
    cfg, p, hf = build({})
    tokens = torch.randint(0, cfg.vocab_size, (1, 30))
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    segments = torch.tensor([[1] * 11 + [2] * 19], dtype=torch.int32)
    # transformers builds the block-diagonal mask itself when positions restart and no attention mask is given
    expected = hf(tokens, position_ids=positions, use_cache=False).logits
    got = model.apply(cfg, p, {"tokens": tokens, "positions": positions, "segments": segments}).logits
    assert (got - expected).abs().max() <= 2e-5


def test_l2_qk_norm_starts_where_rms_starts():
    cfg, _, _ = build({})
    tokens = torch.randint(0, cfg.vocab_size, (1, 12))
    a = model.apply(cfg, params.init_params(cfg, 0, dtype=torch.float64), {"tokens": tokens}).logits
    l2 = cfg.replace(qk_norm="l2", rms_norm_eps=cfg.rms_norm_eps)
    b = model.apply(l2, params.init_params(l2, 0, dtype=torch.float64), {"tokens": tokens}).logits
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # eps enters the two at different scales
    none = cfg.replace(qk_norm="none")
    assert "model.layers.self_attn.q_norm.weight" not in params.abstract_params(none)
    c = model.apply(none, params.init_params(none, 0, dtype=torch.float64), {"tokens": tokens}).logits
    assert (a - c).abs().max() > 1e-2
