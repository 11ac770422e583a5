"""Directories without access: what can be read is shown, and an error names the file that the user asked for."""

import errno
import os
from pathlib import Path

import pytest

from qwen3f.errors import UserError
from qwen3f.report import picture, write
from qwen3f.report import read as reading
from qwen3f.report.__main__ import main
from tests.report.places import write_pipeline, write_run


def denied(path):
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.fixture
def pipeline(tmp_path):
    (tmp_path / "P").mkdir()
    return write_pipeline(tmp_path / "P", [write_run(tmp_path / name) for name in ("one", "two")])


def test_a_report_that_cannot_be_written_is_named_by_its_own_name(pipeline, monkeypatch, capsys):
    def full(path, content):
        raise denied(path.with_name(f".{path.name}.0123"))

    monkeypatch.setattr(write, "write_atomically", full)
    assert main([str(pipeline)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {pipeline / 'report.html'} cannot be written (Permission denied); choose a copy of "
    )
    monkeypatch.setattr(picture, "write_atomically", full)
    assert main([str(pipeline), f"--picture={pipeline / 'x.svg'}"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {pipeline / 'x.svg'} cannot be written (Permission denied); choose another --picture\n"


def test_a_stage_that_cannot_be_read_leaves_the_others(pipeline, monkeypatch):
    access, is_file = os.access, Path.is_file
    monkeypatch.setattr(os, "access", lambda path, mode: "01_one" not in str(path) and access(path, mode))

    def shut(self):
        if "01_one" in str(self):
            raise denied(self)
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", shut)
    one, two = reading.read(pipeline).stages
    assert one.run.problems == ("01_one cannot be read: it gives no access.",)
    assert two.run.metrics.lines == 30
    write.write_report(pipeline)


def test_a_directory_that_cannot_be_read_is_said_to_be(pipeline, monkeypatch, capsys):
    def shut(path):
        raise denied(path)

    monkeypatch.setattr(reading, "read_object", shut)
    with pytest.raises(UserError, match=r"pipeline.json cannot be read \(Permission denied\)"):
        reading.read(pipeline)
    assert main([str(pipeline)]) == 2
    assert "pipeline.json cannot be read" in capsys.readouterr().err
