"""Errors for callers from Python: a batch that a step cannot take, and default kernels under torch.func.vmap."""

import pytest
import torch

from qwen3f import model, params
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import init_state

CFG = ModelConfig(
    num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24,
    vocab_size=40,
)  # fmt: skip
TOKENS = torch.arange(8).view(1, 8)
BATCH = {"tokens": TOKENS, "targets": TOKENS + 1, "loss_weights": torch.ones(1, 8)}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"targets": None}, r"has no 'targets' \[B, T\]; it has loss_weights, tokens"),
        ({"tokens": None}, "has no 'tokens'"),
        ({"loss_weights": None}, "has no 'loss_weights'"),
        ({"loss_weights": torch.ones(1, 7)}, r"'loss_weights' has shape \[1, 7\], its 'tokens' \[1, 8\]"),
        ({"tokens": TOKENS + 33}, "'tokens' go from 33 to 40; with model.vocab_size=40 they must lie in 0..39"),
        ({"tokens": TOKENS - 1}, "'tokens' go from -1 to 6"),
        ({"targets": TOKENS - 5}, "'targets' go from -5 to 2; .* they must lie in 0..39, or be -100"),
        ({"targets": TOKENS + 40}, "'targets' go from 40 to 47"),
    ],
)
def test_a_batch_that_is_none(changes, words):
    step = make_train_step(CFG, AdamW(), Schedule("constant", 1e-3, 10))
    batch = {key: value for key, value in {**BATCH, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=words):
        step(init_state(CFG, 0), batch)
    step(init_state(CFG, 0), {**BATCH, "targets": torch.full_like(TOKENS, -100).index_fill(1, torch.tensor([0]), 39)})


def test_default_kernels_under_vmap():
    p = params.init_params(CFG, 0)

    def loss(p, tokens, **options):
        return model.apply(CFG, p, {"tokens": tokens[None]}, **options).logits.logsumexp(-1).sum()

    rows = torch.arange(16).view(2, 8)
    for mapped in (torch.func.vmap(loss, (None, 0)), torch.func.vmap(torch.func.grad(loss), (None, 0))):
        with pytest.raises(UserError, match="vmap does not work with the default kernels; .*execution=model.REFERENCE"):
            mapped(p, rows)

    def plain(p, tokens):
        return loss(p, tokens, execution=model.REFERENCE)

    both = torch.func.vmap(plain, (None, 0))(p, rows)
    assert torch.allclose(both, torch.stack([loss(p, row) for row in rows]), rtol=1e-5)
    torch.func.grad(loss)(p, rows[0])  # without vmap the default kernels work
