"""A run writes its report while it trains. A report that fails never ends the run."""

import json
import shutil
import subprocess
import sys

import pytest

from qwen3f.report import names
from qwen3f.report.read import read
from qwen3f.train import reporting
from qwen3f.train.answers_folder import AnswersFolder
from qwen3f.train.loop import run
from tests.stages import toy_chats, toy_rl
from tests.train.runs import metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("reporting")
    toy_chats.write_data(place)
    toy_rl.write_data(place / "rl")
    return place


def test_a_run_ends_with_a_link_to_its_report(make, tmp_path, capsys):
    run(make(steps=10, **{"eval.every": 5}), tmp_path / "W", progress=False)
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'W' / 'report.html'}"
    told = json.loads((tmp_path / "W" / "run.json").read_text())
    assert [(one["start"], one["step"]) for one in told["sessions"]] == [(0, 10)]
    assert told["placement"][0]["shape"] == told["placement"][0]["local"]
    run(make(steps=20, **{"eval.every": 5}), tmp_path / "W", progress=False)
    told = json.loads((tmp_path / "W" / "run.json").read_text())
    assert [(one["start"], one["step"]) for one in told["sessions"]] == [(0, 10), (10, 20)]
    [stage] = read(tmp_path / "W").stages
    assert stage.steps == 20
    assert stage.after["val_loss"].value < stage.before["val_loss"].value


def test_it_is_written_at_evaluations_too(make, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(reporting, "_FIRST", 0.0)
    monkeypatch.setattr(reporting, "_SHARE", 1e9)
    monkeypatch.setattr("qwen3f.report.write.write_report", lambda place: seen.append(metrics(place)[-1]["step"]))
    run(make(steps=20, **{"eval.every": 5}), tmp_path, progress=False)
    assert seen == [5, 10, 15, 20, 20]


def test_without_config_report_there_is_none(make, tmp_path, capsys):
    run(make(steps=3, report=False), tmp_path, progress=False)
    assert "report.html" not in capsys.readouterr().out
    assert not {path.name for path in tmp_path.iterdir()} & {"report.html", "run.json"}


@pytest.mark.parametrize("blocked", ["report.html", "run.json"])
def test_a_report_that_cannot_be_written_is_said_once_and_the_run_goes_on(make, tmp_path, capsys, monkeypatch, blocked):
    monkeypatch.setattr(reporting, "_FIRST", 0.0)
    monkeypatch.setattr(reporting, "_SHARE", 1e9)
    (tmp_path / blocked / "in the way").mkdir(parents=True)
    run(make(steps=20, **{"eval.every": 5}), tmp_path, progress=False)
    said = capsys.readouterr().out
    assert said.count("cannot be written") == 1
    assert "done at step 20" in said


def test_whatever_breaks_in_a_report_a_run_goes_on(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qwen3f.report.page.render", lambda report: 1 / 0)
    monkeypatch.setattr("qwen3f.report.write.render", lambda report: 1 / 0)
    run(make(steps=3), tmp_path, progress=False)
    said = capsys.readouterr().out
    assert "the report cannot be written (ZeroDivisionError: division by zero); the run goes on without" in said
    assert "done at step 3" in said


def test_answers_of_fine_tuning_and_of_reinforcement_learning_are_kept_and_shown(root, tmp_path):
    chats = toy_chats.make_config(
        root, **{"eval.questions": 4, "eval.max_new_tokens": 5, "eval.modes": "thinking,plain"}
    )
    run(chats, tmp_path / "sft", progress=False)
    run(toy_rl.make_config(root / "rl"), tmp_path / "rl", progress=False)
    for name, modes in (("sft", ["thinking"] * 4 + ["plain"] * 4), ("rl", ["thinking"] * 4)):
        [stage] = read(tmp_path / name).stages
        last = stage.run.answers[-1]
        assert last.step == 4
        assert [line["mode"] for line in last.lines] == modes
        assert stage.after["val_accuracy"].n == 4
        assert all(names.find(metric, stage.run.kind) for metric in stage.run.metrics.series)
        text = (tmp_path / name / "report.html").read_text()
        assert "no gain that 4 questions can show" in text
        assert "What it says to held-out questions" in text
    assert "What it tried" in text


def test_experts_are_drawn(root, tmp_path):
    config = toy_chats.make_config(root, "moe")
    run(config, tmp_path, progress=False)
    assert "Experts: load by layer" in (tmp_path / "report.html").read_text()


def test_answers_of_the_first_and_the_last_evaluations_stay_and_those_after_a_step_gone_back_to_go(tmp_path):
    said = []
    folder = AnswersFolder(tmp_path, 0, said.append)
    for step in (2, 4, 6, 8, 10):
        folder.write(step, [{"text": "\ud800 half a pair"}])
    there = lambda: [int(path.stem[5:]) for path in sorted((tmp_path / "answers").iterdir())]  # noqa: E731
    assert there() == [2, 6, 8, 10]
    AnswersFolder(tmp_path, 7, said.append)
    assert there() == [2, 6]
    assert said == []
    shutil.rmtree(tmp_path / "answers")
    (tmp_path / "answers").write_text("a file in its place")
    folder.write(12, [{}])
    folder.write(14, [{}])
    assert len(said) == 1
    assert "the run goes on without" in said[0]


def test_neither_a_run_nor_the_check_of_a_bad_value_imports_matplotlib():
    code = "import sys, qwen3f.cli, qwen3f.train.launch; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
