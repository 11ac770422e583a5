"""The MoE bench: the update of transformers' side is AdamW, and both sides run."""

import json

import pytest
import torch

from qwen3f import presets
from qwen3f.bench import moe


@pytest.mark.parametrize("pure", [True, False])
def test_the_update_is_adamw(pure):
    """With float32 parameters both kinds of update equal torch's AdamW, bit for bit."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    theirs = [torch.nn.Parameter(leaf.detach().clone()) for leaf in ours]
    plain = torch.optim.AdamW(theirs, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    update = moe.make_update(ours, pure)
    for _ in range(3):
        for leaf, other in zip(ours, theirs):
            leaf.grad = torch.randn_like(leaf)
            other.grad = leaf.grad.clone()
        update()
        plain.step()
        assert all(leaf.grad is None for leaf in ours)
    assert all(torch.equal(leaf, other) for leaf, other in zip(ours, theirs))


def test_both_sides_run(capsys, monkeypatch):
    small = presets.get("nano").replace(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, vocab_size=300, tie_word_embeddings=False
    )
    monkeypatch.setattr(presets, "get", lambda _: small)
    assert moe.main(["--device=cpu", "--preset=small", "--layers=1", "--rows=1", "--seq_len=16"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    assert [row["who"] for row in rows] == ["qwen3f", "transformers"] * 2
    assert all(row["tokens_s"] > 0 for row in rows)
