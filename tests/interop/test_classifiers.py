"""Reward models against transformers' Qwen3ForSequenceClassification, both ways; scores never depend on padding.

Tolerance on scores of about ±3, fp32: 2e-5, rounding of two orders of summation (see tests/model). All else is exact.
"""

import pytest
import torch
import transformers

from qwen3f.errors import UserError
from qwen3f.interop import hf
from qwen3f.interop.config import CLASSIFIERS
from qwen3f.stages.reward_model import score
from qwen3f.train.outputs import make_outputs
from tests.interop.models import EXPERTS, SIZES, edit_config, edit_tensors, same_bits, tensors

PAD = 96
CASES = {"dense": {}, "tied": {"tie_word_embeddings": True}, "moe": {**EXPERTS, "norm_topk_prob": True}}


def classifier(case):
    """transformers' model with one label, random in every parameter."""
    values = {**SIZES, **CASES[case], "num_labels": 1, "pad_token_id": PAD}
    moe = "num_experts" in values
    kind = transformers.Qwen3MoeConfig if moe else transformers.Qwen3Config
    of = transformers.Qwen3MoeForSequenceClassification if moe else transformers.Qwen3ForSequenceClassification
    torch.manual_seed(1)
    model = of(kind(**values)).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.add_(0.1 * torch.randn_like(leaf))
    return model


def answers(count=5):
    """Answers of different lengths, one of a single token; none holds the padding id."""
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, PAD, (n,), generator=g) for n in (7, 1, 13, 20, 3)[:count]]


def padded(ids, length, left):
    tokens, mask = torch.full((len(ids), length), PAD), torch.zeros(len(ids), length, dtype=torch.long)
    for row, own in enumerate(ids):
        where = slice(length - len(own), None) if left else slice(0, len(own))
        tokens[row, where], mask[row, where] = own, 1
    return tokens, mask


def ours(cfg, params, tokens, mask):
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"tokens": tokens, "targets": torch.full_like(tokens, -100), "positions": positions, "segments": mask.int()}
    return score(make_outputs(cfg, output="scores"), params, batch)[:, 0]


@pytest.mark.parametrize("case", CASES)
def test_scores_there_and_back(case, tmp_path):
    """Their directory -> our scores; our directory -> their logits; every tensor keeps its bits."""
    theirs = classifier(case)
    theirs.save_pretrained(tmp_path / "theirs")
    cfg, params = hf.load_pretrained(tmp_path / "theirs")
    assert cfg.scalar_head
    hf.save_pretrained(tmp_path / "ours", cfg, params)
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert "score.weight" in before
    assert all(same_bits(before[key], after[key]) for key in before)
    assert hf.read_config(tmp_path / "ours") == cfg
    kind = transformers.AutoModelForSequenceClassification
    again = kind.from_pretrained(tmp_path / "ours", pad_token_id=PAD).eval()
    assert type(again).__name__ == CLASSIFIERS["qwen3_moe" if case == "moe" else "qwen3"]
    assert again.config.num_labels == 1
    with torch.no_grad():
        alone = torch.cat([theirs(own[None]).logits[:, 0] for own in answers()])
        assert alone.abs().max() > 1
        for left in (False, True):
            tokens, mask = padded(answers(), 24, left)
            expected = theirs(tokens, attention_mask=mask).logits[:, 0]
            assert torch.equal(again(tokens, attention_mask=mask).logits[:, 0], expected)
            got = ours(cfg, params, tokens, mask)
            assert (got - expected).abs().max() <= 2e-5, left
            assert (got - alone).abs().max() <= 2e-5, left


def test_scores_depend_on_neither_padding_nor_neighbours(tmp_path):
    """Equal within 2e-5 in any batch, packed into one row, and if the padding id is also in an answer."""
    classifier("dense").save_pretrained(tmp_path)
    cfg, params = hf.load_pretrained(tmp_path)
    ids = answers()
    alone = torch.cat([ours(cfg, params, *padded([own], len(own), False)) for own in ids])
    for chosen in ([0, 1], [4, 2, 3], [3], [1, 1, 0, 2, 4]):
        tokens, mask = padded([ids[i] for i in chosen], 29, left=False)
        tokens[mask == 0] = int(ids[chosen[0]][-1])  # pad = the last token of an answer
        assert (ours(cfg, params, tokens, mask) - alone[chosen]).abs().max() <= 2e-5
    lengths = torch.tensor([len(own) for own in ids])
    row = {
        "tokens": torch.cat(ids)[None],
        "targets": torch.full((1, int(lengths.sum())), -100),
        "positions": torch.cat([torch.arange(len(own)) for own in ids])[None],
        "segments": torch.arange(1, 6, dtype=torch.int32).repeat_interleave(lengths)[None],
    }
    packed = score(make_outputs(cfg, output="scores"), params, row)[0]
    assert (packed[:5] - alone).abs().max() <= 2e-5
    assert not packed[5:].any()


def test_a_classifier_of_several_labels_or_without_a_score_is_refused(tmp_path):
    classifier("dense").save_pretrained(tmp_path / "x")
    edit_config(tmp_path / "x", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(UserError, match="id2label is .*only a classifier of one label, a score, can be read"):
        hf.load_pretrained(tmp_path / "x")
    edit_config(tmp_path / "x", id2label={"0": "score"}, label2id={"score": 0})
    edit_tensors(tmp_path / "x", score__weight=torch.ones(2, 48))
    with pytest.raises(UserError, match=r"score.weight has shape \[2, 48\], config.json needs \[1, 48\]"):
        hf.load_pretrained(tmp_path / "x")
    edit_tensors(tmp_path / "x", score__weight=...)
    with pytest.raises(UserError, match="these tensors are missing: score.weight"):
        hf.load_pretrained(tmp_path / "x")
