"""The parameter table, initialisation, and the counter-based random numbers under it."""

import math

import pytest
import torch

from qwen3f import params, presets, rng
from qwen3f.errors import UserError
from qwen3f.train.state import from_params


def test_decay_is_for_matrices_and_the_head_only():
    table = params.abstract_params(presets.get("debug").replace(attention_bias=True))
    plain = {p for p, s in table.items() if not s.decay}
    assert plain == {
        params.EMBED,
        params.FINAL_NORM,
        *(f"model.layers.{n}_layernorm.weight" for n in ("input", "post_attention")),
        *(f"model.layers.self_attn.{n}_norm.weight" for n in "qk"),
        *(f"model.layers.self_attn.{n}_proj.bias" for n in "qkvo"),
    }
    assert table[params.HEAD].decay


def test_init_is_a_function_of_seed_path_and_layer_alone():
    cfg = presets.get("nano")
    a, b = params.init_params(cfg, 1), params.init_params(cfg.replace(num_hidden_layers=7), 1)
    name = "model.layers.mlp.up_proj.weight"
    assert torch.equal(a[name], b[name][: cfg.num_hidden_layers])
    assert not torch.equal(a[name][0], a[name][1])
    assert not torch.equal(a[name], params.init_params(cfg, 2)[name])
    wide = params.init_params(cfg, 1, dtype=torch.float64)
    assert torch.equal(a[name].double(), wide[name])


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.5, "a", True, None])
def test_a_seed_is_a_number_of_64_bits(seed):
    cfg = presets.get("nano").replace(num_hidden_layers=1)
    with pytest.raises(UserError, match="seed must be a whole number from"):
        params.init_params(cfg, seed)
    with pytest.raises(UserError, match="seed must be a whole number from"):
        from_params(cfg, params.init_params(cfg, 2**63 - 1), seed)


def test_init_has_the_wanted_spread():
    embed = params.init_params(presets.get("nano"), 0)[params.EMBED].double() / 0.45
    n = embed.numel()
    # Six standard errors of mean, variance and fourth moment of a normal sample.
    assert abs(embed.mean()) < 6 / math.sqrt(n)
    assert abs(embed.var() - 1) < 6 * math.sqrt(2 / n)
    assert abs(embed.pow(4).mean() - 3) < 6 * math.sqrt(96 / n)
    flat = embed.flatten()
    assert abs((flat[1:] * flat[:-1]).mean()) < 6 / math.sqrt(n)


def test_normal_stream_can_be_drawn_in_pieces():
    whole = rng.normal(rng.key(3, "x"), 0, 1000)
    assert torch.equal(whole[137:500], rng.normal(rng.key(3, "x"), 137, 363))


def test_hash_is_the_published_splitmix64():
    # First outputs of SplitMix64 seeded with 1234567, as its reference implementation prints them.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = rng.bits(1234567, torch.arange(1, 5))
    assert [x % 2**64 for x in got.tolist()] == expected


def test_uniform_is_uniform():
    u = rng.uniform(rng.key("u"), torch.arange(100_000)).double()
    assert 0.0 <= u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1.0
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 1000).square() / 1000).sum() < 99 + 6 * math.sqrt(2 * 99)  # chi-squared


def test_check_params_names_what_is_wrong():
    cfg = presets.get("nano").replace(tie_word_embeddings=True)
    good = params.init_params(cfg, 0)
    with pytest.raises(UserError, match="model.norm.weight is missing"):
        params.check_params(cfg, {k: v for k, v in good.items() if k != params.FINAL_NORM})
    with pytest.raises(UserError, match="lm_head.weight is unknown"):
        params.check_params(cfg, good | {params.HEAD: good[params.EMBED]})
    with pytest.raises(UserError, match="has shape"):
        params.check_params(cfg, good | {params.FINAL_NORM: torch.ones(3)})
