"""Measures of stages: losses that are no numbers; answers that were begun at another path or on another device."""

import json
import re

import pytest
from PIL import Image

from qwen3f import cli
from qwen3f.errors import UserError
from qwen3f.interop import source
from qwen3f.pipeline import chain, measure, pictures, run, table
from qwen3f.pipeline.process import Signals
from qwen3f.report import names
from qwen3f.tasks.visual import topic
from tests.pipeline import toy

SEEN = {
    "count all",
    "count colour",
    "count shape",
    "colour",
    "shape",
    "tallest bar",
    "read a bar",
}  # topics of questions about shapes and bars
SHORT = "pretrain_s2,pretrain_s3,sft_fusion,grpo_general,dpo"  # skipped: four stages are left


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    toy.fake(monkeypatch.setattr)


@pytest.fixture
def trouble(tmp_path, monkeypatch):
    path = tmp_path / "trouble"
    monkeypatch.setenv("TROUBLE", str(path))
    return path


def stopped(place, trouble, name):
    """Run a pipeline that fails while a stage's questions are asked. Returns the folder that holds their modes."""
    trouble.write_text(f"{name} wrong-asking")
    with pytest.raises(UserError):
        toy.go(place, skip=SHORT)
    trouble.unlink()
    folder = place / ("09_evaluation" if name == "evaluation" else "05_grpo/measures")
    assert list(folder.glob("*/records/*.jsonl"))
    return folder


@pytest.mark.parametrize("name", ["grpo", "evaluation"])
def test_questions_that_were_stopped_are_asked_anew_where_the_directory_was_renamed(name, tmp_path, trouble):
    stopped(tmp_path / "P", trouble, name)
    place = (tmp_path / "P").rename(tmp_path / "Q")
    found = toy.go(place, skip=SHORT)
    assert set(toy.statuses(found).values()) == {"done", "skipped"}


def test_a_mode_that_has_its_answers_keeps_them_where_the_directory_was_renamed(tmp_path, trouble):
    folder = stopped(tmp_path / "P", trouble, "grpo") / "thinking"
    records(folder, model=str(tmp_path / "P" / "05_grpo" / "checkpoints" / "3"))
    metric = {"value": 0.25, "low": 0.2, "high": 0.3, "n": 4}
    (folder / "results.json").write_text(json.dumps({"benchmarks": {"reasoning": {"metrics": {"accuracy": metric}}}}))
    place = (tmp_path / "P").rename(tmp_path / "Q")
    found = toy.stage(toy.go(place, skip=SHORT), "grpo")["measures"]
    assert found["reasoning_thinking"] == metric
    assert found["reasoning_plain"]["n"] == 128


def records(folder, **head):
    path = folder / "records" / "reasoning.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head) + "\n" + '{"number": 0}\n')
    return path


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({}, True),
        ({"weights": "finger"}, True),  # the beginning of the right one
        ({"other": "things"}, True),  # eval itself compares these
        ({"model": "/elsewhere/checkpoints/3"}, False),
        ({"dtype": "bfloat16"}, False),
        ({"weights": "others"}, False),
    ],
)
def test_records_stay_where_the_questions_can_go_on(changes, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "weights_digest", lambda place: "fingerprint")
    place = tmp_path / "W" / "checkpoints" / "3"
    place.mkdir(parents=True)
    path = records(tmp_path / "plain", **({"model": str(place), "dtype": "float32"} | changes))
    config = toy.make_config(set__measure__device="cpu").set.measure
    measure.clear_unfit(tmp_path / "plain", config, str(place))
    assert path.exists() == kept


@pytest.mark.parametrize("content", ["", "{", "[]\n", "\xff\n"])
def test_records_that_say_nothing_are_asked_anew(content, tmp_path):
    place = tmp_path / "W" / "checkpoints" / "3"
    place.mkdir(parents=True)
    path = records(tmp_path / "plain")
    path.write_text(content, encoding="latin-1")
    measure.clear_unfit(tmp_path / "plain", toy.make_config(device="cpu").set.measure, str(place))
    assert not path.exists()


