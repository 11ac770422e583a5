"""The lean decoding pass, for CPUs, against the one through the model's blocks. They sum in different orders: logits
are compared by norm, to 1e-5, relative, in fp32, and to 1e-12 in float64."""

import pytest
import torch

from qwen3f import model, params
from qwen3f.infer.device import Device
from qwen3f.infer.lean import fits, make_lean_decode
from qwen3f.infer.passes import Inputs, make_decode, make_prefill
from tests.model.hf_params import small_config

MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
CASES = {
    "dense": {},
    "tied, bias": {"tie_word_embeddings": True, "attention_bias": True},
    "no qk_norm, heads 4/4": {"qk_norm": "none", "num_key_value_heads": 4},
    "one key head, gelu": {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
    "odd sizes": {"head_dim": 14, "intermediate_size": 77, "hidden_size": 36},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "moe, every second layer": {**MOE, "decoder_sparse_step": 2},
}
TABLES = {
    "a page a row, side by side": (16, 2),
    "a page a row": (16, torch.tensor([[5], [1], [3]])),
    "pages": (4, torch.tensor([[3, 1, 10, 7], [12, 2, 4, 9], [5, 11, 6, 8]])),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_a_pass_equals_the_blocks(case, dtype, tolerance, table):
    cfg = small_config(**{"max_position_embeddings": 256, **CASES[case]})
    p = params.init_params(cfg.replace(initializer_range=0.2), 0, dtype=dtype)
    size, pages = TABLES[table]
    listed = torch.arange(pages, pages + 3)[:, None] if isinstance(pages, int) else pages
    lengths = torch.tensor([13, 0, 5])  # tokens already cached; the second row is idle
    idle = torch.tensor([False, True, False])

    def slots(at_BT):
        return listed.gather(1, at_BT // size) * size + at_BT % size

    before = torch.arange(13).expand(3, -1)
    real = (before < lengths[:, None]) & ~idle[:, None]
    tokens = torch.randint(0, cfg.vocab_size, (3, 13), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "positions": before, "slots": torch.where(real, slots(before), 0)}
    cache = model.init_cache(cfg, p, 12, size)
    cache = make_prefill(cfg, model.EAGER)(p, cache, batch, table=pages, span=16)
    other = model.KVCache(*(tuple(x.clone() for x in side) for side in cache))

    inputs = Inputs(
        tokens=torch.tensor([7, 0, -2]),  # −2: the token that place 1 of the last pass drew
        positions=lengths,
        slots=torch.where(idle, 0, slots(lengths[:, None])[:, 0]),
        streams=lengths,
        forced=lengths,
        offsets=torch.tensor([0, 0, 40]),
    )
    last = torch.tensor([3, 9])
    expected, cache = make_decode(cfg, model.EAGER)(p, cache, inputs, last, table=pages, span=14)
    found, other = make_lean_decode(cfg, model.EAGER)(p, other, inputs, last, table=pages, span=14)
    for row in (0, 2):
        assert (found[row] - expected[row]).norm() <= tolerance * expected[row].norm()
    assert found.isfinite().all()
    for old, new in zip(cache.keys + cache.values, other.keys + other.values):
        torch.testing.assert_close(new[1:], old[1:], rtol=10 * tolerance, atol=10 * tolerance)


def test_what_it_takes():
    cfg = small_config()
    assert fits(cfg, model.EAGER, torch.float32)
    assert not fits(cfg, model.EAGER, torch.bfloat16)
    assert not fits(cfg, model.INVARIANT, torch.float32)
    assert not fits(cfg, model.REFERENCE, torch.float32)
    assert not fits(cfg.replace(qk_norm="l2"), model.EAGER, torch.float32)


@pytest.mark.parametrize("execution", [model.EAGER, model.INVARIANT], ids=["eager", "invariant"])
def test_an_engine_uses_it_where_it_can(execution):
    cfg = small_config()
    device = Device(cfg, params.init_params(cfg, 0), execution, cfg.vocab_size, 0, 64, 4)
    assert ("lean" in device._decode.__qualname__) == (execution is model.EAGER)
