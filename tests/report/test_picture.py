"""The picture for a README: it works outside the page, in a light and a dark colour scheme."""

import io
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from qwen3f.errors import UserError
from qwen3f.report import __main__ as command
from qwen3f.report.charts import main_chart
from qwen3f.report.picture import write_picture
from qwen3f.report.read import read
from tests.report.places import write_pipeline, write_run


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    runs = [write_run(root / name, stage=stage) for name, stage in (("s1", "pretrain"), ("sft", "sft"), ("rl", "grpo"))]
    return write_pipeline(root / "P", runs)


def test_the_svg_has_both_schemes_its_own_paper_and_every_stage(pipeline, tmp_path):
    text = write_picture(pipeline, tmp_path / "x.svg").read_text()
    root = ET.fromstring(text)
    words = " ".join(filter(None, (part.strip() for part in root.itertext())))
    assert all(name in words for name in ("s1", "sft", "rl", "reasoning, thinking first", "Loss"))
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" not in text
    assert "\N{SECTION SIGN}" not in text
    rect = next(one for one in root if one.tag.endswith("rect"))
    assert rect.attrib["style"] == "fill: var(--paper)"
    variables = {f"--{name}" for name in ("ink", "grid", "paper", "line1", "line2", "line3", "line4")}
    used = {part.partition(")")[0] for part in text.split("var(")[1:]}
    assert used <= variables


def test_the_png_is_of_a_size_for_a_page(pipeline, tmp_path):
    image = Image.open(io.BytesIO(write_picture(pipeline, tmp_path / "x.png").read_bytes()))
    assert image.width == 1800
    assert 400 < image.height < 1000


def test_a_single_run_has_a_picture_too(pipeline, tmp_path):
    assert write_picture(pipeline / "01_s1", tmp_path / "x.svg").stat().st_size < 100_000


@pytest.mark.parametrize("stage, title", [("grpo", "Reward"), ("dpo_online", "Reward"), ("dpo", "Loss")])
def test_a_stage_that_answers_is_shown_by_what_its_answers_are_worth(tmp_path, stage, title):
    run = write_run(tmp_path / "W", stage=stage)
    lines = [{"step": step, "loss": 0.7, "reward": step / 3} for step in range(1, 4)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main_chart(read(run).stages[0].run).title == title


def test_what_cannot_be_drawn_is_one_line(pipeline, tmp_path, capsys):
    with pytest.raises(UserError, match=r"ends in \.svg or \.png"):
        write_picture(pipeline, tmp_path / "x.gif")
    (tmp_path / "config.json").write_text("{}")
    assert command.main([str(tmp_path), f"--picture={tmp_path / 'x.svg'}"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} has no stage with metrics yet; there is nothing to draw\n"


def test_without_a_place_for_its_caches_nothing_is_said(pipeline, tmp_path):
    environment = {**os.environ, "MPLCONFIGDIR": "/proc/nowhere", "HOME": "/proc/nowhere"}
    command = [sys.executable, "-m", "qwen3f.report", str(pipeline)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{pipeline / 'report.html'}\n", "")


def test_the_command_writes_the_report(pipeline, capsys):
    assert command.main([str(pipeline)]) == 0
    assert capsys.readouterr().out == f"{pipeline / 'report.html'}\n"
    assert command.main([str(pipeline / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