def test_a_loss_that_is_no_number_is_said_and_ends_no_pipeline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NO_NUMBER", "1")
    skip = ",".join((*toy.NAMES[2:4], *toy.NAMES[5:]))
    for _ in range(2):
        found = toy.go(tmp_path / "P", skip=skip)
        assert re.search("pretrain_s2 +held-out loss, embedded +no number +no number ", capsys.readouterr().out)
    nothing = {"value": None, "low": None, "high": None, "n": None}
    assert toy.stage(found, "pretrain_s2")["measures"]["val_loss/reasoning"] == nothing


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "null", '"x"'])
def test_what_is_no_finite_number_is_kept_as_none(value, tmp_path):
    step = next(step for step in chain.steps_of(toy.make_config()) if step.name == "pretrain_s1")
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "val_loss/a": {value}, "val_loss/b": 2.5}}\n{{"step": 2, "va'
    )
    found = measure.logged(step, tmp_path)
    assert {name: one["value"] for name, one in found.items()} == {"val_loss/a": None, "val_loss/b": 2.5}
    for mode in measure.MODES:
        (tmp_path / mode).mkdir()
        text = f'{{"benchmarks": {{"r": {{"metrics": {{"x": {{"value": {value}, "low": 0, "high": 1, "n": 3}}}}}}}}}}'
        (tmp_path / mode / "results.json").write_text(text)
    assert measure.answered(tmp_path)["r_plain"] == {"value": None, "low": 0, "high": 1, "n": 3}
    assert table.say("r_plain", measure.answered(tmp_path)["r_plain"]) == "no number"


@pytest.mark.parametrize("stage, name, words", [
    ("dpo", "val_accuracy", "held-out pairs ranked right"),
    ("dpo_online", "val_wins", "answers better than before it"),
    ("reward_model", "val_accuracy", "held-out pairs ranked right"),
])  # fmt: skip
def test_a_preference_stage_has_a_measure_of_its_own(stage, name, words, tmp_path):
    step = next(step for step in chain.steps_of(toy.make_config()) if step.name == "dpo")
    with step.config.unlocked():
        step.config.stage = stage
    told = [{"step": 1, name: 0.4, f"{name}/right": 0.1}, {"step": 2, name: 0.75}, {"step": 3, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    found = measure.logged(step, tmp_path)
    assert found == {f"{stage}:{name}": {"value": 0.75, "low": None, "high": None, "n": None}}
    assert table.word(next(iter(found))) == words
    assert table.say(*next(iter(found.items()))) == "75.0%"
    assert names.find(next(iter(found)), stage).unit == "share"


def test_pictures_that_were_answered_are_not_asked_again_wherever_the_directory_lies(tmp_path):
    """An answer with U+2028 is read whole: this character does not end a line of JSON."""
    config = cli.load_experiment(str(toy.ROOT / "experiments" / "pipeline.py:nano_vl"))
    steps = chain.steps_of(config)
    folder = tmp_path / steps[-1].workdir
    folder.mkdir()
    said = {"answer": "first\u2028second\x85third"}
    pictures.place_of(folder, 0).write_text(json.dumps(said, ensure_ascii=False) + "\n")
    pictures.place_of(folder, 1).write_text('{"row": 0, "ans')  # as a killed process leaves it
    pipeline = run.Pipeline(config, config.set.measure, steps, tmp_path, Signals(), False)
    pipeline._show(steps[-1], "W")
    assert Image.open(folder / "pictures" / "0.png").size == (96, 96)  # as the stage before draws them
    assert {topic(one["prompt"]) for one in json.loads((folder / pictures.QUESTIONS).read_text())} <= SEEN
    assert pictures.answer(folder, 0) == said["answer"]
    assert pictures.answer(folder, 1) == "two\u2028lines of 1"
    assert sum(repr(said["answer"]) in line for line in pictures.said(folder)) == 1
