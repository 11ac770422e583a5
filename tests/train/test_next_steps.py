"""What a run prints at its end, and the warning at its start if a CPU would take too long."""

import dataclasses
import os
import re
import shlex
import signal

import pytest
from ml_collections import ConfigDict

from qwen3f import cli, presets, usage
from qwen3f.stages import reward_model
from qwen3f.stages.configs import pretrain_config
from qwen3f.train import cpu_cost, metrics
from qwen3f.train.loop import run
from qwen3f.train.next_steps import ASK, ASK_PICTURE, EXPORT, find_preset, next_steps
from qwen3f.train.setup import make_setup
from qwen3f.train.step import make_train_step


def commands(said):
    return [shlex.split(line) for line in said.partition("what next:")[2].splitlines() if line.startswith("  ")]


def test_a_whole_run_says_where_things_are_and_commands_that_are_valid(make, tmp_path, capsys):
    config = make(steps=3, **{"sample.prompts": ("a 'quoted' {text} ",)})
    workdir = tmp_path / "a run"
    run(config, workdir, progress=False)
    said = capsys.readouterr().out
    [line] = [line for line in said.splitlines() if line.startswith("done at step 3")]
    assert all((workdir / name).exists() for name in line.partition(f"{workdir}: ")[2].split(", "))
    *launches, board = commands(said)
    assert board == ["tensorboard", "--logdir", str(workdir / "tensorboard")]
    assert [words[:3] for words in launches] == [["python", "launch.py", "--config"]] * len(launches)
    assert "--config.prompt=a 'quoted' {text} " in launches[0]
    for words in launches:
        experiment = words[3].partition(":")[0]
        assert experiment in usage.experiments()
        cli._check_overrides(["launch.py", "--config", experiment, *words[4:]])
        assert f"--config.init_from={workdir}" in words
    run(config, workdir, progress=False)
    assert "done at step 3" in capsys.readouterr().out


(REWARDS,) = reward_model._next(ConfigDict({"init_from": "a {b} c"}))


@pytest.mark.parametrize("command", [ASK, ASK_PICTURE, EXPORT, REWARDS])
def test_the_commands_of_stages_are_valid(command, tmp_path):
    line = next_steps(tmp_path / "a run", presets.get("nano"), 1, [command])[2]
    words = shlex.split(line)
    experiment = words[3].partition(":")[0]
    assert experiment in usage.experiments()
    cli._check_overrides(["launch.py", "--config", experiment, *words[4:]])
    assert any(str(tmp_path / "a run") in word for word in words)
    if command == REWARDS:
        assert words[3] == "experiments/grpo.py:nano"
        assert "--config.init_from=a {b} c" in words


def test_a_run_that_is_stopped_does_not_say_that_it_is_done(make, tmp_path, capsys):
    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return make_train_step(*args)

    run(make(steps=3), tmp_path, progress=False, make_step=signalled)
    said = capsys.readouterr().out
    assert "SIGTERM: stopped after step" in said
    assert "done at" not in said


@pytest.mark.parametrize("name", ["nano", "debug_moe", "qwen3-0.6b"])
def test_the_preset_is_found_by_the_sizes(name, tmp_path):
    cfg = presets.get(name).replace(rope_theta=5.0, max_position_embeddings=7, initializer_range=0.5)
    assert find_preset(cfg) == name
    assert find_preset(cfg.replace(scalar_head=True)) == name
    assert next_steps(tmp_path, cfg, 1, ["--config x:{preset}"])[2].endswith(f"--config x:{name}")


@pytest.mark.parametrize("name", ["nano", "nano_vl", "debug_moe", "qwen3-0.6b"])
def test_a_model_of_other_sizes_gets_the_nearest_preset_of_its_kind(name):
    assert find_preset(presets.get(name).replace(vocab_size=presets.get(name).vocab_size + 8)) == name


def test_a_reward_model_without_a_policy_names_none():
    assert reward_model._next(ConfigDict({"init_from": ""})) == ()


@pytest.fixture
def of_rate(monkeypatch):
    monkeypatch.setattr(cpu_cost, "peak_flops", lambda device: 1e12)


def setup_of(preset, **changes):
    config = pretrain_config(preset)
    config.update({"device": "cpu", **changes})
    return make_setup(config)


def test_a_large_model_on_a_cpu_is_said_with_size_and_times(of_rate):
    setup = setup_of("small", steps=1000, batch_size=64, seq_len=4096)
    said = cpu_cost.cpu_warning(setup)
    step = metrics.flops_per_token(setup.model, 4096) * 64 * 4096 / 1e12
    minutes, days = re.search(r"at least (\S+) minutes, all 1,000 at least (\S+) days", said).groups()
    assert float(minutes) == pytest.approx(step / 60, abs=0.5)
    assert float(days) == pytest.approx(step * 1000 / 86400, abs=0.5)
    assert "a model of 1.61B parameters" in said
    assert f"{16 * setup.model.total_params_estimate() / 2**30:.3g} GiB" in said


def test_what_a_cpu_can_do_is_not_warned_of(of_rate, monkeypatch):
    setup = setup_of("nano", steps=1000, batch_size=8, seq_len=512)
    assert cpu_cost.cpu_warning(setup) == ""
    assert "all 10,000,000 at least" in cpu_cost.cpu_warning(setup_of("nano", steps=10**7, batch_size=8, seq_len=512))
    elsewhere = dataclasses.replace(setup, device=dataclasses.make_dataclass("D", ["type"])("cuda"))
    assert cpu_cost.cpu_warning(elsewhere) == ""
    monkeypatch.setattr(cpu_cost.os, "sysconf", lambda name: 2)
    assert "GiB" in cpu_cost.cpu_warning(setup)  # memory is too small for it
