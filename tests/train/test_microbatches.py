"""The number of micro-batches that config.microbatches=0 chooses: against trying all. Plan and run choose the same."""

import dataclasses
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from qwen3f import cli, presets
from qwen3f.errors import UserError
from qwen3f.plan import hardware
from qwen3f.plan.case import Case
from qwen3f.plan.config import find_hardware, from_config
from qwen3f.plan.hardware import TABLE, card, parse_hardware
from qwen3f.plan.make import make
from qwen3f.train import microbatches as M
from qwen3f.train.loop import run
from qwen3f.train.setup import make_setup
from sharding.axes import sizes_only
from sharding.mesh import MeshShape, parse_mesh
from sharding.pipeline.cut import Pipeline

GIB = 2**30
CFG = presets.get("debug").replace(num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=4)
PIPELINES = [Pipeline(), Pipeline("interleaved", 2), Pipeline("zero_bubble", 1), Pipeline("zbv", 2)]
SIZES = {"pp": st.sampled_from([1, 2, 4]), "dr": st.integers(1, 2), "dp": st.integers(1, 3), "tp": st.integers(1, 2)}


def test_candidates_of_very_many_rows_are_found_at_once():
    found = M.candidates(MeshShape(pp=2), Pipeline(), 2**32 - 2**16, 32)
    assert found[0] == 2
    assert 2**11 < found[-1] <= 2**12


@given(st.builds(MeshShape, **SIZES), st.sampled_from(PIPELINES), st.integers(1, 48), st.sampled_from([6, 7, 16]))
@settings(deadline=None)
def test_candidates_are_what_runs_with_all_ranks_at_work(shape, pipeline, rows, length):
    def runs(number):
        try:
            Case(CFG, shape, rows, length, TABLE["h100"], number, pipeline=pipeline)
        except UserError:
            return False
        return True

    wanted = [number for number in range(shape.pp, rows + 1) if runs(number)]
    if wanted:
        assert list(M.candidates(shape, pipeline, rows, length)) == wanted
        return
    with pytest.raises(UserError) as caught:
        M.candidates(shape, pipeline, rows, length)
    if named := re.search(r"config\.batch_size=.*; write a multiple of (\d+)$", str(caught.value)):
        assume(int(named[1]) * length % shape.tp == 0)
        assert M.candidates(shape, pipeline, int(named[1]) * shape.tp, length)
    else:  # the error of another rule: tp cannot cut the tokens
        assert "which don't divide by tp=2" in str(caught.value)


@given(st.sets(st.integers(1, 64), min_size=1), st.sampled_from([1, 2, 4, 8]), st.sets(st.integers(1, 64)))
def test_the_fewest_that_fit_are_chosen_and_under_pp_of_those_with_a_small_bubble(numbers, pp, fitting):
    numbers = sorted(numbers)
    got = M.choose(numbers, pp, lambda number: number in fitting)
    assert got in numbers
    good = [n for n in numbers if n in fitting and (pp == 1 or n >= 4 * pp)]
    assert got == (min(good) if good else max(numbers))


@pytest.mark.parametrize(
    "mesh, batch, wanted",
    [("", 64, 1), ("dp8", 64, 1), ("pp4", 64, 16), ("dp8,tp2,pp4", 64, 8), ("pp2", 4, 4), ("dp2,pp2", 64, 8)],
)
def test_without_a_card_one_is_chosen_or_what_fills_the_pipeline(mesh, batch, wanted):
    config = cli.load_experiment("experiments/pretrain_s1.py:small")
    config.update(device="cpu", mesh=mesh, batch_size=batch)
    assert make_setup(config).microbatches == wanted


CASES = [
    ("pretrain_s1.py:small", ""),
    ("pretrain_s1.py:small", "dp4,tp2"),
    ("pretrain_s1.py:large", "dp8,tp2,pp4"),
    ("pretrain_s1.py:qwen3-4b", "cp2,dp2"),
    ("pretrain_s1.py:debug_moe", "ep2"),
    ("pretrain_s3.py:small", "dp8"),
    ("demo.py", ""),
]


