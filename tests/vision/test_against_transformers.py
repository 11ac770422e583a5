"""Logits and gradients against transformers' Qwen3-VL and Qwen3-VL-MoE, on random tiny models with logits of about ±10.

fp32: max|Δlogits| ≤ 2e-5, the rounding of two orders of summation. Gradients of each parameter, layer by layer, ≤ 2e-5
by norm. That is more than the text models' 5e-6, since the tower's gradients pass through both networks. float64: 1e-12
for both, with transformers' casts to float32 made float64 (tests.model.hf_params.Widen).
"""

import contextlib
import random

import pytest
import torch

from qwen3f import model
from qwen3f import params as P
from qwen3f.errors import UserError
from qwen3f.transforms import grad_and_value
from tests.model.hf_params import Widen
from tests.vision.hf_vl import MOE, Row, from_hf, hf_model, our_batch, row, their_arguments, vl_config

HEADS_5 = {"vision_num_attention_heads": 2, "vision_hidden_size": 40}
# (changes of the config, what stands in each row: t text, i image, v video)
CASES = {
    "one image": ({}, ["tit"]),
    "image first": ({}, ["it"]),
    "image last": ({}, ["ti"]),
    "images of different sizes": ({}, ["titit", "iti"]),
    "video": ({}, ["tvt"]),
    "image and video": ({}, ["titvt", "tviit"]),
    "a row without": ({}, ["tit", "t"]),
    "tied": ({"tie_word_embeddings": True}, ["tit"]),
    "bias": ({"attention_bias": True}, ["tit"]),
    "heads of 20": (HEADS_5, ["titv"]),
    "no taps": ({"vision_deepstack_layers": ()}, ["tit"]),
    "a tap of the last layer": ({"vision_deepstack_layers": (1, 3)}, ["titv"]),
    "as many taps as layers": ({"vision_deepstack_layers": (0, 1, 3)}, ["tit"]),
    "one tap": ({"vision_deepstack_layers": (1,), "vision_num_hidden_layers": 2}, ["tit"]),
    "sections 2 3 3": ({"mrope_section": (2, 3, 3)}, ["titv"]),
    "sections 6 1 1, theta": ({"mrope_section": (6, 1, 1), "rope_theta": 5e6}, ["titv"]),
    "one frame a patch": ({"vision_temporal_patch_size": 1}, ["titv"]),
    "blocks of 3 x 3": ({"vision_merger_spatial_factor": 3}, ["titv"]),
    "no merging": ({"vision_merger_spatial_factor": 1}, ["tit"]),
    "patch of 3, a table of 4 x 4": ({"vision_patch_size": 3, "vision_image_size": 12}, ["titv"]),
    "gelu": ({"hidden_act": "gelu"}, ["tit"]),
    "moe": (MOE, ["titvt"]),
    "moe, tied": ({**MOE, "tie_word_embeddings": True}, ["titvt"]),
    "moe, a dense layer": ({**MOE, "mlp_only_layers": (1,)}, ["titvt", "it"]),
    "moe, every second layer": ({**MOE, "decoder_sparse_step": 2, "num_hidden_layers": 4}, ["tit"]),
}
PRECISIONS = pytest.mark.parametrize(
    "dtype, logit_tolerance, grad_tolerance",
    [(torch.float32, 2e-5, 2e-5), (torch.float64, 1e-12, 1e-12)],
    ids=["fp32", "float64"],
)


def precision(dtype):
    return Widen() if dtype == torch.float64 else contextlib.nullcontext()


def our_params(cfg, hf):
    return from_hf(cfg, {name: leaf.detach() for name, leaf in hf.named_parameters()})


def layers_of(cfg, path, leaf):
    return leaf.unbind(0) if P.abstract_params(cfg)[path].stack else [leaf]


