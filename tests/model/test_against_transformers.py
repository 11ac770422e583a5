"""Logits and gradients against transformers' Qwen3 and Qwen3-MoE, on random weights with logits of about ±10.

fp32: max|Δlogits| ≤ 2e-5, the rounding of two orders of summation (an independent implementation of the same formulas
differs from transformers by 0.8e-5 to 1.1e-5). Gradients ≤ 5e-6 by norm, the project's bound for equality in fp32.
float64: 1e-12 for both. transformers casts to float32 inside norms, softmax and RoPE, which alone costs 5e-6; here it
runs under a mode that makes those casts float64.
"""

import contextlib
import copy

import pytest
import torch

from qwen3f import model, params
from qwen3f.errors import UserError
from qwen3f.model.rope import rope_tables
from qwen3f.train import losses
from qwen3f.train.objective import batch_weight
from qwen3f.transforms import grad_and_value
from tests.model.hf_params import Widen, from_hf, hf_model, small_config

# Batches are 40 long, beyond the original context of 16. θ and the betas put the ends of YaRN's ramp between two pairs
# of dimensions, so that truncate makes a difference.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 1.5}
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}


def heads(q, kv):
    return {"num_attention_heads": q, "num_key_value_heads": kv}


CASES = {
    "untied, heads 4/2": {},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True},
    "heads 3/1": heads(3, 1),
    "heads 5/5": heads(5, 5),
    "heads 7/1": heads(7, 1),
    "heads 9/3, bias, tied": {**heads(9, 3), "attention_bias": True, "tie_word_embeddings": True},
    "heads 8/1": heads(8, 1),
    "heads 16/1": heads(16, 1),
    "head_dim 6": {"head_dim": 6},
    "gelu": {"hidden_act": "gelu"},
    "theta 1e4, eps 1e-5": {"rope_theta": 1e4, "rms_norm_eps": 1e-5},
    "yarn": {"rope_theta": 100.0, "rope_scaling": YARN},
    "yarn, no truncate": {"rope_theta": 100.0, "rope_scaling": {**YARN, "truncate": False}},
    "yarn, no truncate, factor, beta": {
        "rope_theta": 100.0,
        "rope_scaling": {**YARN, "truncate": False, "attention_factor": 1.2, "beta_slow": 0.5},
    },
    "yarn, real theta": {"rope_scaling": {**YARN, "beta_fast": 32.0}},
    "moe": MOE,
    "moe, raw probabilities": {**MOE, "norm_topk_prob": False},
    "moe, top 1": {**MOE, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "moe, every expert": {**MOE, "num_experts_per_tok": 6},
    "moe, mlp_only_layers": {**MOE, "mlp_only_layers": (0, 2)},
    "moe, every second layer, bias": {**MOE, "decoder_sparse_step": 2, "attention_bias": True, "num_hidden_layers": 4},
    "moe, tied, yarn, heads 3/1": {**MOE, **heads(3, 1), "tie_word_embeddings": True, "rope_scaling": YARN},
    "moe, many experts": {**MOE, "num_experts": 40, "num_experts_per_tok": 2, "decoder_sparse_step": 3},
}
PRECISIONS = pytest.mark.parametrize(
    "dtype, logit_tolerance, grad_tolerance",
    [(torch.float32, 2e-5, 5e-6), (torch.float64, 1e-12, 1e-12)],
    ids=["fp32", "float64"],
)


def precision(dtype):
    return Widen() if dtype == torch.float64 else contextlib.nullcontext()


def our_params(cfg, hf):
    return from_hf(cfg, {name: leaf.detach() for name, leaf in hf.named_parameters()})


