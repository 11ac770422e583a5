"""The presets of experiments/pipeline.py: what they say, their budgets, and what a mesh would do in each stage."""

import subprocess
import sys

import pytest

from experiments import pipeline
from qwen3f import cli
from qwen3f.errors import UserError
from qwen3f.pipeline import chain, run
from qwen3f.tasks.reasoning import ReasoningTask
from tests.pipeline import toy


def config_of(preset):
    return cli.load_experiment(str(toy.ROOT / "experiments" / f"pipeline.py:{preset}"))


@pytest.mark.parametrize(
    "preset, most", [("nano", 28 * 60), ("nano_vl", 28 * 60), ("debug", 9 * 60), ("debug_moe", 9 * 60)]
)
def test_budgets_sum_to_what_is_promised_and_every_stage_has_one(preset, most):
    seconds = [stage.seconds for stage in config_of(preset).chain]
    assert all(seconds)
    assert sum(seconds) <= most


@pytest.mark.parametrize("preset", pipeline.PRESETS)
def test_every_preset_is_a_chain_whose_stages_pass_their_checks(preset):
    steps = chain.steps_of(config_of(preset))
    assert [step.source for step in steps][1:] == [step.name for step in steps if step.kind == "training"][
        : len(steps) - 1
    ]
    assert steps[0].source == ""


def test_nano_asks_what_it_trains():
    config = config_of("nano")
    for name in ("sft_cold_start", "grpo", "sft_fusion", "dpo"):
        for key in ("kinds", "difficulties"):
            assert config.set[name].data[key] == config.set.measure.data[key] == config.set.evaluation.data[key]


@pytest.mark.parametrize("preset", ["nano", "debug"])
def test_the_questions_that_are_asked_exist(preset):
    """Each kind has at least as many held-out questions as the limit."""
    config = config_of(preset)
    for place in (config.set.measure, config.set.evaluation):
        kinds = tuple(place.data.kinds.split(","))
        difficulties = tuple(map(int, place.data.difficulties.split(",")))
        task = ReasoningTask(kinds=kinds, difficulties=difficulties, num_problems=place.data.problems)
        groups = [question.group[0] for question in task.questions("heldout")]
        assert all(groups.count(kind) >= place.limit for kind in kinds)


def test_one_seed_and_device_for_all_stages_but_those_that_have_their_own():
    config = config_of("nano")
    config.update_from_flattened_dict({"seed": 5, "device": "cpu", "set.grpo.seed": 7, "mesh": "dp2"})
    steps = {step.name: step.config for step in chain.steps_of(config)}
    assert {name: one.seed for name, one in steps.items()} == {name: 7 if name == "grpo" else 5 for name in steps}
    assert {one.device for one in steps.values()} == {"cpu"}
    assert {name: one.mesh for name, one in steps.items() if one.mesh} == dict.fromkeys(toy.TRAINED, "dp2")


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset 'nanoo'; did you mean 'nano'\?"):
        config_of("nanoo")


def test_a_flag_of_a_stage_that_is_misspelt_names_the_nearest():
    for flag, meant in (
        ("set.grpo.stepz", "set.grpo.steps"),
        ("set.grp.steps", "set.grpo.steps"),
        ("skipp", "skip"),
    ):
        with pytest.raises(UserError, match=rf"unknown key --config.{flag}; did you mean config.{meant}\?"):
            cli._check_overrides(["launch.py", "--config", "experiments/pipeline.py:nano", f"--config.{flag}=3"])


def test_launch_py_refuses_in_one_line_and_makes_nothing(tmp_path):
    command = [sys.executable, "launch.py", "--config", "experiments/pipeline.py:nano", f"--workdir={tmp_path}/P"]
    for flag, words in (
        ("--config.stages=grop", "error: --config.stages=grop: there is no stage 'grop'; did you mean grpo?\n"),
        ("--config.set.grpo.steps=0", "error: --config.set.grpo.steps must be at least 1, got 0\n"),
        ("--config.stages=grpo", "error: --config.stages: grpo starts from sft_cold_start, which has not run; write "),
    ):
        done = subprocess.run([*command, flag], cwd=toy.ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(words)
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "P").exists()


def test_a_mesh_is_planned_for_what_can_be_and_the_others_say_why(tmp_path, capfd):
    """The preset large, with one stage of each kind."""
    config = config_of("large")
    config.update_from_flattened_dict({
        "mesh": "dp8,tp2,pp4", "plan": True, "hardware": "h100", "set.dpo.init_from": "W",
        "skip": "pretrain_s1,pretrain_s2,pretrain_s3,sft_cold_start,sft_fusion,grpo_general",
        "set.grpo.init_from": "W",
    })  # fmt: skip
    run.run(config, tmp_path / "P", progress=False)
    out = capfd.readouterr().out
    assert out.splitlines()[-1] == "planned: dpo; not: grpo, evaluation"
    assert out.count("plan: 64 × h100: pp 4 · dp 8 · tp 2") == 1
    assert "not planned: each rank answers with the whole model, 438 GiB in bfloat16, and a h100 has 79" in out
    assert not (tmp_path / "P" / "pipeline.json").exists()
