"""Metrics of held-out pairs against formulas; scores that are not finite end a run with an error."""

import math

import pytest
import torch

from qwen3f import params, presets
from qwen3f.errors import TrainingError
from qwen3f.interop import hf
from qwen3f.preference.evaluate import ranking
from qwen3f.train import loop
from tests.stages import toy_pairs
from tests.stages.toy_chats import SMALL, small_tokenizer


def test_figures_are_the_formulas():
    g = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(500, generator=g, dtype=torch.float64) for _ in range(2))
    got = ranking(chosen, rejected)
    margins = [a - b for a, b in zip(chosen.tolist(), rejected.tolist())]
    assert got["accuracy"] == sum(m > 0 for m in margins) / 500
    assert got["margin"] == pytest.approx(sum(margins) / 500, rel=1e-12)
    assert got["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 500, rel=1e-12)
    error = 0.0
    for low in range(50, 100, 5):
        own = [(m > 0, p) for m in margins for p in [1 / (1 + math.exp(-abs(m)))] if low <= 100 * p < low + 5]
        error += abs(sum(right - p for right, p in own)) / 500
    assert got["calibration"] == pytest.approx(error, rel=1e-9)


def test_calibrated_scores_have_a_small_error_and_certain_wrong_ones_a_large_one():
    g = torch.Generator().manual_seed(1)
    margin = 2 * torch.randn(20_000, generator=g).abs()
    won = torch.rand(20_000, generator=g) < torch.sigmoid(margin)
    signed = torch.where(won, margin, -margin)
    assert ranking(signed, torch.zeros(20_000))["calibration"] < 0.02  # 10 bins of about 2,000, each ± 0.01
    assert ranking(torch.full((9,), -9.0), torch.zeros(9))["calibration"] > 0.99
    equal = ranking(torch.zeros(3), torch.zeros(3))
    assert (equal["accuracy"], equal["loss"]) == (0.0, pytest.approx(math.log(2)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(bad):
    with pytest.raises(TrainingError, match="1 of 3 held-out pairs have a value that is not finite"):
        ranking(torch.tensor([1.0, bad, 2.0]), torch.zeros(3))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("nan")
    toy_pairs.write_data(place)
    cfg = presets.get("nano").replace(**SMALL, scalar_head=True)
    weights = params.init_params(cfg, 0)
    weights["score.weight"][0, 3] = float("nan")
    hf.save_pretrained(place / "nan", cfg, weights, small_tokenizer(place / "tok"))
    return place


def test_nan_scores_end_training_and_answers_ranked_by_them(root, tmp_path):
    config = toy_pairs.make_config(root, "reward_model", init_from=str(root / "nan"))
    with pytest.raises(TrainingError, match="step 1"):
        loop.run(config, tmp_path / "a", progress=False)
    config = toy_pairs.online_config(root)
    config.online.update(judge="reward_model", reward_model=str(root / "nan"))
    with pytest.raises(TrainingError, match=r"the reward model gave 32 of 32 answers a score that is not finite"):
        loop.run(config, tmp_path / "b", progress=False)
    assert not list(tmp_path.glob("*/checkpoints/*"))
