"""Golden configurations: a file holds what each experiment resolves to, so that no change goes unseen.

After an intended change: python -m tests.test_experiments   (rewrites tests/golden/)
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from qwen3f import cli, presets, stages
from qwen3f.errors import UserError
from qwen3f.pipeline.commands import EVAL
from qwen3f.pipeline.stages import MEASURE, differing
from qwen3f.plan import run as plan_run
from qwen3f.plan.config import from_config
from qwen3f.train import checks
from qwen3f.train.setup import make_setup
from qwen3f.train.stage import find_stage
from tests.pages import PAGES, launches, name_of

GOLDEN = Path(__file__).parent / "golden"
EXPERIMENTS = (
    "demo",
    "pretrain_s1",
    "pretrain_s1:nano",
    "pretrain_s1:debug_moe",
    "pretrain_s2",
    "pretrain_s2:nano",
    "pretrain_s3",
    "pretrain_s3:nano",
    "pretrain_s3:small,yarn",
    "sft_cold_start",
    "sft_cold_start:nano",
    "sft_cold_start:debug",
    "sft_fusion",
    "sft_fusion:nano",
    "reward_model",
    "reward_model:nano",
    "dpo",
    "dpo:nano",
    "dpo_online",
    "dpo_online:nano",
    "eval",
    "grpo",
    "grpo:nano",
    "grpo_general",
    "grpo_general:nano",
    "multimodal",
    "multimodal:nano_vl",
    "grpo:nano_vl",
    "multimodal:seed_vl",
    "export_hf",
    "generate",
    "inspect",
    "pipeline",
    "pipeline:debug",
    "pipeline:debug_moe",
    "pipeline:nano_vl",
    "pipeline:large",
    "rejection_sample",
)


def resolve(experiment):
    name, _, argument = experiment.partition(":")
    return cli.load_experiment(f"experiments/{name}.py" + (f":{argument}" if argument else ""))


def golden(experiment):
    return GOLDEN / f"{experiment.replace(':', '.').replace(',', '.')}.json"


def as_text(config):
    """The configuration as JSON. Of a pipeline's stages it has only what differs from their experiments, which have
    files of their own."""
    values = json.loads(config.to_json_best_effort())
    if config.stage == "pipeline":
        files = {stage.name: stage.experiment for stage in config.chain} | {MEASURE: EVAL}
        values["set"] = {name: differing(one, files[name]) for name, one in config.set.items()}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_an_experiment_says_by_itself_passes_the_checks_without_torch(experiment):
    config = resolve(experiment)
    for key in checks.PLACES:
        if key in config:
            config[key] = "DIR"
    checks.check(config)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_resolved_config_is_the_golden_one(experiment):
    config = resolve(experiment)
    assert as_text(config) == golden(experiment).read_text()
    if config.stage not in stages.names():
        return
    if config.stage == "grpo":
        config.update(init_from="W", sandbox="none")  # a user says where the model is and what sandbox there is
    plan = make_setup(config)
    find_stage(config.stage).check(plan)
    schedule = plan.step_options().schedule
    assert schedule.warmup_steps < schedule.total_steps == config.steps


def test_every_experiment_is_covered():
    files = {path.stem for path in Path("experiments").glob("*.py")}
    assert files == {experiment.partition(":")[0] for experiment in EXPERIMENTS}
    assert {golden(e) for e in EXPERIMENTS} == set(GOLDEN.glob("*.json"))


def test_stage_lengths_and_rotary_bases():
    s1, s3 = resolve("pretrain_s1"), resolve("pretrain_s3")
    assert (s1.seq_len, s1.model.rope_theta) == (4096, 1e4)
    assert (s3.seq_len, s3.model.rope_theta, s3.model.rope_scaling) == (32768, 1e6, None)
    assert resolve("pretrain_s3:nano").seq_len <= 2048
    assert resolve("pretrain_s3:small,yarn").model.rope_scaling.factor == 8.0


def written():
    """(where, arguments) of each command in the experiments' docstrings; those of pages are in test_readme.py."""
    for path in sorted(Path("experiments").glob("*.py")):
        text = re.sub(r"\\\n\s*", "", path.read_text())  # commands of several lines
        for line in re.findall(r"python (launch\.py --config experiments/.*)", text):
            yield path.name, shlex.split(line.replace("[", "").replace("]", ""), comments=True)


