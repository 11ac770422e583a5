"""The rows of the DPO bench are pairs, the same for both sides."""

import json
import math

import pytest
import torch

from qwen3f import params as P
from qwen3f import presets
from qwen3f.bench import dpo
from qwen3f.stages.dpo import DPO, make_objective
from qwen3f.train.optimizer import AdamW
from qwen3f.train.outputs import make_outputs
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import from_params
from qwen3f.train.step import StepOptions, make_train_step

CFG = presets.get("nano").replace(num_hidden_layers=1)
ARGUMENTS = "--device=cpu --preset=nano --rows=1 --seq_len=70 --document=16 --prompt=4"


def test_a_policy_that_is_its_reference_has_the_loss_ln_2():
    """And the margin 0. So every document is one answer of a pair, and the right tokens of it count."""
    batch = dpo.pair_rows(2, 70, 16, 4, CFG.vocab_size)
    params = P.init_params(CFG, 0)
    batch["ref_logprobs"] = make_outputs(CFG)(params, batch)
    step = make_train_step(CFG, make_objective(DPO()), StepOptions(AdamW(), Schedule("constant", 0.0, 10)))
    _, metrics = step(from_params(CFG, params, 0), batch)
    assert metrics["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["reward_margin"].item() == pytest.approx(0, abs=1e-5)
    assert metrics["chosen_log_prob"].item() < -10


def test_pairs_are_the_rows():
    batch = dpo.pair_rows(2, 70, 16, 4, 1000)
    pairs = dpo.pairs_of(batch, 16, 4)
    assert len(pairs) == 4
    assert {len(one["prompt_ids"]) for one in pairs} == {4}
    assert {len(one[kind]) for one in pairs for kind in ("chosen_ids", "rejected_ids")} == {13}
    first = pairs[0]
    assert [*first["prompt_ids"], *first["chosen_ids"]][:-1] == batch["tokens"][0, :16].tolist()
    assert [*first["prompt_ids"], *first["rejected_ids"]][1:] == batch["targets"][0, 16:32].tolist()
    counted = [one["chosen_ids"] + one["rejected_ids"] for one in pairs]
    assert torch.equal(torch.tensor(counted).flatten(), batch["targets"][batch["loss_weights"] > 0])
    assert batch["segments"].max() == 4
    assert (batch["segments"][:, 64:] == 0).all()


def test_ours_runs(capsys):
    assert dpo.main([*ARGUMENTS.split(), "--cases=sft,dpo,reference"]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith('{"')]
    assert [row["who"] for row in rows] == ["qwen3f SFT", "qwen3f DPO", "qwen3f reference pass"]
    assert all(row["tokens_s"] > 0 for row in rows)
    assert "DPO over SFT, tokens/s: " in out


@pytest.mark.nightly
def test_trl_runs(capsys):
    assert dpo.main([*ARGUMENTS.split(), "--cases=dpo,trl", "--trl_steps=1"]) == 0
    out = capsys.readouterr().out
    assert '"who": "TRL DPO", "step_ms"' in out
    assert "qwen3f over TRL, tokens/s: " in out
