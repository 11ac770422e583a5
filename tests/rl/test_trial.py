"""A trial compares training methods, its arms. Each arm runs the project's stages from the same start, ends by steps or
by time, and is tested on the same questions."""

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from qwen3f.errors import UserError
from qwen3f.eval import rejection
from qwen3f.polling import ready
from qwen3f.rl.trial import arm
from qwen3f.rl.trial.measure import test_questions as fresh_questions
from qwen3f.rl.trial.settings import Trial, grpo_config, more_sft_config, parse, sample_config, start_config
from qwen3f.rl.trial.table import table
from tests.eval import tiny_model
from tests.eval.test_rejection import said

WORDS = (
    *("device=cpu", "minutes=10", "tests=4", "new_tokens=6", "solutions=20", "questions=60", "start_every=2"),
    *("start_steps=4", "start_rates=2", "start.schedule.warmup=1", "start.checkpoint.asynchronous=False"),
    *(
        "round_questions=3",
        "round_steps=2",
        "grpo.steps=2",
        "grpo.schedule.warmup=1",
        "grpo.batch_size=2",
        "grpo.rollout.samples=2",
    ),
    *(
        "grpo.eval.questions=2",
        "grpo.eval.every=1",
        "sft.steps=4",
        "sft.schedule.warmup=1",
    ),
    *("sft.eval.questions=2", "sft.eval.max_rows=4", "start.eval.questions=2", "start.eval.max_rows=4"),
    *("grpo.checkpoint.asynchronous=False", "start.optimizer.kind=adamw", "sft.optimizer.kind=adamw"),
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A directory in which the arm `start` has run: start-0."""
    place = tmp_path_factory.mktemp("trial")
    os.environ.setdefault("XDG_CACHE_HOME", str(place / "cache"))
    arm.main("start", place / "start-0", tiny_model.export(place / "base"), 0, parse(WORDS), time.time())
    return place


def result(place):
    return json.loads((place / "result.json").read_text())


def test_arms_end_with_what_they_are_worth(begun):
    trial, start = parse(WORDS), result(begun / "start-0")["weights"]
    for name in ("grpo", "more_sft"):
        arm.main(name, begun / f"{name}-0", start, 0, trial, time.time())
    found = [result(begun / f"{name}-0") for name in ("start", "grpo", "more_sft")]
    for one in found:
        for way in ("greedy", "sampled"):
            assert len(one[way]["marks"]) == one[way]["right"]["n"] == 4
            assert 0 <= one[way]["right_working"]["value"] <= one[way]["right"]["value"] <= 1
    assert [[step for step, _ in curve] for curve in found[0]["curves"]] == [[2, 4], [2, 4]]
    assert [step for step, _ in found[1]["curve"]] == [1, 2]
    assert [step for step, _ in found[2]["curve"]] == [2, 4]
    assert found[2]["weights"] == start  # no weights give a right answer; of equal ones the first is chosen
    lines = table({"results": found})
    assert len(lines) == 1 + 3 + 4
    assert lines[-1].startswith("grpo over start, sampled: +0.0 (")


def test_rounds_go_on_from_each_others_weights_until_the_time_is_out(begun, monkeypatch):
    """A script gives right answers, since a model with random weights gives none."""
    asked = []

    def answers_of(engine, prompts, thinking, options):
        asked.append(tuple(dict.fromkeys(prompts)))
        golds = {q.prompt: q.gold for q in rejection._check(configs[-1]).questions("train")}
        yield from (said("a thought", rf"\boxed{{{golds[prompt]}}}") for prompt in prompts)

    configs = []
    real = rejection.run
    monkeypatch.setattr(rejection, "run", lambda config, *rest: configs.append(config) or real(config, *rest))
    monkeypatch.setattr(rejection, "answers_of", answers_of)
    limits = iter([0.0, 0.0, 0.0, 0.0, 1e12])  # the clock of `reject`: enough for two rounds
    monkeypatch.setattr(arm, "time", type("Clock", (), {"time": staticmethod(lambda: next(limits, 1e12))}))
    monkeypatch.setattr(arm, "run", lambda config, workdir, over: arm.cli.run_stage(config, workdir, False))
    start = result(begun / "start-0")["weights"]
    weights, rounds, curves = arm.reject(parse(WORDS), begun / "rejection-0", start, 0, 1.0)
    assert weights == start  # no weights give a right answer; of equal ones the first is chosen
    assert [[step for step, _ in curve] for curve in curves] == [[2, 4]]  # time ran out in the second round
    assert [one["right"] for one in rounds] == [12, 12]
    assert configs[0].init_from == start
    assert all(set(a).isdisjoint(b) for i, a in enumerate(asked) for b in asked[:i])
    assert dict(configs[0].data)["kinds"] == "letters"


def written(values, workdir, config):
    """Write what a stage leaves: held-out accuracy at each evaluation, the best checkpoint and the last one."""
    workdir.mkdir()
    every, best = config.eval.every, max(range(len(values)), key=lambda i: values[i])
    lines = [{"step": (i + 1) * every, "val_accuracy": value} for i, value in enumerate(values)]
    (workdir / arm.METRICS).write_text("".join(json.dumps(line) + "\n" for line in ({"step": 1}, *lines)))
    for step in {(best + 1) * every, len(values) * every}:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [
        (([0.1, 0.4, 0.3], [0.5, 0.4]), "rate-1/checkpoints/50"),
        (([0.1, 0.4, 0.3], [0.4, 0.2]), "rate-0/checkpoints/100"),
    ],
)
def test_a_cold_start_goes_on_from_its_best_checkpoint_at_a_lower_rate(tmp_path, monkeypatch, accuracies, chosen):
    configs = []

    def run(config, workdir, over):
        configs.append(config)
        assert not over()
        written(accuracies[len(configs) - 1], workdir, config)

    monkeypatch.setattr(arm, "run", run)
    weights, curves = arm.plateau(parse(("start_every=50",)), tmp_path, "BASE", 0)
    assert weights == str(tmp_path / chosen)
    assert [[value for _, value in curve] for curve in curves] == list(accuracies)
    assert [config.init_from for config in configs] == ["BASE", str(tmp_path / "rate-0" / "checkpoints" / "100")]
    assert configs[1].schedule.peak_lr == pytest.approx(0.3 * configs[0].schedule.peak_lr)
    assert {place.name for place in tmp_path.glob("rate-*") if (place / "checkpoints").exists()} == {chosen[:6]}


def test_a_plateau_is_evaluations_without_a_better_one():
    rising = [(step, value) for step, value in enumerate([0.0, 0.0, 0.3, 0.2, 0.3])]
    assert [arm.flat(rising[:count], 2) for count in range(6)] == [False, False, False, False, False, True]
    assert not arm.flat(rising, 3)
    assert not arm.flat([(step, 0.0) for step in range(9)], 2)  # nothing learned yet


def test_a_stage_is_stopped_in_time_and_other_signals_keep_their_meaning(begun):
    trial = dataclasses.replace(parse(WORDS), changes=(("sft", "eval.questions", 0),))
    before, began = signal.getsignal(signal.SIGTERM), time.time()
    config = more_sft_config(trial, result(begun / "start-0")["weights"], 0)
    arm.run(config, begun / "stopped", arm.after(began + 4))
    assert time.time() - began < 60
    assert signal.getsignal(signal.SIGTERM) is before
    assert any((begun / "stopped" / "checkpoints").iterdir())


def test_an_arm_ends_with_the_trial_that_started_it(tmp_path):
    stub, place = tmp_path / "python", tmp_path / "arm"
    stub.write_text("#!/bin/sh\necho $$\nexec sleep 60\n")
    stub.chmod(0o755)
    code = (
        "import sys\nfrom qwen3f.rl.trial import __main__ as trial\n"
        f"sys.executable = {str(stub)!r}\ntrial._run([('grpo', {str(place)!r}, '', 0)], [], True)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as trial:
        while not ((place / "log").exists() and (place / "log").read_text().endswith("\n")):
            time.sleep(0.02)
        started = os.pidfd_open(int((place / "log").read_text()))
        trial.kill()
    assert ready(started, select.POLLIN, 20)
    os.close(started)


def test_all_arms_have_the_same_questions_and_start():
    trial = parse(("kinds=sorting,addition", "difficulties=2", "questions=300", "seeds=3,4"))
    assert trial.seeds == (3, 4)
    trained = start_config(trial, "W", 0, 0), more_sft_config(trial, "W", 0)
    assert all((c.data.mixture, c.data.max_samples, c.data.problem_seed) == ("procedures", 500, 0) for c in trained)
    for config in (*trained, grpo_config(trial, "W", 0), sample_config(trial, "W", "D", 0, 1)):
        assert (config.init_from, config.data.kinds, config.data.difficulties) == ("W", "sorting,addition", "2")
    prompts = [question.prompt for question in fresh_questions(trial)]
    assert len(prompts) == len(set(prompts)) == trial.tests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preset=small"], "preset=small: write nano or debug"),
        (["minutes=long"], "minutes=long: 'long' is not of the type float"),
        (["minutes=0"], "minutes=0.0: write a number above 0"),
        (["patience=0"], "patience=0: write a number above 0"),
        (["start_steps=5"], "start_steps=5: write more than the 5 steps of warmup"),
        (["start.schedule.peek_lr=1"], "start.schedule.peek_lr: there is no such key"),
        (["colour=red"], "'colour=red': write key=value, where key is one of preset"),
        (["together=yes"], "together=yes: write True or False"),
        (["arms=grpo,dpo"], "arms=grpo,dpo: write grpo or more_sft or rejection"),
        (["seeds="], "seeds= is empty"),
        (["kinds=sorting,logic"], "kinds=sorting,logic: write letters or sorting or"),
        (["difficulties=6"], "difficulties=6: write 1 or 2"),
    ],
)
def test_what_cannot_be_is_said(words, message):
    with pytest.raises(UserError, match=message):
        parse(words)


def test_without_arms_there_are_cold_starts_alone():
    assert parse(("arms=",)).arms == ()


def test_a_key_that_is_not_there_is_named():
    with pytest.raises(UserError, match="grpo.schedule.peek_lr: there is no such key"):
        grpo_config(Trial(changes=(("grpo", "schedule.peek_lr", 1.0),)), "W", 0)
