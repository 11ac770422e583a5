"""Batch files: every row is answered once, as if asked alone, however often the run stops. Errors name the row."""

import dataclasses
import fcntl
import io
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen3f import params
from qwen3f.errors import UserError
from qwen3f.infer.batch_file import AnswerFile, read_asks
from qwen3f.infer.engine import EngineOptions
from qwen3f.infer.run import run
from qwen3f.infer.text_generator import TextGenerator
from qwen3f.infer.text_request import TextOptions, make_request
from qwen3f.interop import hf
from tests.infer.batch_rows import ROWS, read, write


def alone(source, row, number):
    """(text, finish_reason, prompt tokens, tokens) of the answer to a row that is asked alone."""
    _, cfg, p, tokenizer = source
    content = row.get("prompt") or row["messages"]
    own = {name: value for name, value in row.items() if name not in ("prompt", "messages", "id")}
    options = TextOptions(thinking=True, max_new_tokens=20).changed(**{**own, "stop": tuple(row.get("stop", ()))})
    asked = make_request(cfg, tokenizer, content, options, stream=0 if "seed" in row else number)
    for (answer,) in TextGenerator(cfg, p, tokenizer).answer([asked]):
        answer.read()
    return answer.text, answer.finish_reason, answer.prompt_tokens, answer.tokens


def test_each_row_is_answered_as_alone(source, answer, tmp_path, capsys):
    write(tmp_path / "in.jsonl", ["", *ROWS[:5], "  ", *ROWS[5:]])  # blank lines do not count as rows
    summary, lines = answer()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert (summary.answered, summary.done, summary.bad, summary.failed) == (len(ROWS), 0, 0, 0)
    assert f"{sum(line['tokens'] for line in lines)} new tokens: the first after" in printed.err
    found = [(line["answer"], line["finish_reason"], line["prompt_tokens"], line["tokens"]) for line in lines]
    assert found == [alone(source, row, number) for number, row in enumerate(ROWS)]
    assert [line.get("id", "none") for line in lines] == [row.get("id", "none") for row in ROWS]
    assert list(lines[12]) == ["row", "hash", "id", "answer", "finish_reason", "prompt_tokens", "tokens"]
    assert "e" not in lines[14]["answer"]


def test_a_run_goes_on_where_it_was_killed(answer, tmp_path, monkeypatch):
    """The run is killed at any byte of the output. The next run replaces an incomplete last line and gives the rest."""
    out = tmp_path / "out.jsonl"
    write(tmp_path / "in.jsonl", ROWS)
    _, whole = answer()
    content = out.read_bytes()
    chance = random.Random(0)
    for cut in (0, 5, len(content) - 1, *(chance.randrange(len(content)) for _ in range(3))):
        out.write_bytes(content[:cut])
        kept = content[:cut].count(b"\n")
        summary, lines = answer()
        assert lines == whole
        assert out.read_bytes().startswith(content[:cut][: content[:cut].rfind(b"\n") + 1])
        assert (summary.done, summary.answered) == (kept, len(ROWS) - kept)
    monkeypatch.setattr("qwen3f.interop.source.read_params", None)  # the model is not read if no row is left
    summary, lines = answer()
    assert (summary.done, summary.answered, lines) == (len(ROWS), 0, whole)


def test_new_rows_behind_the_old_ones_are_added(answer, tmp_path):
    write(tmp_path / "in.jsonl", ROWS[:6])
    _, first = answer()
    write(tmp_path / "in.jsonl", ROWS)
    summary, lines = answer()
    assert (lines[:6], summary.done) == (first, 6)
    assert len(lines) == len(ROWS)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 1}, "has an answer to row 0 that does not belong to .*in.jsonl:1"),
        ({"rows": [{"prompt": "other"}, ROWS[1]]}, "has an answer to row 0 that does not belong"),
        ({"rows": ROWS[:1]}, "line . answers row ., but there are only 1 rows"),
        ({"out": "notes.txt"}, "config.out=.*notes.txt, line 1 is not an answer of this program"),
        ({"out": "torn.txt"}, "config.out=.*torn.txt, line 1 is not an answer"),
        ({"out": "in.jsonl"}, "config.out=.* is config.input"),
    ],
)
def test_what_is_in_the_way_is_left_as_it_is(answer, tmp_path, change, words):
    write(tmp_path / "in.jsonl", ROWS[:2])
    answer()
    (tmp_path / "notes.txt").write_text("notes\n")
    (tmp_path / "torn.txt").write_text("a line without its end")
    if rows := change.pop("rows", None):
        write(tmp_path / "in.jsonl", rows)
    if "out" in change:
        change = {"out": str(tmp_path / change["out"])}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=words):
        answer(**change)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_process_that_writes_there_is_an_error(answer, tmp_path):
    write(tmp_path / "in.jsonl", ROWS[:1])
    with AnswerFile(tmp_path / "out.jsonl", "m", 1), pytest.raises(UserError, match="another process writes to it"):
        answer()


