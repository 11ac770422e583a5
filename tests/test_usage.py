"""Help, and experiments that are found from anywhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import pipeline
from qwen3f import cli, presets, usage
from qwen3f.stages.configs import pretrain_config

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "experiments" / "demo.py")


def launch(place, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "launch.py", *arguments],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpshort", "--helpfull"])
def test_help_lists_what_there_is_and_ends_well(flag, tmp_path):
    done = launch(tmp_path, flag)
    assert done.returncode == 0
    assert done.stderr == ""
    for path in (ROOT / "experiments").glob("*.py"):
        assert f"experiments/{path.name} " in done.stdout
    assert all(name in done.stdout for name in (*presets.PRESETS, "--config.steps", "--workdir"))


def test_help_lists_an_experiment_that_is_no_python(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.py").write_text("def (")
    (tmp_path / "experiments" / "binary.py").write_bytes(b"\xff")
    monkeypatch.setattr(usage, "ROOT", tmp_path)
    assert [words.split(":")[0] for words in usage.experiments().values()] == ["cannot be read"] * 2


def test_help_names_keys_that_there_are():
    known = dict(usage.flat(pretrain_config("nano")))
    assert set(usage.COMMON) <= set(known)


def test_help_of_an_experiment_has_its_words_and_keys_and_runs_nothing(tmp_path):
    done = launch(tmp_path, "--config", "experiments/pretrain_s1.py:nano", "--help")
    assert done.returncode == 0, done.stderr
    assert "stage 1: general knowledge" in done.stdout
    assert "--config.seq_len=512" in done.stdout
    assert "--config.optimizer.clip_norm=1.0" in done.stdout
    assert list(tmp_path.iterdir()) == []
    wrong = launch(tmp_path, "--help", "--config=experiments/pretrain.py")
    assert wrong.returncode == 2
    assert "did you mean" in wrong.stderr


@pytest.mark.parametrize("preset", pipeline.PRESETS)
def test_help_of_a_pipeline_names_its_stages_and_the_keys_that_can_be_written(preset):
    name = f"{ROOT}/experiments/pipeline.py:{preset}"
    text = usage.of_experiment(name, config := cli.load_experiment(name))
    for stage in config.chain:
        assert re.search(rf"^  {stage.name} +{re.escape(stage.purpose)}$", text, re.MULTILINE)
    assert "--config.stages=''" in text
    assert "--config.chain" not in text
    assert "PipelineStage(" not in text


@pytest.mark.parametrize(
    "given, wanted",
    [
        (["--config", "experiments/demo.py"], ["--config", DEMO]),
        (
            ["--config=experiments/pretrain_s1.py:nano", "-x"],
            [f"--config={ROOT}/experiments/pretrain_s1.py:nano", "-x"],
        ),
        (["-config", "experiments/demo.py:"], ["-config", f"{DEMO}:"]),
        (["--config", "experiments/none.py"], ["--config", "experiments/none.py"]),
        (["--config.prompt", "experiments/demo.py"], ["--config.prompt", "experiments/demo.py"]),
        (["--config"], ["--config"]),
        (["--config", "x" * 300], ["--config", "x" * 300]),
    ],
)
def test_experiments_are_found_beside_launch_py(given, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert usage.locate(["launch.py", *given]) == ["launch.py", *wanted]


def test_one_s_own_experiment_comes_first(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "demo.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert usage.locate(["launch.py", "--config=experiments/demo.py"])[1] == "--config=experiments/demo.py"


def test_from_another_directory_a_command_is_checked_and_runs_as_beside_launch_py(tmp_path):
    done = launch(tmp_path, "--config", "experiments/generate.py")
    assert done.returncode == 2
    assert "config.init_from is missing" in done.stderr
    done = launch(tmp_path, "--config", "experiments/demoo.py")
    assert "did you mean experiments/demo.py?" in done.stderr
