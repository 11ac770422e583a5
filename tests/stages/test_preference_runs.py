"""The contract's commands in sequence: a reward model, DPO on given pairs, DPO on answers ranked by that model."""

import pytest

from qwen3f import cli
from tests.stages import toy_chats
from tests.train.runs import metrics


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return toy_chats.write_weights(tmp_path_factory.mktemp("runs") / "nano", {})


def run(experiment, start, workdir, cache, **changes):
    config = cli.load_experiment(f"experiments/{experiment}.py:nano")
    config.update(init_from=str(start), device="cpu", steps=2, batch_size=2)
    config.data.problems = 400
    config.data.cache = str(cache)
    config.eval.batch_size = 2
    if experiment != "dpo_online":
        config.data.update(max_samples=20, max_heldout=3)
    config.update_from_flattened_dict(changes)
    cli.run_stage(config, workdir, False)
    return metrics(workdir)[-1]


def test_reward_model_then_dpo_then_online_dpo(start, tmp_path, capsys):
    line = run("reward_model", start, tmp_path / "R", tmp_path / "cache")
    said = capsys.readouterr().out
    assert f"config.init_from={start} has no score.weight; it starts fresh" in said
    assert "right-or-wrong (80.00% of the rows)" in said
    kinds = ("right-or-wrong", "boxed-or-not", "short-or-padded")
    values = {f"val_{name}" for name in ("loss", "accuracy", "margin", "calibration")}
    of_sources = {f"{name}/{kind}" for name in values for kind in kinds}
    assert {name for name in line if name.startswith("val_")} == values | of_sources
    assert {"chosen_score", "rejected_score", "score_margin", "accuracy", "padding"} <= line.keys()

    changes = {"eval.questions": 3, "eval.max_new_tokens": 3}
    line = run("dpo", start, tmp_path / "D", tmp_path / "cache", **changes)
    said = capsys.readouterr().out
    assert said.count("⟦") == 2  # the two answers of a pair
    assert "held-out questions: " in said
    assert {"answers_wins", "answers_accuracy", "answers_well_formed", "answers_tokens", *values} <= line.keys()
    assert {"kl", "chosen_log_prob", "rejected_log_prob", "reward_margin", "accuracy"} <= line.keys()
    assert 1 <= line["answers_tokens"] <= 3

    changes = {"online.judge": "reward_model", "online.reward_model": str(tmp_path / "R"), "eval.questions": 3}
    changes |= {"online.max_new_tokens": 24, "online.temperature": 1.5, "online.samples": 6}
    line = run("dpo_online", tmp_path / "D", tmp_path / "O", tmp_path / "cache", **changes)
    assert {
        "val_wins",
        "ties",
        "asked",
        "ended",
        "answer_tokens",
        "kl",
        "rollout_seconds",
        "reward_seconds",
    } <= line.keys()
    assert line["asked"] >= 2