@PRECISIONS
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, dtype, logit_tolerance, grad_tolerance):
    changes, kinds = CASES[case]
    cfg, rand = vl_config(**changes), random.Random(case)
    rows = [row(rand, kind, cfg.vision_merger_spatial_factor) for kind in kinds]
    batch = our_batch(cfg, rows, dtype)
    weights = torch.randn(*batch["tokens"].shape, cfg.vocab_size, generator=torch.Generator().manual_seed(3))
    weights = torch.where((batch["segments"] != 0)[..., None], weights, 0)
    hf, expected, theirs = logits_and_gradients_of_transformers(cfg, rows, weights, dtype)
    p = our_params(cfg, hf)
    got = model.apply(cfg, p, batch).logits
    assert got.dtype == dtype
    assert 5 < max(logits.abs().max() for logits in expected) < 40
    for ours, hers in zip(got, expected):
        assert (ours[: len(hers)] - hers).abs().max() <= logit_tolerance
    if dtype == torch.float32:
        # Compare our float32 gradients with transformers' float64 ones. Its own float32 gradients are up to 1.8e-5 away
        # from those (case "no taps", a bias of values), too far to compare two float32 gradients.
        _, _, theirs = logits_and_gradients_of_transformers(cfg, rows, weights, torch.float64)
    grads, _ = grad_and_value(lambda p: (model.apply(cfg, p, batch).logits * weights.to(dtype)).sum())(p)
    for path, grad in grads.items():
        for ours, hers in zip(layers_of(cfg, path, grad), layers_of(cfg, path, theirs[path]), strict=True):
            assert (ours - hers).norm() <= grad_tolerance * hers.norm(), path


def logits_and_gradients_of_transformers(cfg, rows, weights, dtype):
    batch = our_batch(cfg, rows, dtype)
    with precision(dtype):
        hf = hf_model(cfg, dtype=dtype)
        logits = [hf(**their_arguments(r, batch, index)).logits[0] for index, r in enumerate(rows)]
        sum((row * weights[i, : len(row)].to(dtype)).sum() for i, row in enumerate(logits)).backward()
    return hf, logits, from_hf(cfg, {name: leaf.grad for name, leaf in hf.named_parameters()})


@PRECISIONS
@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "moe"])
def test_packed_documents_equal_transformers_alone(changes, dtype, logit_tolerance, grad_tolerance):
    """Documents of text, with images and with videos in one row, each against transformers' run of it alone."""
    cfg, rand = vl_config(**changes), random.Random(5)
    parts = [[row(rand, kinds) for kinds in ("tit", "t", "v", "ti")], [row(rand, kinds) for kinds in ("t", "itit")]]
    packed = [Row([x for part in r for x in part.tokens], [x for part in r for x in part.seen]) for r in parts]
    batch = our_batch(cfg, packed, dtype)
    for i, documents in enumerate(parts):
        numbers = [n for n, part in enumerate(documents, 1) for _ in part.tokens]
        batch["segments"][i, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    with precision(dtype), torch.no_grad():
        hf = hf_model(cfg, dtype=dtype)
        got = model.apply(cfg, our_params(cfg, hf), batch).logits
        for i, documents in enumerate(parts):
            at, patch = 0, 0
            for part in documents:
                count = sum(t * h * w for _, (t, h, w) in part.seen)
                alone = {"tokens": batch["tokens"][i : i + 1, at:], "pixel_values": batch["pixel_values"][i:, patch:]}
                expected = hf(**their_arguments(part, alone, 0)).logits[0]
                assert (got[i, at : at + len(expected)] - expected).abs().max() <= logit_tolerance
                at, patch = at + len(expected), patch + count


@torch.no_grad()
def test_what_fills_the_room_of_a_row_changes_nothing():
    """Padding patches and grids, and their number, change nothing. To 1e-12: sums of other sizes round differently."""
    cfg = vl_config()
    p = our_params(cfg, hf_model(cfg, dtype=torch.float64))
    rows = [row(random.Random(1), "titv"), row(random.Random(2), "it")]
    few, many = (our_batch(cfg, rows, torch.float64, spare) for spare in (0, 5))
    many["pixel_values"][:, : few["pixel_values"].shape[1]] = few["pixel_values"]
    a, b = (model.apply(cfg, p, batch).logits for batch in (few, many))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@torch.no_grad()
def test_taps_and_pixels_matter_and_text_stays():
    cfg = vl_config()
    p = our_params(cfg, hf_model(cfg))
    batch = our_batch(cfg, [row(random.Random(1), "tit")], torch.float32)
    first = int((batch["tokens"][0] == cfg.vision_start_token_id).nonzero()[0]) + 1
    whole = model.apply(cfg, p, batch).logits

    def moved(changed):
        return (changed.logits - whole)[0].abs().amax(-1)

    for tap in range(2):
        without = {k: v.clone() if k.startswith(P.TAP_MERGERS) else v for k, v in p.items()}
        for name in ("linear_fc2.weight", "linear_fc2.bias"):
            without[P.TAP_MERGERS + name][tap] = 0
        change = moved(model.apply(cfg, without, batch))
        assert change[:first].max() == 0
        assert change[first:].max() > 0.1
    change = moved(model.apply(cfg, p, {**batch, "pixel_values": batch["pixel_values"] + 1}))
    assert change[:first].max() == 0
    assert change[first:].max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    "attention, compile",
    [("reference", "off"), ("sdpa", "off"), ("flash", "off"), pytest.param("sdpa", "block", marks=pytest.mark.nightly)],
)
def test_every_way_of_running_gives_the_same(attention, compile):
    cfg = vl_config(vision_hidden_size=48)
    p = our_params(cfg, hf_model(cfg, dtype=torch.float64))
    batch = our_batch(cfg, [row(random.Random(1), "titv"), row(random.Random(4), "tt")], torch.float64)
    expected = model.apply(cfg, p, batch).logits
    got = model.apply(cfg, p, batch, model.Execution(attention=attention, compile=compile)).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("kinds", ["titv", "t"])