@pytest.fixture(params=["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def on_card(request, monkeypatch):
    """A machine with this card. Asking for its free memory is an error."""

    def asked(*_):
        raise AssertionError("what is free was asked for")

    found = card(request.param, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
    for module in ("qwen3f.plan.config", "qwen3f.train.setup"):
        monkeypatch.setattr(f"{module}.this_card", lambda: found)
    return found


@pytest.mark.parametrize("experiment, mesh", CASES)
def test_a_run_on_a_card_takes_what_its_plan_takes(experiment, mesh, on_card):
    config = cli.load_experiment(f"experiments/{experiment}")
    config.mesh = mesh
    case = from_config(config)
    assert (case.hardware, case.automatic) == (on_card, True)
    assert make_setup(config).microbatches == case.microbatches
    config.microbatches = case.rows * case.microbatches  # one row each
    assert make_setup(config).microbatches == from_config(config).microbatches == config.microbatches


@pytest.mark.parametrize("experiment, mesh", [case for case in CASES if "pp" not in case[1]])
@pytest.mark.parametrize("name", TABLE)
def test_the_fewest_whose_peak_has_room_by_whole_plans(experiment, mesh, name):
    config = cli.load_experiment(f"experiments/{experiment}")
    config.mesh, config.hardware = mesh, name
    case = from_config(config)
    rows = case.rows * case.microbatches
    numbers = [number for number in range(1, rows + 1) if rows % number == 0]
    plans = {number: make(dataclasses.replace(case, microbatches=number)) for number in numbers}
    fitting = [number for number in numbers if plans[number].fits]
    assert case.microbatches == (fitting[0] if fitting else rows)


def test_what_fits_nowhere_is_cut_into_rows_and_said():
    config = cli.load_experiment("experiments/pretrain_s1.py:medium")
    config.hardware = "h100"
    plan = make(from_config(config))
    assert (plan.setup.microbatches, plan.setup.rows, plan.fits) == (64, 1, False)


def test_cards_by_their_names():
    assert card("NVIDIA H100 80GB HBM3", 85_000_000_000) is TABLE["h100"]
    assert card("NVIDIA H200", 1) is TABLE["h200"]
    for name in ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-80GB"):
        other = card(name, 40 * GIB + 5)
        assert (other.name, other.memory) == (name, 40 * GIB)
    assert parse_hardware("auto,node=4", TABLE["h200"]) == dataclasses.replace(TABLE["h200"], node=4)


def test_a_plan_wants_rates_that_it_knows(monkeypatch):
    monkeypatch.setattr("qwen3f.plan.config.this_card", lambda: card("NVIDIA A100-SXM4-80GB", 80 * GIB))
    with pytest.raises(UserError, match=r"machine's card, NVIDIA A100-SXM4-80GB, are not known; write h100"):
        find_hardware("auto")
    assert find_hardware("h200") == TABLE["h200"]
    monkeypatch.setattr("qwen3f.plan.config.this_card", lambda: None)
    assert find_hardware("auto") == TABLE["h100"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_cuda_there_is_no_card():
    assert hardware.this_card() is None


def test_ranks_that_chose_otherwise_are_told():
    M.check_agreed([4, 4, 4])
    with pytest.raises(UserError, match=r"rank 0 chose 4 and rank 2 8, .* write --config.microbatches=8"):
        M.check_agreed([4, 4, 8])


@pytest.mark.parametrize("mesh, rows, microbatches, wanted", [("dp2", 8, 4, 1), ("pp2", 8, 6, 2), ("dp2,pp2", 8, 8, 4)])
def test_an_evaluation_passes_in_parts_where_ranks_can_share_the_work(mesh, rows, microbatches, wanted):
    assert M.evaluation_parts(rows, microbatches, sizes_only(parse_mesh(mesh))) == wanted


def test_an_evaluation_that_ranks_cannot_share_names_no_parts():
    config = ConfigDict({"eval": {"batch_size": 14}, "seq_len": 8})
    with pytest.raises(
        UserError, match=r"^config\.eval\.batch_size=14 doesn't divide by dp=3; make it a multiple of 3$"
    ):
        M.check_evaluation(config, 4, sizes_only(parse_mesh("pp2,dp3")))


def test_a_run_says_what_was_chosen_and_does_not_where_it_was_written(make, tmp_path, capsys):
    run(make(steps=1), tmp_path / "chosen", progress=False)
    assert "microbatches: 1, of 4 rows each on a rank (config.microbatches=0)\n" in capsys.readouterr().out
    run(make(steps=1, microbatches=2), tmp_path / "written", progress=False)
    assert "microbatches:" not in capsys.readouterr().out
    with pytest.raises(UserError, match="config.microbatches must be at least 0, got -1"):
        make_setup(make(microbatches=-1))
