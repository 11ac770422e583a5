"""Which stages a command runs: what is done, stale, skipped or asked for by name; and what is refused."""

import json
import shutil

import pytest

from qwen3f.errors import UserError
from tests.pipeline import toy

LATER = "sft_cold_start,grpo,sft_fusion,grpo_general,dpo,evaluation"


@pytest.fixture
def done(whole, tmp_path, monkeypatch):
    """A copy of a pipeline that is done."""
    toy.fake(monkeypatch.setattr)
    return shutil.copytree(whole, tmp_path / "P")


def files(place):
    return {path: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"stages": "grop"}, "--config.stages=grop: there is no stage 'grop'; did you mean grpo?"),
        ({"skip": "sft_fuse"}, "--config.skip=sft_fuse: there is no stage 'sft_fuse'; did you mean sft_fusion?"),
        ({"stages": "zzz"}, "there is no stage 'zzz'; stages: pretrain_s1, pretrain_s2"),
        ({"stages": "grpo,sft_cold_start"}, "not in the order of the stages; write --config.stages=sft_cold_start,gr"),
        ({"stages": "grpo,grpo"}, "names a stage twice; write --config.stages=grpo"),
        ({"stages": "grpo", "skip": "grpo"}, "names grpo, which --config.skip leaves out"),
        (
            {"stages": "sft_cold_start,sft_fusion"},
            "sft_fusion starts from grpo, which would be stale by then; write "
            "--config.stages=sft_cold_start,grpo,sft_fusion, or --config.skip=grpo",
        ),
        ({"skip": "pretrain_s1"}, "pretrain_s2 needs weights to start from, but every stage before it is skipped: "),
        ({"set__grpo__batch_size": 0}, "config.set.grpo.batch_size must be at least 1, got 0"),
        ({"set__grpo__grpo__loss": "ppo"}, "config.set.grpo.grpo.loss='ppo' is unknown; use one of grpo, dr_grpo"),
        ({"set__dpo__dpo__loss": "kto"}, "config.set.dpo.dpo.loss='kto' is unknown; use one of sigmoid"),
        ({"set__measure__limit": -1}, "config.set.measure.limit must be at least 0, got -1"),
        (
            {"set__sft_cold_start__schedule__peak_lr": 1e-4},
            "sft_cold_start ran with other settings (schedule.peak_lr: its default -> 0.0001), so what is in ",
        ),
        ({"set__sft_cold_start__steps": 4}, "(steps: 3 -> 4), so what is in "),
        ({"set__sft_cold_start__steps": 4}, f"is stale: write --config.stages={LATER} to run these stages"),
        ({"skip": "grpo"}, "sft_fusion ran from grpo instead of sft_cold_start, so what is in "),
        ({"seed": 1}, "write --config.stages=pretrain_s1,pretrain_s2,"),
        ({"preset": "debug"}, "has the pipeline 'nano', not 'debug'; choose another"),
    ],
)  # fmt: skip
def test_what_is_refused_is_so_in_one_line_and_nothing_is_changed(changes, words, done):
    before = files(done)
    with pytest.raises(UserError) as caught:
        toy.go(done, **changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(done) == before


def test_a_stage_without_its_inputs_is_refused(done, tmp_path):
    with pytest.raises(UserError, match="grpo starts from sft_cold_start, which has not run; write --config.stages="
                                        "pretrain_s1,pretrain_s2,pretrain_s3,sft_cold_start,grpo$"):  # fmt: skip
        toy.go(tmp_path / "new", stages="grpo")
    shutil.rmtree(done / "04_sft_cold_start" / "checkpoints" / "3")
    with pytest.raises(UserError, match="starts from .*04_sft_cold_start/checkpoints/3, which is gone"):
        toy.go(done, stages="grpo")
    toy.go(done)  # no stage that is left needs it


def test_what_to_skip_is_all_up_to_a_stage_that_is_there(tmp_path, done):
    toy.go(tmp_path, stages="pretrain_s1")
    with pytest.raises(UserError, match=", or --config.skip=pretrain_s2,pretrain_s3,sft_cold_start$"):
        toy.go(tmp_path, stages="grpo", skip="pretrain_s3")
    found = toy.go(tmp_path, stages="grpo", skip="pretrain_s2,pretrain_s3,sft_cold_start")
    assert toy.stage(found, "grpo")["init_from"] == "01_pretrain_s1/checkpoints/3"


def test_a_checkpoint_that_was_trained_further_is_not_started_from(done):
    path = done / "04_sft_cold_start" / "checkpoints" / "3" / "manifest.json"
    path.write_text(json.dumps({"weights": "others"}))
    with pytest.raises(UserError, match="has changed since: write --config.stages=sft_cold_start,grpo to train "):
        toy.go(done, stages="grpo")


def test_stages_by_name_run_again_and_what_came_from_them_is_stale(done, capfd):
    found = toy.go(done, stages="sft_cold_start,grpo", set__sft_cold_start__steps=2)
    states = toy.statuses(found)
    assert all(states[name] == "done" for name in toy.NAMES[:5])
    assert all(states[name] == "stale" for name in toy.NAMES[5:])
    assert (done / "04_sft_cold_start.old-1" / "checkpoints" / "3").exists()
    assert not (done / "04_sft_cold_start" / "checkpoints" / "3").exists()
    assert (done / "05_grpo.old-1").exists()
    assert not (done / "06_sft_fusion.old-1").exists()
    assert toy.stage(found, "grpo")["init_from"] == "04_sft_cold_start/checkpoints/2"
    rest = ",".join(toy.NAMES[5:])
    assert f"stale: {', '.join(toy.NAMES[5:])}; write --config.stages={rest}" in capfd.readouterr().out
    with pytest.raises(UserError, match="sft_fusion ran from another grpo than there is now"):
        toy.go(done, set__sft_cold_start__steps=2)
    found = toy.go(done, stages=rest, set__sft_cold_start__steps=2)
    assert set(toy.statuses(found).values()) == {"done"}


def test_stages_that_run_again_alike_leave_what_came_from_them_sound(done, whole):
    found = toy.go(done, stages="sft_cold_start")
    assert set(toy.statuses(found).values()) == {"done"}
    assert toy.numbers(done) == toy.numbers(whole)


def test_stages_by_name_that_were_stopped_go_on_with_what_is_left(done, monkeypatch, tmp_path, capfd):
    trouble = tmp_path / "trouble"
    monkeypatch.setenv("TROUBLE", str(trouble))
    trouble.write_text("grpo crash")
    with pytest.raises(RuntimeError):
        toy.go(done, stages="sft_cold_start,grpo", set__sft_cold_start__steps=2)
    trouble.unlink()
    capfd.readouterr()
    found = toy.go(done, stages="sft_cold_start,grpo", set__sft_cold_start__steps=2)
    assert "training 04_sft_cold_start" not in capfd.readouterr().out
    assert found["left"] == []
    assert toy.statuses(found)["grpo"] == "done"
    assert not (done / "04_sft_cold_start.old-2").exists()
    assert not (done / "05_grpo.old-2").exists()


def test_an_interrupted_stage_does_not_go_on_with_other_settings(tmp_path, done, monkeypatch):
    trouble, place = tmp_path / "trouble", tmp_path / "Q"
    monkeypatch.setenv("TROUBLE", str(trouble))
    trouble.write_text("pretrain_s2 crash")  # at its second step, after a checkpoint
    with pytest.raises(RuntimeError):
        toy.go(place)
    trouble.unlink()
    with pytest.raises(UserError, match="pretrain_s2 began with other settings .steps: 3 -> 2.*stages=pretrain_s2"):
        toy.go(place, set__pretrain_s2__steps=2)
    found = toy.go(place, set__pretrain_s2__steps=2, stages="pretrain_s2")
    assert toy.stage(found, "pretrain_s2")["steps"] == 2
    assert (place / "02_pretrain_s2.old-1").exists()


def test_a_skipped_stage_is_left_out_and_its_follower_starts_before_it(tmp_path, done):
    found = toy.go(tmp_path / "Q", skip="pretrain_s2,grpo")
    assert toy.statuses(found)["grpo"] == "skipped"
    assert toy.stage(found, "pretrain_s3")["from"] == "pretrain_s1"
    assert toy.stage(found, "sft_fusion")["init_from"] == "04_sft_cold_start/checkpoints/3"
    assert not (tmp_path / "Q" / "05_grpo").exists()


def test_a_chain_begins_with_other_weights_where_a_stage_names_them(done, tmp_path):
    weights = str(done / "03_pretrain_s3" / "checkpoints" / "3")
    found = toy.go(tmp_path / "Q", skip="pretrain_s1,pretrain_s2,pretrain_s3", set__sft_cold_start__init_from=weights)
    assert toy.stage(found, "sft_cold_start")["from"] is None
    assert toy.stage(found, "sft_cold_start")["init_from"] == weights
    assert toy.numbers(tmp_path / "Q")[0]["dpo"] == toy.numbers(done)[0]["dpo"]


def test_how_and_where_a_stage_runs_makes_nothing_stale(done, capfd):
    toy.go(done, device="cpu", set__grpo__log_every=7, set__dpo__checkpoint__every=1, set__grpo__data__workers=2)
    assert "nothing left to run" in capfd.readouterr().out


def test_directories_without_a_record_are_moved_aside(done):
    (done / "pipeline.json").unlink()
    toy.go(done, skip=",".join(toy.NAMES[1:]))
    assert (done / "01_pretrain_s1.old-1" / "checkpoints" / "3").exists()


@pytest.mark.parametrize("content", ["{", '{"stages": 3}', '{"stages": [{"name": "x"}], "preset": "nano"}', "[]"])
def test_a_record_that_is_none_is_named(content, done):
    (done / "pipeline.json").write_text(content)
    with pytest.raises(UserError, match="pipeline.json is not a pipeline's record"):
        toy.go(done)


def test_a_single_run_s_directory_is_refused(done, tmp_path):
    (tmp_path / "W").mkdir()
    (tmp_path / "W" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has a single run; choose another directory for the"):
        toy.go(tmp_path / "W")
