"""A pipeline from start to end, whatever stops it on the way. fake_launch.py stands in for training."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from qwen3f.errors import TrainingError, UserError
from qwen3f.pipeline import record
from qwen3f.train import lock
from tests.pipeline import toy

BRIEF = "pretrain_s2,pretrain_s3,grpo_general,dpo"  # stages that are left out


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    toy.fake(monkeypatch.setattr)


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """As the fixture `whole`, with half of the stages."""
    return toy.made(tmp_path_factory.mktemp("brief") / "P", skip=BRIEF)


@pytest.fixture
def trouble(tmp_path, monkeypatch):
    path = tmp_path / "trouble"
    monkeypatch.setenv("TROUBLE", str(path))
    return path


def test_each_stage_starts_from_the_one_before_and_all_is_recorded(whole):
    found = toy.read(whole)
    assert found["preset"] == "nano"
    assert found["seed"] == 0
    assert found["budget_s"] == sum(one["budget_s"] for one in found["stages"])
    assert [one["name"] for one in found["stages"]] == list(toy.NAMES)
    for number, one in enumerate(found["stages"]):
        before = found["stages"][number - 1] if number else None
        assert one["status"] == "done"
        assert one["workdir"] == f"{number + 1:02d}_{one['name']}"
        assert one["from"] == (before["name"] if before else None)
        assert one["init_from"] == (f"{before['workdir']}/checkpoints/3" if before else None)
        assert len(one["inputs"]) == 64
        assert one["started"] > 1.7e9
        assert one["seconds"] > 0
        assert one["steps"] == (3 if one["name"] != "evaluation" else 0)
        assert one["commit"] == found["commit"]
    assert toy.stage(found, "grpo")["overrides"]["steps"] == 3


def test_text_stages_are_measured_by_their_loss_and_the_others_by_the_same_questions(whole):
    found = toy.read(whole)
    keys = {one["name"]: set(one["measures"]) for one in found["stages"]}
    losses, answers = {"val_loss/embedded", "val_loss/reasoning"}, {"reasoning_thinking", "reasoning_plain"}
    assert keys["pretrain_s1"] == keys["pretrain_s2"] == losses
    assert keys["pretrain_s3"] == losses | answers  # the cold start begins with its weights
    assert all(keys[name] == answers for name in toy.NAMES[3:])
    one = toy.stage(found, "grpo")["measures"]["reasoning_thinking"]
    assert set(one) == {"value", "low", "high", "n"}
    assert one["n"] == 128


def test_the_same_command_again_runs_nothing_and_says_so(whole, capsys):
    before = toy.read(whole)
    assert toy.go(whole) == before
    out = capsys.readouterr().out
    assert "nothing left to run" in out
    assert "training" not in out


def test_the_end_has_a_table_and_the_next_commands(tmp_path, capfd):
    toy.go(tmp_path / "P", skip="pretrain_s2,pretrain_s3,grpo,sft_fusion,grpo_general,dpo")
    out = capfd.readouterr().out
    lines = out.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("stage  ") or line.startswith("stage "))
    assert lines[head].split() == ["stage", "measure", "before", "after", "time"]
    assert any(line.startswith("sft_cold_start") and "% (" in line for line in lines[head:])
    assert any(line.startswith("grpo ") and "skipped" in line for line in lines[head:])
    assert f"--config.init_from={tmp_path}/P/04_sft_cold_start/checkpoints/3" in out
    assert "generate.py" in out
    assert "--config.prompt=" in out


KILLED = ("pretrain_s1", "grpo", "evaluation")  # one of each kind; the others run nightly


@pytest.mark.parametrize(
    "name", [*KILLED, *(pytest.param(name, marks=pytest.mark.nightly) for name in toy.NAMES if name not in KILLED)]
)
def test_a_pipeline_that_is_killed_in_any_stage_ends_with_the_same_numbers(name, whole, tmp_path, trouble):
    trouble.write_text(f"{name} hang{'-asking' if name == 'evaluation' else ''}")
    process = toy.start(tmp_path / "P")
    toy.wait_for(Path(f"{trouble}.reached"), process)
    process.kill()
    process.communicate()
    assert toy.stage(toy.read(tmp_path / "P"), name)["status"] == "running"
    trouble.unlink()
    toy.go(tmp_path / "P")
    assert toy.numbers(tmp_path / "P") == toy.numbers(whole)
    assert not list((tmp_path / "P").glob("*.old-*"))


def test_a_kill_while_questions_are_asked_trains_nothing_again(brief, tmp_path, trouble, capfd):
    trouble.write_text("grpo hang-asking")
    process = toy.start(tmp_path / "P", skip=BRIEF)
    toy.wait_for(Path(f"{trouble}.reached"), process)
    process.kill()
    process.communicate()
    trouble.unlink()
    toy.go(tmp_path / "P", skip=BRIEF)
    out = capfd.readouterr().out
    assert "training 06_sft_fusion" in out
    assert "training 05_grpo" not in out
    assert toy.numbers(tmp_path / "P") == toy.numbers(brief)


def test_questions_asked_beside_the_next_stage_have_the_same_answers(brief, tmp_path, trouble, capfd):
    trouble.write_text("sft_cold_start hang-asking")
    process = toy.start(tmp_path / "P", skip=BRIEF, overlap=True)
    toy.wait_for(Path(f"{trouble}.reached"), process)
    toy.wait_for(tmp_path / "P" / "05_grpo" / "checkpoints" / "3", process)  # did not wait for the answers
    process.kill()
    process.communicate()
    found = toy.read(tmp_path / "P")
    assert toy.stage(found, "sft_cold_start")["status"] == "done"
    assert not toy.stage(found, "sft_cold_start")["measures"]
    trouble.unlink()
    toy.go(tmp_path / "P", skip=BRIEF, overlap=True)
    assert toy.numbers(tmp_path / "P") == toy.numbers(brief)
    capfd.readouterr()
    toy.go(tmp_path / "P", skip=BRIEF, overlap=True)
    assert "reasoning_thinking" not in capfd.readouterr().out.partition("stage ")[0]  # nothing is asked twice


@pytest.mark.parametrize("last", [False, True])
def test_questions_that_fail_beside_a_stage_are_named_and_asked_again(last, brief, tmp_path, trouble):
    trouble.write_text(f"{'sft_fusion' if last else 'sft_cold_start'} wrong-asking")
    with pytest.raises(UserError, match="write --config.set.measure.limit=4"):
        toy.go(tmp_path / "P", skip=BRIEF, overlap=True)
    failed = "evaluation" if last else "grpo"  # the stage that ran at the same time
    assert toy.stage(toy.read(tmp_path / "P"), failed)["status"] == "failed"
    trouble.unlink()
    toy.go(tmp_path / "P", skip=BRIEF, overlap=True)
    assert toy.numbers(tmp_path / "P") == toy.numbers(brief)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_stage_and_the_same_command_goes_on(number, brief, tmp_path, trouble):
    trouble.write_text("sft_cold_start hang")
    process = toy.start(tmp_path / "P", skip=BRIEF)
    toy.wait_for(Path(f"{trouble}.reached"), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    name = signal.Signals(number).name
    assert out.endswith(f"{name}: stopped in sft_cold_start; the same command resumes there\n")
    if number == signal.SIGTERM:  # the stage gets it too, and ends after its step, with a checkpoint
        assert (tmp_path / "P" / "04_sft_cold_start" / "checkpoints" / "2").exists()
    one = toy.stage(toy.read(tmp_path / "P"), "sft_cold_start")
    assert one["status"] == "waiting"
    assert name in one["error"]
    trouble.unlink()
    toy.go(tmp_path / "P", skip=BRIEF)
    assert toy.numbers(tmp_path / "P") == toy.numbers(brief)


@pytest.mark.parametrize(
    "action, kind, words",
    [
        ("disk", TrainingError, "stage grpo failed: No space left on device: make room"),
        ("crash", TrainingError, "stage grpo failed: it ended with signal 11"),
        ("wrong", UserError, "write --config.set.grpo.batch_size=4"),
    ],
)
def test_a_stage_that_fails_ends_the_pipeline_in_one_line_and_the_same_command_goes_on(
    action, kind, words, brief, tmp_path, trouble, capfd
):
    trouble.write_text(f"grpo {action}")
    with pytest.raises(kind) as caught:
        toy.go(tmp_path / "P", skip=BRIEF)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "error:" not in capfd.readouterr().err  # only the caller prints it
    found = toy.read(tmp_path / "P")
    assert toy.stage(found, "grpo")["status"] == "failed"
    assert toy.stage(found, "sft_fusion")["status"] == "waiting"
    assert toy.stage(found, "grpo")["error"] in str(caught.value)
    trouble.unlink()
    toy.go(tmp_path / "P", skip=BRIEF)
    assert toy.numbers(tmp_path / "P") == toy.numbers(brief)


def test_on_a_full_disk_the_record_stays_valid_and_the_same_command_goes_on(brief, tmp_path, trouble, monkeypatch):
    """The stage fails because the disk is full. Then the record cannot be written either."""
    trouble.write_text("grpo disk")
    write = record.write_atomically

    def full(path, content):
        if Path(f"{trouble}.reached").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    monkeypatch.setattr(record, "write_atomically", full)
    with pytest.raises(TrainingError, match="No space left on device: make room"):
        toy.go(tmp_path / "P", skip=BRIEF)
    assert toy.stage(toy.read(tmp_path / "P"), "grpo")["status"] == "running"
    trouble.unlink()
    Path(f"{trouble}.reached").unlink()
    toy.go(tmp_path / "P", skip=BRIEF)
    assert toy.numbers(tmp_path / "P") == toy.numbers(brief)


def test_one_pipeline_at_a_time_writes_there(tmp_path, trouble):
    trouble.write_text("pretrain_s1 hang")
    process = toy.start(tmp_path / "P", skip=BRIEF)
    toy.wait_for(Path(f"{trouble}.reached"), process)
    with pytest.raises(UserError, match="is in use"):
        toy.go(tmp_path / "P", skip=BRIEF)
    process.kill()
    process.communicate()


def test_a_stage_that_a_killed_pipeline_left_is_waited_for(tmp_path, capfd):
    held, place = threading.Event(), tmp_path / "P" / "01_pretrain_s1"

    def orphan():
        with lock.held(place):
            held.set()
            time.sleep(1)

    thread = threading.Thread(target=orphan)
    thread.start()
    held.wait()
    found = toy.go(tmp_path / "P", skip=",".join(toy.NAMES[1:]))
    thread.join()
    assert toy.stage(found, "pretrain_s1")["status"] == "done"
    assert capfd.readouterr().out.count("has ended still writes to") == 1


def test_what_a_stage_says_comes_through(tmp_path, trouble, capfd):
    trouble.write_text("pretrain_s1 disk")
    with pytest.raises(TrainingError):
        toy.go(tmp_path / "P", skip=BRIEF)
    found = capfd.readouterr()
    assert "training 01_pretrain_s1" in found.out
    assert found.err == "a bar 50%\rlog line\n"


def test_questions_that_changed_are_asked_again_and_nothing_is_trained(tmp_path, capfd):
    short = ",".join((*toy.NAMES[1:3], *toy.NAMES[4:]))
    toy.go(tmp_path / "P", skip=short)
    capfd.readouterr()
    found = toy.go(tmp_path / "P", skip=short, set__measure__limit=10)
    assert toy.stage(found, "sft_cold_start")["measures"]["reasoning_plain"]["n"] == 20
    assert "training" not in capfd.readouterr().out


@pytest.mark.parametrize("action", ["hang", "wrong"])
def test_stages_stay_done_where_questions_that_changed_are_stopped_or_fail(action, tmp_path, trouble):
    short = ",".join((*toy.NAMES[1:3], *toy.NAMES[6:8]))
    toy.go(tmp_path / "P", skip=short)
    trouble.write_text(f"sft_cold_start {action}-asking")
    process = toy.start(tmp_path / "P", skip=short, set__measure__limit=10)
    toy.wait_for(Path(f"{trouble}.reached"), process)
    if action == "hang":
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert set(toy.statuses(toy.read(tmp_path / "P")).values()) == {"done", "skipped"}
    trouble.unlink()
    found = toy.go(tmp_path / "P", skip=short, set__measure__limit=10)
    assert toy.stage(found, "sft_cold_start")["measures"]["reasoning_plain"]["n"] == 20


@pytest.mark.parametrize("content", ["", "{", "[]", '{"benchmarks": {"reasoning": {}}}'])
def test_answers_that_are_damaged_are_asked_again(content, tmp_path):
    short = ",".join((*toy.NAMES[1:3], *toy.NAMES[4:]))
    before = toy.go(tmp_path / "P", skip=short)
    (tmp_path / "P" / "04_sft_cold_start" / "measures" / "plain" / "results.json").write_text(content)
    after = toy.go(tmp_path / "P", skip=short)
    assert toy.stage(after, "sft_cold_start")["measures"] == toy.stage(before, "sft_cold_start")["measures"]


def test_the_record_is_json_that_other_programs_read(whole):
    content = (whole / "pipeline.json").read_text()
    assert json.loads(content)["stages"][3]["from"] == "pretrain_s3"