def test_recomputation_changes_no_gradient(policy, kinds):
    cfg = vl_config()
    p = our_params(cfg, hf_model(cfg, dtype=torch.float64))
    batch = our_batch(cfg, [row(random.Random(1), kinds)], torch.float64)
    plain, again = (
        grad_and_value(lambda p, cfg=c: model.apply(cfg, p, batch).logits.square().sum())(p)[0]
        for c in (cfg, cfg.replace(gradient_checkpointing=policy))
    )
    for path, grad in plain.items():
        torch.testing.assert_close(again[path], grad, rtol=1e-12, atol=1e-12)


def test_no_room_for_images_is_a_batch_of_words():
    cfg = vl_config()
    p = P.init_params(cfg, 0)
    tokens = torch.arange(12).view(2, 6)
    words = model.apply(cfg, p, {"tokens": tokens}).logits
    for patches, images in ((0, 0), (0, 2), (8, 0)):
        none = {"pixel_values": torch.zeros(2, patches, cfg.vision_patch_values), "grids": torch.zeros(2, images, 3)}
        assert torch.equal(model.apply(cfg, p, {"tokens": tokens, **none}).logits, words)


def test_what_does_not_fit_is_named():
    cfg = vl_config()
    p = P.init_params(cfg, 0)
    batch = our_batch(cfg, [row(random.Random(1), "tit")], torch.float32)
    with pytest.raises(UserError, match="row 0 has .* placeholders"):
        model.apply(cfg, p, {**batch, "tokens": torch.ones_like(batch["tokens"])})
    with pytest.raises(UserError, match="patches of 22 values, but the model takes 24"):
        model.apply(cfg, p, {**batch, "pixel_values": batch["pixel_values"][..., :-2]})
    for grids in (batch["grids"][0], batch["grids"].repeat(2, 1, 1), batch["grids"][..., :2]):
        with pytest.raises(UserError, match=r"grids must be \[rows, images, 3\] with 1 rows like tokens"):
            model.apply(cfg, p, {**batch, "grids": grids})
    for pixels in (batch["pixel_values"][0], batch["pixel_values"].repeat(2, 1, 1)):
        with pytest.raises(UserError, match=r"pixel_values must be \[rows, patches, values\] with 1 rows"):
            model.apply(cfg, p, {**batch, "pixel_values": pixels})
    with pytest.raises(UserError, match="pixel_values but no grids"):
        model.apply(cfg, p, {key: x for key, x in batch.items() if key != "grids"})
    text = cfg.replace(vision_enabled=False)
    with pytest.raises(UserError, match="model has no vision tower"):
        model.apply(text, P.init_params(text, 0), batch)
