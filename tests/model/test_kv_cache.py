"""The cached forward pass equals the plain one, however the tokens are cut into calls and wherever their pages lie.

Tolerances: fp32 1e-6 and float64 1e-12 by norm and relative, the rounding of two orders of summation (a pass of one
token takes other matrix kernels); on logits of about ±10 that is 2e-5 and 2e-11 at the worst element.
"""

import pytest
import torch

from kernels import backend
from qwen3f import model, params
from qwen3f.model.kv_cache import copy_pages, erase_pages, grow_cache
from tests.model.hf_params import from_hf, hf_model, small_config

MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
CASES = {
    "heads 4/2": {},
    "tied, bias, heads 3/1": {
        "tie_word_embeddings": True, "attention_bias": True, "num_attention_heads": 3, "num_key_value_heads": 1
    },
    "heads 3/3, remat": {"num_attention_heads": 3, "num_key_value_heads": 3, "gradient_checkpointing": "full"},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "moe, every second layer": {**MOE, "decoder_sparse_step": 2},
}  # fmt: skip
LENGTH = 30
REFERENCE = pytest.mark.parametrize("execution", [model.EAGER, model.REFERENCE], ids=["sdpa", "reference"])


def build(dtype=torch.float64, **changes):
    cfg = small_config(**changes)
    p = from_hf(cfg, {name: leaf.detach() for name, leaf in hf_model(cfg, dtype=dtype).named_parameters()})
    tokens = torch.randint(0, cfg.vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    return cfg, p, tokens


PAGE = 8
TABLE = torch.tensor([[3, 1, 10, 7], [9, 4, 2, 11], [5, 12, 6, 8]])  # pages in no order


def slots_of(positions, table=TABLE):
    return table.gather(1, positions // PAGE) * PAGE + positions % PAGE


def in_pieces(cfg, p, tokens, pieces, execution=model.EAGER, table=TABLE):
    cache = model.init_cache(cfg, p, 12, PAGE)
    forward, start, logits = model.make_cached_forward(cfg, execution), 0, []
    for part in tokens.split(pieces, dim=1):
        positions = torch.arange(start, start + part.shape[1]).expand(part.shape)
        batch = {"tokens": part, "positions": positions, "slots": slots_of(positions, table.cpu())}
        start += part.shape[1]
        batch = {key: x.to(tokens.device) for key, x in batch.items()}
        hidden, cache = forward(p, cache, batch, table=table, span=start)
        logits.append(hidden @ model.head_weight(cfg, p).T)
    return torch.cat(logits, 1), cache


@REFERENCE
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_any_cut_gives_the_logits_of_one_pass(case, dtype, tolerance, execution):
    cfg, p, tokens = build(dtype, **CASES[case])
    expected = model.apply(cfg, p, {"tokens": tokens}).logits
    assert expected.abs().max() > 3
    for pieces in ([LENGTH], [11, 1, 1, 17], [1, 28, 1]):
        got, _ = in_pieces(cfg, p, tokens, pieces, execution)
        assert (got - expected).norm() <= tolerance * expected.norm(), pieces
        assert (got - expected).abs().max() <= 20 * tolerance, pieces


def test_padding_is_written_to_page_0_and_never_read():
    cfg, p, tokens = build()
    expected = model.apply(cfg, p, {"tokens": tokens}).logits
    cache = model.init_cache(cfg, p, 12, PAGE)
    forward = model.make_cached_forward(cfg)
    # row 0 is never padded, row 1 on the left and then in the middle, row 2 is all padding at first
    real = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    taken = torch.zeros(3, dtype=torch.int64)
    for mask in (real, torch.tensor([[1, 1], [1, 0], [1, 1]]), torch.tensor([[1], [1], [1]])):
        positions = (taken[:, None] + mask.cumsum(1) - 1).clamp(min=0)
        batch = {
            "tokens": torch.where(mask == 1, tokens.gather(1, positions), 5),
            "positions": positions,
            "slots": torch.where(mask == 1, slots_of(positions), 3),
        }
        hidden, cache = forward(p, cache, batch, table=TABLE, span=8)
        wanted = expected[torch.arange(3)[:, None], positions]
        assert (hidden @ model.head_weight(cfg, p).T - wanted)[mask == 1].abs().max() <= 1e-12
        taken += mask.sum(1)
    assert all(x.isfinite().all() for x in (*cache.keys, *cache.values))


def unequal_chunks(p, cfg, device, execution, dtype=torch.float32):
    """The distance, by norm, from a plain pass to one cached pass over three prompts, of which the shorter are padded.
    The pass is so wide (over 128 query rows) that it takes the kernel of a training pass."""
    counts, width = (70, 66, 3), 70
    tokens = torch.randint(0, cfg.vocab_size, (3, width), generator=torch.Generator().manual_seed(3))
    expected = model.make_forward(cfg)(p, {"tokens": tokens})[0]
    place = torch.arange(width).expand(3, -1)
    real = place < torch.tensor(counts)[:, None]
    table = torch.arange(1, 28).view(3, 9)
    batch = {
        "tokens": torch.where(real, tokens, 5),
        "positions": torch.where(real, place, 0),
        "slots": torch.where(real, slots_of(place, table), 3),
    }
    p = {path: leaf.to(device, dtype) for path, leaf in p.items()}
    cache = model.init_cache(cfg, p, 27, PAGE)
    batch = {key: x.to(device) for key, x in batch.items()}
    forward = model.make_cached_forward(cfg, execution)
    got = forward(p, cache, batch, table=table.to(device), span=width)[0].to("cpu", torch.float64)
    return ((got - expected)[real].norm() / expected[real].norm()).item()


def test_chunks_of_unequal_length_by_the_kernels():
    """Padding at a tile's end must not hide keys from the tile's tokens; fp32 rounding only."""
    cfg, p, _ = build(head_dim=16)
    with backend.interpreted():
        assert unequal_chunks(p, cfg, "cpu", model.Execution(attention="flash")) <= 1e-6


def test_rows_of_one_page_need_no_gather():
    """table=n stands for page n + i for row i: it gives the same bits as that table."""
    cfg, p, tokens = build()
    positions = torch.arange(12).expand(3, 12)
    for number in (1, 4):
        found = []
        for table in (number, torch.tensor([[number], [number + 1], [number + 2]])):
            slots = (number + torch.arange(3))[:, None] * 16 + positions
            batch = {"tokens": tokens[:, :12], "positions": positions, "slots": slots}
            cache = model.init_cache(cfg, p, 12, 16)
            found.append(model.make_cached_forward(cfg)(p, cache, batch, table=table, span=12)[0])
        assert torch.equal(*found)


def test_a_grown_cache_and_copied_pages_hold_the_same():
    cfg, p, tokens = build()
    _, cache = in_pieces(cfg, p, tokens, [LENGTH])
    grown = grow_cache(cache, 20, 16)
    assert (grown.pages, grown.page_size) == (21, 16)
    for old, new in zip(cache.keys + cache.values, grown.keys + grown.values):
        assert torch.equal(new[:13, :, :PAGE], old)
        assert not new[13:].any()
    before = [x.clone() for x in cache.keys + cache.values]
    copy_pages(cache, [(3, 1, PAGE), (1, 2, PAGE), (9, 4, PAGE), (9, 5, PAGE)])  # page 2 gets what page 1 got
    for old, new in zip(before, cache.keys + cache.values):
        assert torch.equal(new[[1, 2, 4, 5]], old[[3, 3, 9, 9]])
        assert torch.equal(new[6:], old[6:])


def test_of_a_page_that_is_copied_in_part_nothing_else_is_read():
    """Slots after the copied tokens may hold NaN; the target gets zeros there."""
    cfg, p, tokens = build()
    _, cache = in_pieces(cfg, p, tokens, [LENGTH])
    for x in cache.keys + cache.values:
        x[3, :, 5:] = torch.nan
        x[9, :, 2:] = torch.nan
    before = [x.clone() for x in cache.keys + cache.values]
    copy_pages(cache, [(3, 1, 5), (9, 4, 2), (1, 2, 3)])
    for old, new in zip(before, cache.keys + cache.values):
        for source, target, count in ((3, 1, 5), (9, 4, 2), (3, 2, 3)):
            assert torch.equal(new[target, :, :count], old[source, :, :count])
            assert not new[target, :, count:].any()
    erase_pages(cache, [3, 9])
    assert all(x[1:].isfinite().all() and not x[[3, 9]].any() and x[1].any() for x in cache.keys + cache.values)
    erase_pages(cache)
    assert not any(x.any() for x in cache.keys + cache.values)


def test_a_tensor_parallel_shard_needs_its_heads_only():
    """A shard with one of two key/value heads: its cached pass equals its plain pass.

    The keys of both shards together are those of the whole cache.
    """
    cfg, p, tokens = build(num_hidden_layers=1)
    d, layer = cfg.head_dim, params.LAYERS + "self_attn."
    cut = {"q_proj": (0, 2 * d), "k_proj": (0, d), "v_proj": (0, d)}
    halves = []
    for half in range(2):
        shard = dict(p)
        for name, (_, size) in cut.items():
            shard[f"{layer}{name}.weight"] = p[f"{layer}{name}.weight"][:, half * size : (half + 1) * size]
        shard[f"{layer}o_proj.weight"] = p[f"{layer}o_proj.weight"][:, :, half * 2 * d : (half + 1) * 2 * d]
        logits, cache = in_pieces(cfg, shard, tokens, [LENGTH])
        assert cache.keys[0].shape == (13, 1, PAGE, d)
        assert (logits - model.apply(cfg, shard, {"tokens": tokens}).logits).abs().max() <= 1e-12
        halves.append(cache)
    _, whole = in_pieces(cfg, p, tokens, [LENGTH])
    assert (torch.cat([h.keys[0] for h in halves], 1) - whole.keys[0]).abs().max() <= 1e-12


def test_a_page_beyond_the_cache_is_an_error_not_a_lost_token():
    cfg, p, tokens = build()
    with pytest.raises(IndexError):
        in_pieces(cfg, p, tokens, [LENGTH], table=TABLE + 1)


def test_compiled_decoding_writes_into_the_cache_it_is_given():
    cfg, p, tokens = build(torch.float32, num_hidden_layers=1)
    cache = model.init_cache(cfg, p, 12, PAGE)
    compiled = torch.compile(model.make_cached_forward(cfg, model.Execution(compile="step")), dynamic=False)
    expected = model.apply(cfg, p, {"tokens": tokens[:, :2]}).hidden
    for column in range(2):
        positions = torch.full((3, 1), column)
        batch = {"tokens": tokens[:, column : column + 1], "positions": positions, "slots": slots_of(positions)}
        hidden, after = compiled(p, cache, batch, table=TABLE, span=8)
        assert (hidden - expected[:, column : column + 1]).abs().max() <= 1e-5
        assert after.keys[0].data_ptr() == cache.keys[0].data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"])
def test_chunks_of_unequal_length_on_cuda(dtype, tolerance):
    cfg, p, _ = build(head_dim=16)
    assert unequal_chunks(p, cfg, "cuda", model.EAGER, dtype) <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"])
def test_on_cuda(dtype, tolerance):
    """The distance from float64, by norm. fp32: the project's bound. bf16: 0.02 on a CPU, with or without the cache."""
    cfg, p, tokens = build(torch.float64)
    expected = model.apply(cfg, p, {"tokens": tokens}).logits
    p = {path: leaf.to("cuda", dtype) for path, leaf in p.items()}
    got, _ = in_pieces(cfg, p, tokens.cuda(), [11, 1, 1, 17], table=TABLE.cuda())
    assert (got.double().cpu() - expected).norm() <= tolerance * expected.norm()
