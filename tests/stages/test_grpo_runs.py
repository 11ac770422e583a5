"""GRPO as users run it: a run that is killed anywhere resumes unchanged, samples are kept."""

import json
import math
import os

import pytest
import torch
import transformers

from qwen3f import cli
from qwen3f.errors import UserError
from qwen3f.eval.answers import mark
from qwen3f.preference.judges import RewardModel
from qwen3f.rl import prepare as R
from qwen3f.rl.judge import Judge
from qwen3f.rl.rollout import Sampler
from qwen3f.sandbox import tiers
from qwen3f.stages import grpo
from qwen3f.train import loop
from qwen3f.train.saving import Saver
from qwen3f.train.setup import make_setup
from qwen3f.train.step import make_train_step
from tests.data.sources.adapters.real_rows import write
from tests.model.hf_params import Widen
from tests.stages import toy_chats, toy_rl
from tests.train.runs import assert_same_bits, final_state, metrics

TIMES = ("_per_sec", "seconds", "mfu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("grpo_runs")
    toy_rl.write_data(place)
    return place


def small(root, kind="dense", **changes):
    parts = {"steps": 3, "rollout.samples": 3, "checkpoint.every": 1, "eval.every": 0, "rollout.draws": 2}
    return toy_rl.make_config(root, kind, **(parts | changes))


@pytest.fixture(scope="module")
def whole(root):
    loop.run(small(root), root / "whole", progress=False)
    return root / "whole"


def samples(workdir):
    return {path.name: path.read_text() for path in (workdir / "samples").glob("*.jsonl")}


def told(workdir):
    """step -> its last line of metrics, without times and rates."""
    lines = {line["step"]: line for line in metrics(workdir)}
    return {
        step: {key: value for key, value in line.items() if not any(part in key for part in TIMES)}
        for step, line in lines.items()
    }


class Killed(Exception):
    pass


def dies_at_call(monkeypatch, owner, name, call):
    """Make the owner's method raise at call number `call`, counted from 1."""
    count, method = [0], getattr(owner, name)

    def wrapped(*args, **named):
        count[0] += 1
        if count[0] == call:
            raise Killed
        return method(*args, **named)

    monkeypatch.setattr(owner, name, wrapped)


# A draw samples and judges once, and a step may draw twice: call 3 is in step 2 or 3. A save begins after each step.
PLACES = {
    "in a rollout": (Sampler, "__call__", 3),
    "in a reward": (Judge, "__call__", 3),
    "in a save": (Saver, "__call__", 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_killed_goes_on_with_the_same_samples_and_numbers(place, root, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        dies_at_call(patched, *PLACES[place])
        with pytest.raises(Killed):
            loop.run(small(root), tmp_path, progress=False)
    before = samples(tmp_path)
    assert before.keys() < samples(whole).keys() or place == "in a save"
    loop.run(small(root), tmp_path, progress=False)
    assert_the_same(tmp_path, whole, root)
    assert all(samples(whole)[name] == text for name, text in before.items())


def assert_the_same(workdir, whole, root):
    assert samples(workdir) == samples(whole)
    assert told(workdir) == told(whole)
    assert_same_bits(final_state(small(root), workdir, 3), final_state(small(root), whole, 3))


def test_killed_between_rollout_and_update(root, whole, tmp_path):
    def make_step(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            if int(state.step) == 1:
                raise Killed
            return step(state, batch)

        return wrapped

    with pytest.raises(Killed):
        loop.run(small(root), tmp_path, False, make_step=make_step)
    assert "step-00000002.jsonl" in samples(tmp_path)
    loop.run(small(root), tmp_path, False)
    assert_the_same(tmp_path, whole, root)


def test_no_prompt_is_lost_or_repeated(root, whole):
    """NeMo PR 3599: a resumed run lost 30% of the prompts. Here places rise by one over all draws and steps."""
    places = []
    for name in sorted(samples(whole)):
        lines = [json.loads(line) for line in samples(whole)[name].splitlines()]
        assert [line["sample"] for line in lines] == [0, 1, 2] * (len(lines) // 3)
        places += [line["place"] for line in lines[::3]]
    assert places == list(range(len(places)))
    assert int(final_state(small(root), whole, 3).position) == len(places)


def test_on_policy_the_first_ratio_is_exactly_one(whole):
    assert [line["ratio_gap"] for line in metrics(whole)] == [0.0] * 3
    assert all(line["clip_low"] == line["clip_high"] == line["moved"] == 0.0 for line in metrics(whole))
    assert all(line["sampler_gap"] < 1e-5 for line in metrics(whole))


def test_a_sampler_that_is_not_the_trainer_is_said(root, tmp_path, monkeypatch, capsys):
    """In step 1 the sampler gets other weights than the trainer. Exactly one line must say so, for this step."""
    given = Sampler.update

    def update(self, params):
        given(self, {key: 3 * leaf if "embed" in key else leaf for key, leaf in params.items()} if not seen else params)
        seen.append(params)

    seen = []
    monkeypatch.setattr(Sampler, "update", update)
    loop.run(small(root), tmp_path, progress=False)
    said = [line for line in capsys.readouterr().err.splitlines() if "sampler and trainer disagree" in line]
    assert len(said) == 1
    assert said[0].startswith("step 1: ")


def test_where_the_engine_is_the_trainer_bit_for_bit_its_log_probs_are_the_old_ones(root, tmp_path, capsys):
    """In float32 with model.INVARIANT: after step 1 "auto" makes no pass for old log-probs, and the ratio stays 1."""
    found, size = {}, 266  # ids of the tokenizer
    toy_chats.write_weights(root / "exact", toy_chats.SMALL | {"vocab_size": size})
    for old in ("auto", "trainer"):
        config = small(root, "exact", dtype="float32", attention="invariant", microbatches=1)
        config.update_from_flattened_dict({"rollout.old_logprobs": old, "model.vocab_size": size})
        loop.run(config, tmp_path / old, progress=False)
        said = capsys.readouterr().out
        assert "step 1: log-probs of sampler and trainer agree bit for bit; old_logprobs: the " in said
        assert f"old_logprobs: the {'sampler' if old == 'auto' else 'trainer'}'s" in said
        found[old] = metrics(tmp_path / old)
        assert [line["ratio_gap"] for line in found[old]] == [0.0] * 3
    assert ["sampler_kl" in line for line in found["auto"]] == [True, False, False]
    assert all(line["sampler_gap"] == 0 for line in found["trainer"])
    assert samples(tmp_path / "auto") == samples(tmp_path / "trainer")
    assert [line["loss"] for line in found["auto"]] == [line["loss"] for line in found["trainer"]]


def test_where_the_ratio_is_in_the_advantages_it_is_in_no_old_log_probs(root, tmp_path, capsys):
    """With a correction "auto" takes the trainer's: with the sampler's, a later difference would count twice."""
    toy_chats.write_weights(root / "corrected", toy_chats.SMALL | {"vocab_size": 266})
    config = small(root, "corrected", steps=1, dtype="float32", attention="invariant", microbatches=1)
    config.update_from_flattened_dict({"rollout.correction": "token_truncate", "model.vocab_size": 266})
    loop.run(config, tmp_path, progress=False)
    assert "agree bit for bit; old_logprobs: the trainer's" in capsys.readouterr().out


def test_the_sandbox_that_is_named_holds_for_rewards_and_evaluation(root, tmp_path, monkeypatch):
    seen = []

    def mark_and_see(*arguments):
        seen.append(tiers.find_tier())
        return mark(*arguments)

    monkeypatch.setattr(tiers, "why_not", lambda tier: "" if tier == "none" else "not here")
    monkeypatch.setattr(grpo, "mark", mark_and_see)
    monkeypatch.delenv(tiers.VARIABLE, raising=False)
    changes = {"tasks": "code", "sandbox": "none", "seq_len": 512, "eval.every": 1, "rollout.samples": 2}
    config = small(root, steps=1, rewards="tests.rl.toy_rewards:unconfined", **changes)
    loop.run(config, tmp_path, progress=False)
    assert seen
    assert set(seen) == {"none"}
    assert metrics(tmp_path)[0]["reward"] == 1.0
    assert tiers.VARIABLE not in os.environ


def test_it_learns_what_the_reward_asks_for(root, tmp_path):
    """Random weights, and a reward only for small letters: after 16 steps they are much more frequent."""
    config = toy_rl.make_config(root, steps=16, dtype="float32", rewards="tests.rl.toy_rewards:small_letters")
    config.update_from_flattened_dict({"rollout.samples": 8, "eval.questions": 0, "microbatches": 1})
    config.update_from_flattened_dict({"rollout.microbatch_rows": 4, "checkpoint.every": 0, "samples.keep": 5})
    loop.run(config, tmp_path, progress=False)
    rewards = [line["reward"] for line in metrics(tmp_path)]
    assert sum(rewards[-4:]) > 2 * sum(rewards[:4])
    assert sorted(samples(tmp_path)) == [f"step-{n:08d}.jsonl" for n in range(12, 17)]  # older files were deleted


def test_a_run_goes_on_with_the_reference_that_it_began_with(root, tmp_path):
    """The reference is the weights of the start. If others are at their path later, the run refuses to resume."""
    start, other = tmp_path / "start", tmp_path / "other"
    toy_chats.write_weights(start, toy_rl.SMALL)
    toy_chats.write_weights(other, toy_rl.SMALL, seed=2)
    config = small(root, steps=1, init_from=str(start), **{"grpo.kl_coef": 0.1, "eval.questions": 0})
    loop.run(config, tmp_path / "run", progress=False)
    start.rename(tmp_path / "old")
    other.rename(start)
    config.steps = 2
    with pytest.raises(UserError, match=r"other weights than the reference .* write --config.init_from="):
        loop.run(config, tmp_path / "run", progress=False)


def test_samples_are_whole(root, whole):
    lines = [json.loads(line) for line in samples(whole)["step-00000001.jsonl"].splitlines()]
    for line in lines:
        assert line["task"] == "reasoning"
        assert line["tokens"] <= line["longest"] == toy_rl.NEW
        rewards = line["rewards"]
        total = rewards["tests.rl.toy_rewards:small_letters"] + 0.1 * rewards["length"]
        assert line["reward"] == pytest.approx(total, abs=1e-12)
    events = list((whole / "tensorboard").glob("events*"))
    assert any(b"text/0" in event.read_bytes() for event in events)
    assert "val_accuracy" in metrics(whole)[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"grpo.loss": "gspo", "updates": 2, "advantages.scale": "group"},
        {"grpo.loss": "vespo", "grpo.kl_coef": 0.1, "grpo.kl": "k2"},
        {"rollout.correction": "sequence_mask", "rollout.top_entropy": 0.5, "rollout.mask_truncated": True},
        {"rollout.samples": 1, "rollout.old_logprobs": "sampler", "rollout.temperature": 0.8},
        {"tasks": "reasoning=0.5,code=0.5", "sandbox": "none", "seq_len": 512, "rewards": "format,language,overlong"},
    ],
    ids=str,
)
def test_what_can_be_configured_runs(changes, root, tmp_path):
    config = small(root, steps=1, **changes)
    grpo.check(make_setup(config))
    loop.run(config, tmp_path, progress=False)
    (line,) = metrics(tmp_path)
    assert all(math.isfinite(value) for value in line.values())
    if config.rollout.samples == 1:
        assert line["groups_wasted"] == 1.0
        assert line["loss"] == 0.0


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_left_out_and_said(root, tmp_path, capsys):
    write([{"question": "q" * 400, "answer": "#### 1"}, {"question": "How much is 1 + 1?", "answer": "#### 2"}],
          tmp_path / "gsm8k" / "train.jsonl")  # fmt: skip
    write([{"question": "How much is 1 + 2?", "answer": "#### 3"}], tmp_path / "gsm8k" / "test.jsonl")
    options = {"eval.questions": 1, "rollout.samples": 1, "advantages.scale": "batch"}
    config = small(root, steps=1, tasks=f"gsm8k@{tmp_path}/gsm8k", **options)
    loop.run(config, tmp_path / "w", progress=False)
    said = capsys.readouterr().out
    assert "questions: 1 to train on" in said
    assert "1 questions were left out: their prompts leave no room" in said
    assert "a completion has no others to be compared with, so every advantage is 0" in said
    config.update_from_flattened_dict({"rollout.cache_tokens": 32})
    with pytest.raises(UserError, match="config.rollout.cache_tokens=32 has no room for the longest prompt"):
        loop.run(config, tmp_path / "x", progress=False)
    config.update_from_flattened_dict({"seq_len": 64})
    with pytest.raises(UserError, match="has no question to train on; all 2 prompts are longer than 58 tokens"):
        loop.run(config, tmp_path / "x", progress=False)


def test_a_step_that_nothing_can_judge_ends_the_run_with_what_was_trained(root, tmp_path, monkeypatch):
    """From step 2 on the reward raises. The state of step 1 is saved, and the error names the reason."""
    config = small(root, **{"checkpoint.every": 0, "rollout.draws": 1})
    judge, calls = R._judge, []

    def fails(groups, tools):
        calls.append(1)
        if len(calls) > 1:
            tools.judge.names = ("tests.rl.toy_rewards:raises",)
        return judge(groups, tools)

    monkeypatch.setattr(R, "_judge", fails)
    with pytest.raises(UserError, match=r"none of 12 completions could be judged.*KeyError: 'gold' \(12 times\)"):
        loop.run(config, tmp_path, progress=False)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["1"]


def test_a_reward_models_scores_are_a_reward(root, tmp_path, monkeypatch):
    """They equal transformers', to 1e-10 in float64. The total has them, with their weight, beside rewards by rule."""
    asked, scores = [], RewardModel.scores
    monkeypatch.setattr(
        RewardModel, "scores", lambda model, documents: asked.extend(documents) or scores(model, documents)
    )
    rewards = "tests.rl.toy_rewards:small_letters=1,reward_model=0.5"
    config = small(root, steps=1, rewards=rewards, **{"judge.reward_model": str(root / "reward"), "rollout.draws": 1})
    loop.run(config, tmp_path, progress=False)
    lines = [json.loads(x) for x in samples(tmp_path)["step-00000001.jsonl"].splitlines()]
    with Widen(), torch.no_grad():
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(root / "reward", dtype=torch.float64)
        expected = [theirs(torch.tensor([ids])).logits.item() for ids in asked]
    assert [line["rewards"]["reward_model"] for line in lines] == pytest.approx(expected, rel=1e-10)
    for line in lines:
        by_rule, of_model = line["rewards"]["tests.rl.toy_rewards:small_letters"], line["rewards"]["reward_model"]
        assert line["reward"] == pytest.approx(by_rule + 0.5 * of_model, rel=1e-10)
    (said,) = metrics(tmp_path)
    assert said["reward/reward_model"] == pytest.approx(sum(expected) / len(expected), rel=1e-10)


def test_rewards_that_fail_now_and_then_are_said_and_the_run_goes_on(root, tmp_path, capsys):
    config = small(root, steps=1, rewards="tests.rl.toy_rewards:small_letters,tests.rl.toy_rewards:picky")
    loop.run(config, tmp_path, progress=False)
    assert "step 1: rewards failed: tests.rl.toy_rewards:picky: RuntimeError: of even length" in capsys.readouterr().out
    (line,) = metrics(tmp_path)
    assert 0 < line["unjudged"] < 1
    assert math.isfinite(line["reward"])
    lines = [json.loads(x) for x in samples(tmp_path)["step-00000001.jsonl"].splitlines()]
    unjudged = [x for x in lines if x["rewards"]["tests.rl.toy_rewards:picky"] is None]
    assert unjudged
    assert all(x["reward"] is None and x["advantage"] == 0.0 for x in unjudged)


def test_a_trained_batch_has_what_the_contract_names(root, tmp_path):
    seen = []

    def make_step(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            seen.append(batch)
            return step(state, batch)

        return wrapped

    loop.run(small(root, steps=1, **{"rollout.temperature": 0.9}), tmp_path, False, make_step=make_step)
    keys = {"tokens", "targets", "loss_weights", "positions", "segments", "advantages", "old_logprobs", "temperature"}
    assert seen[0].keys() == keys | {"consumed"}
    assert seen[0]["temperature"].unique().tolist() == [pytest.approx(0.9)]
    assert torch.equal(seen[0]["advantages"] != 0, (seen[0]["advantages"] != 0) & (seen[0]["loss_weights"] != 0))


def test_both_experiments_start_from_their_commands(root):
    for name in ("grpo", "grpo_general"):
        config = cli.load_experiment(f"experiments/{name}.py:nano")
        config.update(init_from=str(root / "dense"), sandbox="none", device="cpu")
        grpo.check(make_setup(config))
