"""Questions to the models of a pipeline's stages: answers before and after are shown and compared one by one."""

import json
import os

import pytest

from qwen3f.eval.last_query import last_query
from qwen3f.report import texts
from qwen3f.report.asked import read_pictures
from qwen3f.report.page import render
from qwen3f.report.read import read
from tests.report.places import write_pipeline, write_run


def record(number, right, text="text"):
    prompt = f"<|im_start|>user\nQuestion {number}?<|im_end|>\n<|im_start|>assistant\n"
    return {"number": number, "prompt": prompt, "gold": "7", "outputs": [f"<think>\nhm\n</think>\n\n{text}"],
            "metrics": {"accuracy": float(right)}, "ended": [True]}  # fmt: skip


def results(place, marks, text="text"):
    place.mkdir(parents=True)
    n = len(marks)
    metrics = {"accuracy": {"value": sum(marks) / n, "low": 0.0, "high": 1.0, "n": n}}
    samples = [record(i, mark, text) for i, mark in enumerate(marks)]
    found = {"benchmarks": {"reasoning": {"metrics": metrics, "samples": samples}}}
    (place / "results.json").write_text(json.dumps(found))


@pytest.fixture
def pipeline(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    results(runs[0] / "measures" / "thinking", [0] * 40, "before words")
    results(runs[1] / "measures" / "thinking", [1] * 12 + [0] * 28, "after words")
    (tmp_path / "P").mkdir()
    return write_pipeline(tmp_path / "P", runs)


def test_the_same_questions_are_compared_one_by_one(pipeline):
    one, two = read(pipeline).stages
    assert not one.differences
    found = two.differences["reasoning_thinking"]
    assert (found.value, found.n) == (pytest.approx(0.3), 40)
    assert found.low > 0


def test_other_questions_are_not(pipeline):
    path = pipeline / "02_two" / "measures" / "thinking" / "results.json"
    path.write_text(path.read_text().replace("Question 3?", "Question 99?"))
    assert not read(pipeline).stages[1].differences


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b"])
def test_texts_with_other_ends_of_lines_than_json_s_are_read_whole(end, tmp_path):
    run, said = write_run(tmp_path / "W"), f"first{end}second"
    (path,) = (run / "answers").glob("step-*30.jsonl")
    lines = [json.loads(line) | {"text": said} for line in path.read_text().split("\n")[:-1]]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (stage,) = read(run).stages
    assert [line["text"] for line in stage.run.answers[-1].lines] == [said] * len(lines)
    (run / "0.png").write_bytes(b"PNG")
    (run / "questions.json").write_text(json.dumps([{"picture": "0.png", "prompt": "What?", "gold": said}]))
    (run / "0.jsonl").write_text(json.dumps({"answer": said}, ensure_ascii=False) + "\n")
    (picture,) = read_pictures(run)
    assert (picture["text"], picture["mark"]) == (said, 1.0)


def test_pipes_and_devices_are_no_files_of_answers(tmp_path):
    run = write_run(tmp_path / "W")
    os.mkfifo(run / "answers" / "step-00000001.jsonl")  # opening it would wait for ever
    (run / "answers" / "step-00000002.jsonl").symlink_to("/dev/zero")  # and this would take all memory
    (stage,) = read(run).stages
    assert len(stage.run.problems) == 2
    assert all("is no file but a pipe or a device" in one for one in stage.run.problems)
    assert len(stage.run.answers) == 4
    (run / "0.png").write_bytes(b"PNG")
    (run / "questions.json").write_text(json.dumps([{"picture": "0.png", "prompt": "What?", "gold": "a"}]))
    (run / "0.jsonl").symlink_to("/dev/zero")
    assert not read_pictures(run)


@pytest.mark.parametrize("file", ["questions.json", "0.jsonl"])
def test_json_that_is_nested_too_deeply_is_left_out(file, tmp_path):
    (tmp_path / "0.png").write_bytes(b"PNG")
    (tmp_path / "0.jsonl").write_text('{"answer": "a"}')
    (tmp_path / "questions.json").write_text(json.dumps([{"picture": "0.png", "prompt": "What?", "gold": "a"}]))
    assert read_pictures(tmp_path)
    (tmp_path / file).write_text("[" * 100_000)
    assert not read_pictures(tmp_path)


def test_the_last_question_of_a_prompt_is_found_in_one_pass():
    """A regular expression that searched for the end from each beginning took minutes on this text."""
    begun = "<|im_start|>user\n" * 200_000
    assert last_query(begun) == begun
    turns = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc\nd<|im_end|>\n"
    assert last_query(turns + "<|im_start|>assistant\n") == "c\nd"
    assert last_query("no chat") == "no chat"


def test_a_right_answer_and_a_wrong_one_are_shown_as_both_models_gave_them(pipeline):
    one, two = read(pipeline).stages
    shown = texts.of_stages((one.name, one.asked), (two.name, two.asked))
    assert [reply.mark for exchange in shown for reply in exchange.replies][:4] == ["wrong", "right", "wrong", "wrong"]
    assert (shown[0].question, shown[0].gold) == ("Question 0?", "7")
    first, then = shown[0].replies
    assert (first.when, first.thought, first.text) == ("after one", "hm", "before words")
    assert (then.when, then.text) == ("after two", "after words")


def test_an_evaluation_is_a_stage_without_before(pipeline):
    results(pipeline / "03_eval" / "thinking", [1, 0], "said")
    told = json.loads((pipeline / "pipeline.json").read_text())
    stage = {"name": "evaluation", "workdir": "03_eval", "from": "two", "status": "done", "seconds": 9.0,
             "measures": {"reasoning_thinking": {"value": 0.5, "low": 0.1, "high": 0.9, "n": 2}}}  # fmt: skip
    (pipeline / "pipeline.json").write_text(json.dumps(told | {"stages": [*told["stages"], stage]}))
    last = read(pipeline).stages[-1]
    assert (last.before, last.run.results[0][0]) == ({}, "reasoning, accuracy, thinking")
    text = render(read(pipeline))
    assert "Benchmarks" in text
    assert "from two; 9 s; done" in text


def test_pictures_that_were_asked_about_are_shown(pipeline):
    place = pipeline / "02_two"
    (place / "pictures").mkdir()
    (place / "pictures" / "0.png").write_bytes(b"\x89PNG")
    rows = [{"picture": "pictures/0.png", "prompt": "How many?", "gold": "3"},
            {"picture": "../../etc/passwd", "prompt": "x", "gold": "y"}]  # fmt: skip
    (place / "questions.json").write_text(json.dumps(rows))
    (place / "0.jsonl").write_text(json.dumps({"answer": "3."}) + "\n")
    (place / "1.jsonl").write_text(json.dumps({"answer": "3."}) + "\n")
    found = [line for line in read(pipeline).stages[1].asked if line["evaluation"] == "pictures"]
    assert [(line["prompt"], line["mark"]) for line in found] == [("How many?", 1.0)]
    assert 'src="data:image/png;base64,iVBORw=="' in render(read(pipeline))


def test_a_stage_that_only_shows_pictures_lacks_nothing(tmp_path):
    """It logs nothing and has no configuration. The page names no problem, and its row has a link to the answers."""
    place = tmp_path / "01_pictures"
    (place / "pictures").mkdir(parents=True)
    (place / "pictures" / "0.png").write_bytes(b"\x89PNG")
    (place / "questions.json").write_text(
        json.dumps([{"picture": "pictures/0.png", "prompt": "How many?", "gold": "3"}])
    )
    (place / "0.jsonl").write_text(json.dumps({"answer": "4"}) + "\n")
    stage = {"name": "pictures", "workdir": place.name, "status": "done", "measures": {}, "seconds": 9.0}
    (tmp_path / "pipeline.json").write_text(json.dumps({"stages": [stage]}))
    text = render(read(tmp_path))
    assert '<a href="#stage-1">its answers</a>' in text
    assert not any(words in text for words in ("not measured yet", "no config.json", "Nothing has been logged"))


@pytest.mark.parametrize("broken", ["{", "[]", '{"benchmarks": 3}', '{"benchmarks": {"a": {"samples": [1, {}]}}}'])
def test_results_that_are_broken_are_left_out(pipeline, broken):
    (pipeline / "02_two" / "measures" / "thinking" / "results.json").write_text(broken)
    assert read(pipeline).stages[1].asked == ()
