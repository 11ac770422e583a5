"""A workdir that no run can use, or a bad file in it, gives an error of one line, and nothing is written."""

import os

import pytest

from qwen3f import cli
from qwen3f.errors import UserError
from qwen3f.files import write_atomically
from qwen3f.train.logger import MetricLogger

PLACES = {
    "file": "cannot be a directory: .*file is a file",
    "file/below": "cannot be a directory: .*file is a file",
    "dangling": "dangling is a link to .*, which is not there",
    "dangling/below": "dangling is a link to .*, which is not there",
    "x" * 300: "cannot be written .File name too long",
    "a\0b": "cannot be written .*null",
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return tmp_path


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize("name", PLACES, ids=range(len(PLACES)))
def test_a_workdir_that_cannot_be(make, place, name, plan):
    before = sorted(place.iterdir())
    with pytest.raises(UserError, match=f"--workdir=.*{PLACES[name]}") as error:
        cli.run_stage(make(plan=plan), place / name, False)
    assert "\n" not in str(error.value)
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("plan", [False, True])
def test_a_workdir_that_cannot_be_written(make, tmp_path, monkeypatch, plan):
    """Root may write everywhere, so the test changes what os.access answers."""
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(UserError, match="--workdir=.*w cannot be written: .* is read-only; choose another"):
        cli.run_stage(make(plan=plan), tmp_path / "w", False)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_whose_pictures_cannot_be_written(make, tmp_path, monkeypatch):
    def fails(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("qwen3f.plan.run.write_atomically", fails)
    assert write_atomically is not fails
    with pytest.raises(UserError, match=r"the pictures cannot be written there \(Permission denied\); choose another"):
        cli.run_stage(make(plan=True, hardware="h100"), tmp_path / "w", False)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\xfe\n", "is not a text file that a run wrote"),
        (b'{"step": Infinity}\n', "line 1 is not a JSON object"),
        (b'{"step": NaN}\n', "line 1 is not a JSON object"),
        (b"[" * 10**5 + b"\n", "line 1 is not a JSON object"),
        (b'{"step": ' + b"9" * 5000 + b"}\n", "line 1 is not a JSON object"),
        (None, "is not a text file that a run wrote"),
    ],
    ids=range(6),
)
def test_metrics_that_no_run_wrote(tmp_path, content, words):
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"metrics.jsonl.*{words}"):
        MetricLogger(tmp_path, total_steps=2, start_step=1, run_config={}, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("content", ["[]", "null", "[" * 10**5, '{"a": ' + "9" * 5000 + "}", None], ids=range(5))
def test_a_config_that_no_run_wrote(make, tmp_path, content):
    path = tmp_path / "config.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(UserError, match="config.json is not what a run writes"):
        cli.run_stage(make(), tmp_path, False)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


NOBODY = "~no-such-user/x"  # a user who does not exist, so without a home directory


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"init_from": NOBODY}, "config.init_from: "),
        ({"data.cache": NOBODY}, "data.cache: "),
        ({"data.mixture": f"files@{NOBODY}"}, "data.mixture: "),
        ({"data.mixture": f"files@{NOBODY}=0.5,embedded=0.5"}, "the mixture's files@"),
        ({"data.mixture": f"fineweb@{NOBODY}"}, "fineweb@DIR, or config.data.root: "),
        ({"data.mixture": "embedded", "data.root": NOBODY}, "data.root: "),
        ({"data.tokenizer": NOBODY}, "data.tokenizer: "),
    ],
)
def test_a_home_of_nobody(make, tmp_path, changes, words):
    config = make()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=f"{words}.*there is no home directory for ~no-such-user; write the whole path"):
        cli.run_stage(config, tmp_path / "w", False)
    assert not (tmp_path / "w").exists()
