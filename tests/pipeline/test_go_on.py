"""How a command resumes after it or another command was stopped, or after files were deleted. Whatever a refusal says
to write is a command that works."""

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from qwen3f.errors import TrainingError, UserError
from qwen3f.pipeline import record
from qwen3f.train import lock
from tests.pipeline import toy

SHORT = "pretrain_s2,pretrain_s3,sft_fusion,grpo_general,dpo"  # skipped: four stages are left


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return toy.made(tmp_path_factory.mktemp("short") / "P", skip=SHORT)


@pytest.fixture
def done(short, tmp_path, monkeypatch):
    toy.fake(monkeypatch.setattr)
    return shutil.copytree(short, tmp_path / "P")


@pytest.fixture
def trouble(tmp_path, monkeypatch):
    path = tmp_path / "trouble"
    monkeypatch.setenv("TROUBLE", str(path))
    return path


def go(place, **changes):
    return toy.go(place, skip=SHORT, **changes)


def trained(said):
    """The stages that trained, in order, from what was printed."""
    return re.findall(r"^training \d+_(\w+)", said, re.MULTILINE)


def advised(place, **changes):
    """The stages that a refusal says to write."""
    with pytest.raises(UserError) as caught:
        go(place, **changes)
    assert "\n" not in str(caught.value)
    return re.search(r"write --config\.stages=([\w,]+)", str(caught.value))[1]


def fails(place, error=UserError, **changes):
    with pytest.raises(error):
        go(place, **changes)


def test_stages_with_other_settings_are_run_whole_whatever_was_stopped_before(done, trouble):
    trouble.write_text("evaluation wrong-asking")
    fails(done, stages="grpo,evaluation", set__grpo__steps=2)
    assert toy.read(done)["left"] == ["evaluation"]
    trouble.unlink()
    changes = {"set__sft_cold_start__steps": 4}
    names = advised(done, **changes)
    assert names == "sft_cold_start,grpo,evaluation"
    found = go(done, stages=names, **changes)
    assert set(toy.statuses(found).values()) == {"done", "skipped"}
    assert toy.stage(found, "grpo")["steps"] == 3


def test_a_stage_whose_checkpoint_was_deleted_runs_again_with_those_that_are_left(done, trouble, capfd):
    trouble.write_text("grpo crash")
    fails(done, TrainingError, stages="sft_cold_start,grpo")
    trouble.unlink()
    shutil.rmtree(done / "04_sft_cold_start" / "checkpoints" / "3")
    capfd.readouterr()
    found = go(done, stages="sft_cold_start,grpo")
    assert trained(capfd.readouterr().out) == ["sft_cold_start", "grpo"]
    assert set(toy.statuses(found).values()) == {"done", "skipped"}


def test_other_stages_than_those_that_were_stopped_run_whole(done, trouble, capfd):
    trouble.write_text("evaluation wrong-asking")
    fails(done, stages="grpo,evaluation")
    trouble.unlink()
    capfd.readouterr()
    go(done, stages="sft_cold_start,grpo,evaluation")
    assert trained(capfd.readouterr().out) == ["sft_cold_start", "grpo"]


