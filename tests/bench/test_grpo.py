"""The GRPO bench runs our stage, and TRL if it is installed."""

import json

import pytest

from qwen3f.bench import grpo

ARGUMENTS = "--device=cpu --preset=nano --prompts=2 --samples=2 --new=4 --seq_len=192 --rows=2 --judges=1 --steps=1"


def rows(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]


def test_ours_runs(capsys):
    assert grpo.main([*ARGUMENTS.split(), "--cases=ours"]) == 0
    (ours,) = rows(capsys)
    assert ours["tokens_a_completion"] <= 4
    assert ours["sampler_gap"] < 1e-4  # so the sampler has the trainer's weights
    shares = [ours[name] for name in ("rollout", "rewards", "log_probs_and_packing", "update")]
    assert all(share > 0 for share in shares)
    assert sum(shares) == pytest.approx(1, abs=1e-6)


@pytest.mark.nightly
def test_trl_runs(capsys):
    assert grpo.main([*ARGUMENTS.split(), "--cases=trl", "--trl_rows=4"]) == 0
    (theirs,) = rows(capsys)
    assert theirs["tokens_a_completion"] <= 4
    assert 0 < theirs["rollout"] < 1