@PRECISIONS
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, dtype, logit_tolerance, grad_tolerance):
    cfg = small_config(**CASES[case])
    tokens = torch.randint(0, cfg.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with precision(dtype):
        hf = hf_model(cfg, dtype=dtype)
        expected = hf(tokens, labels=tokens)
    expected.loss.backward()
    p = our_params(cfg, hf)
    got = model.apply(cfg, p, {"tokens": tokens}).logits
    assert got.dtype == expected.logits.dtype == dtype
    assert 6 < expected.logits.abs().max() < 25
    assert (got - expected.logits).abs().max() <= logit_tolerance

    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": torch.ones(2, 39, dtype=dtype)}
    grads, value = grad_and_value(losses.make_loss(cfg))(p, batch, batch_weight(batch))
    torch.testing.assert_close(value, expected.loss.detach(), rtol=grad_tolerance, atol=0)
    theirs = from_hf(cfg, {name: leaf.grad for name, leaf in hf.named_parameters()})
    for path, grad in grads.items():
        for ours, hers in zip(rows(path, grad), rows(path, theirs[path]), strict=True):
            assert (ours - hers).norm() <= grad_tolerance * hers.norm(), path


def rows(path, leaf):
    """A stacked leaf layer by layer: a small layer's error must not hide behind a large one's size."""
    return leaf.unbind(0) if path.startswith(params.LAYERS) else [leaf]


def test_the_yarn_cases_differ():
    cases = [small_config(**changes) for name, changes in CASES.items() if name.startswith("yarn")]
    tables = [rope_tables(cfg, torch.arange(40)[None], torch.float64)[0] for cfg in cases]
    for i, a in enumerate(tables):
        assert all((a - b).abs().max() > 1e-2 for b in tables[:i])


@PRECISIONS
@pytest.mark.parametrize("changes", [{}, {**MOE, "decoder_sparse_step": 2}], ids=["dense", "moe"])
def test_packed_documents_equal_transformers_restarting_positions(changes, dtype, logit_tolerance, grad_tolerance):
    cfg = small_config(**changes)
    lengths = [[11, 1, 18], [4, 26]]
    tokens = torch.randint(0, cfg.vocab_size, (2, 30), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    numbers = [[number for number, n in enumerate(row, 1) for _ in range(n)] for row in lengths]
    batch = {"tokens": tokens, "positions": positions, "segments": torch.tensor(numbers, dtype=torch.int32)}
    with precision(dtype):
        # transformers builds the block-diagonal mask itself when positions restart and no attention mask is given
        hf = hf_model(cfg, dtype=dtype)
        expected = hf(tokens, position_ids=positions, use_cache=False).logits
    p = our_params(cfg, hf)
    got = model.apply(cfg, p, batch).logits
    assert (got - expected).abs().max() <= logit_tolerance
    crossing = model.apply(cfg, p, {"tokens": tokens, "positions": positions}).logits
    assert (crossing - expected).abs().max() > 0.1

    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    (expected * noise).sum().backward()
    theirs = from_hf(cfg, {name: leaf.grad for name, leaf in hf.named_parameters()})
    ours, _ = grad_and_value(lambda p: (model.apply(cfg, p, batch).logits * noise).sum())(p)
    for path, grad in ours.items():
        assert (grad - theirs[path]).norm() <= grad_tolerance * theirs[path].norm(), path


@torch.no_grad()
@pytest.mark.parametrize("case", ["tied", "heads 5/5", "yarn", "moe", "moe, raw probabilities"])
def test_bf16_is_as_close_to_fp32_as_transformers_bf16(case):
    """At most 1.25 times transformers' own error against its fp32 run on the same bf16 weights, by norm.

    Errors are summed over 6 models. In bf16 a token whose router is undecided may go to another expert. This makes most
    of a sparse model's error, and in a single model it is luck.
    """
    cfg = small_config(**CASES[case])
    errors, scale = torch.zeros(2), 0.0
    for seed in range(6):
        tokens = torch.randint(0, cfg.vocab_size, (6, 60), generator=torch.Generator().manual_seed(seed))
        narrow = hf_model(cfg, seed, torch.bfloat16)
        wide = copy.deepcopy(narrow)
        for leaf in wide.parameters():
            leaf.data = leaf.data.float()
        exact = wide(tokens).logits
        for i, got in enumerate((model.apply(cfg, our_params(cfg, narrow), {"tokens": tokens}), narrow(tokens))):
            assert got.logits.dtype == torch.bfloat16
            errors[i] += (got.logits - exact).square().sum()
        scale += exact.square().sum()
    ours, theirs = (errors / scale).sqrt()
    assert 0.01 < theirs < 0.1  # 2% dense, 5% with experts
    assert ours <= 1.25 * theirs


def test_l2_qk_norm_starts_where_rms_starts():
    cfg = small_config(initializer_range=0.3)
    tokens = torch.randint(0, cfg.vocab_size, (1, 12), generator=torch.Generator().manual_seed(4))
    a = model.apply(cfg, params.init_params(cfg, 0, dtype=torch.float64), {"tokens": tokens}).logits
    l2 = cfg.replace(qk_norm="l2")
    b = model.apply(l2, params.init_params(l2, 0, dtype=torch.float64), {"tokens": tokens}).logits
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # eps enters the two at different scales
    none = cfg.replace(qk_norm="none")
    assert "model.layers.self_attn.q_norm.weight" not in params.abstract_params(none)
    c = model.apply(none, params.init_params(none, 0, dtype=torch.float64), {"tokens": tokens}).logits
    assert (a - c).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (5,)])
def test_a_batch_without_tokens_is_named(shape):
    cfg = small_config()
    with pytest.raises(UserError, match=r"tokens must be \[rows, length\] with at least one token, got \["):
        model.apply(cfg, params.init_params(cfg, 0), {"tokens": torch.zeros(shape, dtype=torch.int64)})