@pytest.mark.parametrize(
    "changes, action",
    [({"overlap": True}, "wrong"), ({"overlap": True}, "hang"), ({"set__measure__limit": 10}, "wrong")],
)
def test_stages_by_name_that_were_stopped_in_their_questions_are_not_trained_again(
    changes, action, done, trouble, capfd
):
    asked = "grpo" if "overlap" in changes else "sft_cold_start"
    trouble.write_text(f"{asked} {action}-asking")
    command = {"stages": "grpo", **changes}
    if action == "hang":
        process = toy.start(done, skip=SHORT, **command)
        toy.wait_for(Path(f"{trouble}.reached"), process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    else:
        fails(done, **command)
    stopped = toy.read(done)
    assert (stopped["asked"], stopped["left"]) == (["grpo"], [])
    assert toy.statuses(stopped)["grpo"] == "done"
    trouble.unlink()
    capfd.readouterr()
    found = go(done, **command)
    assert trained(capfd.readouterr().out) == []
    assert (found["asked"], found["left"]) == ([], [])
    assert not (done / "05_grpo.old-2").exists()
    assert toy.stage(found, asked)["measures"]["reasoning_plain"]["n"] == (
        20 if "set__measure__limit" in changes else 128
    )
    go(done, **command)  # the command is complete now, so it runs the stage again
    assert trained(capfd.readouterr().out) == ["grpo"]


def test_a_kill_behind_a_stage_s_last_write_does_not_train_it_again(done, monkeypatch, capfd):
    """The status "done" and the list of stages that are left are written in one write."""
    write = record.write_atomically

    def killed(path, content):
        write(path, content)
        if toy.statuses(json.loads(content))["grpo"] == "done" and trained(capfd.readouterr().out):
            raise KeyboardInterrupt

    monkeypatch.setattr(record, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        go(done, stages="grpo")
    monkeypatch.setattr(record, "write_atomically", write)
    go(done, stages="grpo")
    assert trained(capfd.readouterr().out) == []


def test_a_kill_while_a_directory_is_moved_aside_leaves_nothing_that_counts_as_done(done, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            go(done, stages="evaluation")
    assert toy.statuses(toy.read(done))["evaluation"] == "waiting"
    assert toy.statuses(go(done))["evaluation"] == "done"


@pytest.mark.parametrize("what", ["05_grpo", "05_grpo/checkpoints", "05_grpo/checkpoints/3/manifest.json"])
def test_a_last_checkpoint_that_is_gone_is_named_and_the_advice_works(what, done):
    path = done / what
    path.unlink() if path.is_file() else shutil.rmtree(path)
    before = sorted(done.rglob("*"))
    names = advised(done)
    assert names == "grpo"
    assert sorted(done.rglob("*")) == before
    found = go(done, stages=names)
    assert set(toy.statuses(found).values()) == {"done", "skipped"}
    assert (done / "05_grpo" / "checkpoints" / "3").is_dir()


def test_a_last_checkpoint_that_was_trained_further_is_named(done):
    (done / "05_grpo" / "checkpoints" / "3" / "manifest.json").write_text('{"weights": "others"}')
    with pytest.raises(UserError, match="05_grpo/checkpoints/3, the checkpoint of grpo, has changed since: write"):
        go(done)


def test_a_checkpoint_that_goes_while_stages_run_is_named_at_the_end(done, monkeypatch):
    write = record.write_atomically

    def deleting(path, content):
        write(path, content)
        if json.loads(content)["asked"]:
            shutil.rmtree(done / "04_sft_cold_start", ignore_errors=True)

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_atomically", deleting)
        assert advised(done, stages="evaluation") == "sft_cold_start"
    found = go(done, stages="sft_cold_start")
    assert set(toy.statuses(found).values()) == {"done", "skipped"}


def test_stages_that_are_gone_are_advised_with_those_between_and_before_that_they_need(whole, tmp_path, monkeypatch):
    toy.fake(monkeypatch.setattr)
    place = shutil.copytree(whole, tmp_path / "P")
    shutil.rmtree(place / "03_pretrain_s3" / "checkpoints")  # not needed while sft_cold_start is there
    toy.go(place)
    shutil.rmtree(place / "04_sft_cold_start")
    shutil.rmtree(place / "06_sft_fusion")
    words = "sft_cold_start/checkpoints/3, the checkpoint of sft_cold_start, is gone: write --config.stages="
    with pytest.raises(UserError, match=f"{words}pretrain_s3,sft_cold_start,grpo,sft_fusion to "):
        toy.go(place)
    found = toy.go(place, stages="pretrain_s3,sft_cold_start,grpo,sft_fusion")
    assert set(toy.statuses(found).values()) == {"done"}
    assert toy.numbers(place) == toy.numbers(whole)


def test_stages_that_change_what_is_gone_anyway_are_not_refused(done):
    shutil.rmtree(done / "05_grpo")
    found = go(done, stages="sft_cold_start", set__sft_cold_start__steps=2)
    assert toy.statuses(found)["grpo"] == "stale"


@pytest.mark.parametrize("name", ["grpo", "evaluation"])
def test_weights_of_a_stage_s_own_that_are_not_there_are_refused_before_anything_moves(name, done, tmp_path):
    before = sorted(done.rglob("*"))
    with pytest.raises(
        UserError, match=f"--config.set.{name}.init_from=/nowhere: there is no /nowhere; write a workdir"
    ):
        go(done, stages=name, **{f"set__{name}__init_from": "/nowhere"})
    with pytest.raises(UserError, match=rf"--config.set.{name}.init_from={tmp_path}: there is no .*checkpoints and no"):
        go(done, stages=name, **{f"set__{name}__init_from": str(tmp_path)})
    assert sorted(done.rglob("*")) == before
    assert set(toy.statuses(toy.read(done)).values()) == {"done", "skipped"}


def test_a_stage_that_has_begun_needs_its_own_weights_no_more(done, tmp_path, trouble):
    weights = shutil.copytree(done / "04_sft_cold_start", tmp_path / "W")
    command = {"stages": "grpo", "set__grpo__init_from": str(weights / "checkpoints" / "3")}
    trouble.write_text("grpo crash")
    fails(done, TrainingError, **command)
    trouble.unlink()
    (done / "05_grpo" / "config.json").write_text("{}")  # as a real run writes it
    weights.rename(tmp_path / "elsewhere")
    fails(done, TrainingError, **command)  # fake_launch.py reads them again; a real stage does not


def test_what_cannot_be_changed_is_one_line(done, monkeypatch):
    def shut(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "settings.json")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", shut)
        with pytest.raises(
            UserError, match=rf"^--workdir={done}: settings.json in it cannot be changed .Permission den"
        ):
            go(done, set__measure__limit=10)
    assert toy.stage(go(done, set__measure__limit=10), "grpo")["measures"]["reasoning_plain"]["n"] == 20


def test_a_stage_s_directory_that_is_read_only_is_not_waited_for(done, monkeypatch):
    """The error is that of lock.held. Only a lock that another process holds becomes free by itself."""
    held = lock.held

    def read_only(place):
        if place.name == "09_evaluation":
            raise UserError(f"{place} cannot be written") from PermissionError(errno.EACCES, "Permission denied")
        return held(place)

    monkeypatch.setattr(lock, "held", read_only)
    with pytest.raises(UserError, match="09_evaluation cannot be written"):
        go(done, stages="evaluation")
    assert (done / "09_evaluation").is_dir()


def test_a_directory_of_another_name_and_a_link_to_it_hold_the_same_pipeline(done, tmp_path, trouble, capfd):
    place = done.rename(tmp_path / "模型 ü $x")
    (tmp_path / "link").symlink_to(place)
    trouble.write_text("grpo wrong-asking")
    fails(tmp_path / "link", stages="grpo")
    trouble.unlink()
    capfd.readouterr()
    found = go(place, stages="grpo")
    said = capfd.readouterr().out
    assert trained(said) == []
    assert f"--config.init_from='{place}/05_grpo/checkpoints/3'" in said
    assert set(toy.statuses(found).values()) == {"done", "skipped"}
    go(tmp_path / "link")
    assert "nothing left to run" in capfd.readouterr().out