@pytest.mark.parametrize("where, arguments", written())
def test_commands_that_are_written_down_have_known_keys(where, arguments):
    cli._check_overrides(arguments)


def test_every_experiment_says_its_command():
    names = {path.name for path in Path("experiments").glob("*.py")}
    assert {where for where, _ in written()} == names
    for name in names:
        assert any(where == name and f"experiments/{name}" in arguments[2] for where, arguments in written()), name


# -- on meshes ---------------------------------------------------------------------------------------------------------

MESH = "dp8,tp2,pp4"  # of the contract's command


def test_the_contracts_command_asks_for_its_hosts(tmp_path, monkeypatch):
    """On a host with too few devices the error has the command for each host, and nothing is written."""
    command = ["launch.py", "--config", "experiments/pretrain_s1.py", f"--config.mesh={MESH}"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("qwen3f.processes.ranks.local_devices", lambda device: 8)
    config = resolve("pretrain_s1")
    config.update(mesh=MESH, device="cpu")
    with pytest.raises(UserError) as caught:
        cli.run_stage(config, tmp_path / "w", False)
    line = "torchrun --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=qwen3f "
    assert str(caught.value).endswith(
        f"run this on each of 8 such hosts, with the name of one of them as HOST: {line}{shlex.join(command)}"
    )
    assert not (tmp_path / "w").exists()


def refused(config, workdir):
    """The message of the run's error, or None."""
    try:
        cli.run_stage(config, workdir, False)
    except UserError as error:
        return str(error)
    return None


def follow(config, error):
    """Do what the error says to write."""
    if size := re.search(r"^config\.batch_size=\d+ can't fill .*; write a multiple of (\d+)$", error):
        config.batch_size = int(size[1])
        return
    axis, size = re.search(r"; write in config\.mesh ([a-z]+)(\d+)\b", error).groups()
    config.mesh = re.sub(rf"\b{axis}\d+", axis + size, config.mesh)


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("experiment", ["pretrain_s1", "pretrain_s2", "pretrain_s3"])
def test_every_preset_ends_with_a_plan_or_an_error_that_leads_to_one(experiment, preset, tmp_path, monkeypatch, capsys):
    """An error has one line. A plan that does not fit names a change that would. Pictures are drawn in other tests."""
    for draw in ("mesh_png", "timeline_png"):
        monkeypatch.setattr(plan_run, draw, lambda plan: b"")
    config = resolve(f"{experiment}:{preset}")
    config.update(mesh=MESH, plan=True, hardware="h100")
    advice = 0
    while (error := refused(config, tmp_path)) is not None:
        assert "\n" not in error
        assert capsys.readouterr().out == ""
        advice += 1
        assert advice < 4
        follow(config, error)
    out = capsys.readouterr().out.splitlines()
    assert (tmp_path / "plan" / "mesh.png").exists()
    (verdict,) = (line for line in out if line.startswith("the peak is at "))
    hints = [line for line in out if line.startswith("does not fit; the smallest change that fits: --config.")]
    assert verdict.endswith(", fits") == (hints == [])
    assert (advice > 0) == (presets.get(preset).num_hidden_layers <= 6)  # too few layers for pp4


def commands():
    """(where, experiment, flags) of each pretraining command with a mesh in a page or an experiment's docstring."""
    of_pages = ((name_of(page), words) for page in PAGES for words in launches(page))
    for where, words in (*of_pages, *written()):
        flags = dict(re.findall(r"^--config\.(\w+)=(.*)", "\n".join(words), re.MULTILINE))
        if "pretrain" in words[2] and "mesh" in flags:
            yield where, words[2].removeprefix("experiments/").replace(".py", ""), flags


@pytest.mark.parametrize("where, experiment, flags", commands())
def test_meshes_that_are_written_down_cut_the_experiments_batch(where, experiment, flags):
    config = resolve(experiment)
    assert {"mesh"} <= set(flags) <= {"mesh", "plan", "hardware"}
    config.update(mesh=flags["mesh"], hardware=flags.get("hardware", "h100"))
    case = from_config(config)
    assert case.mesh.size > 1
    config.device = "cpu"
    make_setup(config)


def test_meshes_are_written_down():
    assert {"README.md", "pretrain_s1.py", "pretrain_s3.py"} <= {where for where, *_ in commands()}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in EXPERIMENTS:
        golden(name).write_text(as_text(resolve(name)))