def test_a_row_has_its_own_tools(tmp_path):
    file = write(tmp_path / "in.jsonl", [{"prompt": "a", "tools": [{"name": "t"}]}, {"prompt": "b"}])
    first, second = read_asks(Path(file), TextOptions(tools=[{"name": "u"}]))
    assert (first.options.tools, second.options.tools) == (({"name": "t"},), ({"name": "u"},))
    assert first.digest("m") != dataclasses.replace(first, options=second.options).digest("m")


def test_the_order_of_keys_is_a_part_of_the_row(tmp_path):
    """Tools and calls are written in their keys' order."""
    rows = [{"prompt": "a", "tools": [dict(keys)]} for keys in ((("name", "t"), ("x", 1)), (("x", 1), ("name", "t")))]
    first, second = read_asks(Path(write(tmp_path / "in.jsonl", rows)), TextOptions())
    assert first.digest("m") != dataclasses.replace(second, number=0, stream=0).digest("m")


def test_other_weights_in_the_same_directory_are_another_model(source, answer, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(source[0], place)
    write(tmp_path / "in.jsonl", ROWS[:2])
    answer(init_from=str(place))
    moved = place.rename(tmp_path / "moved")
    assert answer(init_from=str(moved))[0].done == 2
    _, cfg, _, tokenizer = source
    shutil.rmtree(moved)
    hf.save_pretrained(moved, cfg, params.init_params(cfg, 2), tokenizer)
    with pytest.raises(UserError, match="the settings or the model have changed"):
        answer(init_from=str(moved))


def test_a_device_is_no_file_for_answers(answer, tmp_path):
    write(tmp_path / "in.jsonl", ROWS[:2])
    config = {"out": "/dev/null"}
    with pytest.raises(UserError, match="config.out=/dev/null is a pipe or a device"):
        answer(**config)


def test_a_prompt_that_is_too_long_is_an_error_after_the_rows_before_it(answer, tmp_path):
    write(tmp_path / "in.jsonl", [*ROWS[:3], {"prompt": "word " * 300}, *ROWS[3:]])
    with pytest.raises(UserError, match=r"in\.jsonl:4: a prompt has .* tokens and the model takes 256"):
        answer()
    assert sorted(line["row"] for line in read(tmp_path / "out.jsonl")) == [0, 1, 2]


def test_rows_are_read_as_there_is_room_for_them(source, tmp_path):
    """A long file is not read at once: at most twice as many rows are open as the engine computes at a time."""
    _, cfg, p, tokenizer = source
    taken = ended = 0
    most = 0

    def requests():
        nonlocal taken
        for number in range(60):
            taken += 1
            yield make_request(cfg, tokenizer, f"é{number}", TextOptions(max_new_tokens=1 + number % 4))

    gen = TextGenerator(cfg, p, tokenizer, options=EngineOptions(rows=4))
    for answers in gen.answer(requests()):
        most = max(most, taken - ended)
        ended += sum(bool(answer.finish_reason) for answer in answers)
    assert (taken, ended) == (60, 60)
    assert most == 8


def test_a_row_that_fails_is_written_and_the_others_go_on(source, answer, tmp_path, capsys):
    """The embedding of one word is NaN. Only the row with this word fails, and its line says so."""
    _, cfg, p, tokenizer = source
    word = tokenizer.encode("T")[-1]
    assert word not in tokenizer.encode("user é1")
    embedding = p["model.embed_tokens.weight"].index_fill(0, torch.tensor(word), float("nan"))
    place = tmp_path / "nan"
    hf.save_pretrained(place, cfg, {**p, "model.embed_tokens.weight": embedding}, tokenizer)
    rows = [{"prompt": text, "chat": False, "max_new_tokens": 1} for text in ("é1", "T", "é2")]
    write(tmp_path / "in.jsonl", rows)
    summary, lines = answer(init_from=str(place))
    reasons = [line["finish_reason"] for line in lines]
    assert reasons[1].startswith("error: the model's logits are not finite")
    assert lines[1]["answer"] == ""
    assert [reasons[0], reasons[2], summary.failed] == ["length", "length", 1]
    assert "; 1 failed" in capsys.readouterr().err


def test_rows_that_failed_are_asked_again(answer, tmp_path, capsys):
    """The second run has more room. The lines of other rows stay as they are, and each row has exactly one line."""
    out = tmp_path / "out.jsonl"
    rows = [ROWS[0], {"prompt": "What? " * 9, "max_new_tokens": 100}, ROWS[1], {"prompt": "é", "max_new_tokens": 120}]
    write(tmp_path / "in.jsonl", rows)
    summary, first = answer(max_tokens=64)
    assert [line["finish_reason"][:5] for line in first] == ["lengt", "error", "lengt", "error"]
    assert "; 2 failed; the same command computes them again" in capsys.readouterr().err
    out.chmod(0o640)
    beside = out.with_name("out.jsonl.new")
    beside.write_text("a user's file")
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    summary, lines = answer(out=str(link))
    assert (summary.answered, summary.done, summary.failed) == (2, 2, 0)
    assert (lines[0], lines[2]) == (first[0], first[2])
    assert all(line["finish_reason"] in ("length", "stop") and line["tokens"] for line in lines)
    assert (out.stat().st_mode & 0o777, link.is_symlink()) == (0o640, True)
    assert [path for path in tmp_path.iterdir() if ".new" in path.name] == [beside]
    assert beside.read_text() == "a user's file"
    whole = out.read_bytes()
    assert answer()[0].done == 4
    assert out.read_bytes() == whole


def test_lines_of_failed_rows_stay_until_there_is_an_answer(answer, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    write(tmp_path / "in.jsonl", [ROWS[0], {"prompt": "What?", "max_new_tokens": 120}])
    answer(max_tokens=64)
    before = out.read_bytes()
    with pytest.raises(UserError, match="has an answer to row 0 that does not belong"):
        answer(seed=1)
    assert out.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr("qwen3f.infer.batch_file.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(
            UserError, match=r"config\.out=.*out\.jsonl cannot be written \(full\): repair that, then run the same"
        ):
            answer()
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert answer()[0].failed == 0


def test_a_file_that_another_process_has_just_replaced_is_an_error(answer, tmp_path, monkeypatch):
    """The file is replaced after this process has opened it and before it has locked it."""
    out, lock = tmp_path / "out.jsonl", fcntl.flock
    write(tmp_path / "in.jsonl", ROWS[:1])
    answer()

    def late(*arguments):
        out.rename(tmp_path / "old.jsonl")
        out.write_bytes((tmp_path / "old.jsonl").read_bytes())
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another process writes to it"):
        answer()


FULL = """
import resource, signal, sys
from pathlib import Path
from experiments.generate import get_config
from qwen3f.errors import UserError
from qwen3f.infer.run import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = get_config()
config.init_from, config.input, config.out = sys.argv[1:]
config.update({"max_new_tokens": 8, "device": "cpu"})
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
try:
    run(config, Path("unused"), progress=False)
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_named_and_the_same_command_goes_on(source, answer, tmp_path):
    file, out = write(tmp_path / "in.jsonl", [{"prompt": "a"}] * 5), tmp_path / "out.jsonl"
    command = [sys.executable, "-c", FULL, source[0], file, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be written (File too large): repair that, then run the same command" in done.stdout
    assert out.stat().st_size == 300
    complete = out.read_bytes().count(b"\n")
    summary, lines = answer(max_new_tokens=8)
    assert (summary.done, summary.answered, len(lines)) == (complete, 5 - complete, 5)


def test_a_line_is_written_whole_however_little_is_taken_at_a_time(answer, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", ROWS[:4])
    _, whole = answer()
    (tmp_path / "out.jsonl").unlink()

    class Slow(io.FileIO):
        def write(self, text):
            return super().write(text[:7])

    enter = AnswerFile.__enter__

    def slow(self):
        enter(self)
        self._file = Slow(os.dup(self._file.fileno()), "a")
        return self

    monkeypatch.setattr(AnswerFile, "__enter__", slow)
    assert answer()[1] == whole


def test_rows_that_are_appended_meanwhile_are_the_next_runs(answer, tmp_path, monkeypatch):
    file = tmp_path / "in.jsonl"
    write(file, ROWS[:3])
    put = AnswerFile.write

    def late(self, ask, given):
        write(file, ROWS[:6])
        put(self, ask, given)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "write", late)
        assert answer(batch_size=1)[0].answered == 3
    summary, lines = answer()
    assert (summary.done, summary.answered, len(lines)) == (3, 3, 6)


def test_answers_of_a_file_come_to_stdout_in_its_order(source, configure, tmp_path, capsys):
    rows = [{"prompt": f"é{i}", "max_new_tokens": 9 - i} for i in range(6)]
    config = configure(input=write(tmp_path / "in.jsonl", rows), batch_size=2)
    run(config, tmp_path / "unused")
    expected = [alone(source, row, number)[0] for number, row in enumerate(rows)]
    out = "".join(f"--- {row['prompt']}\n{text}\n" for row, text in zip(rows, expected))
    assert capsys.readouterr().out == out
