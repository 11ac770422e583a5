"""Golden configurations: what each experiment resolves to is a file, so that no change goes unseen.

After an intended change: python -m tests.test_experiments   (rewrites tests/golden/)
"""

import json
from pathlib import Path

import pytest

from qwen3f import cli
from qwen3f.train.setup import make_setup

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
    "export_hf",
    "generate",
    "inspect",
)


def resolve(experiment):
    name, _, argument = experiment.partition(":")
    return cli.load_experiment(f"experiments/{name}.py" + (f":{argument}" if argument else ""))


def golden(experiment):
    return GOLDEN / f"{experiment.replace(':', '.').replace(',', '.')}.json"


def as_text(config):
    return json.dumps(json.loads(config.to_json_best_effort()), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_resolved_config_is_the_golden_one(experiment):
    config = resolve(experiment)
    assert as_text(config) == golden(experiment).read_text()
    if config.stage != "pretrain":
        return
    plan = make_setup(config)
    assert plan.schedule.warmup_steps < plan.schedule.total_steps == config.steps


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


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in EXPERIMENTS:
        golden(name).write_text(as_text(resolve(name)))
