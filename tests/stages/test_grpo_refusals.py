"""What GRPO refuses: one line with the flag, before a workdir changes."""

import pytest

from qwen3f.errors import UserError
from qwen3f.stages import grpo
from qwen3f.train import loop
from qwen3f.train.setup import make_setup
from tests.stages import toy_rl


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("grpo_refusals")
    toy_rl.write_data(place)
    return place


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"init_from": ""}, "--config.init_from=W"),
        ({"grpo.loss": "ppo"}, "config.grpo.loss='ppo' is unknown; use one of grpo, dr_grpo"),
        ({"tasks": "maths"}, "--config.tasks=maths: there is no such task"),
        (
            {"tasks": "reasoning,visual"},
            "--config.tasks=visual asks about pictures, and the run's model has no vision tower",
        ),
        ({"rewards": "corect"}, "--config.rewards names 'corect'"),
        ({"rollout.samples": 0}, "config.rollout.samples must be at least 1"),
        ({"rollout.max_new_tokens": 192}, "leaves no room for a prompt in rows of --config.seq_len=192"),
        ({"rollout.temperature": 0.0}, "rollout.temperature=0.0: write a number from 0.001 to 1000"),
        ({"rollout.temperature": 1e-38}, "rollout.temperature=1e-38: write"),
        ({"eval.temperature": -1.0}, "eval.temperature must be at least 0"),
        ({"grpo.sapo_temperatures": (1e-320, 1.0)}, "write two numbers from 0.001 to 1000"),
        ({"rollout.correction": "tis"}, "config.rollout.correction='tis' is unknown"),
        ({"rollout.top_entropy": 0.0}, "top_entropy=0.0"),
        ({"rollout.old_logprobs": "engine"}, "use one of auto, trainer, sampler"),
        (
            {"rollout.old_logprobs": "sampler", "rollout.correction": "token_truncate"},
            r"rollout.old_logprobs=sampler and --config.rollout.correction=token_truncate .* write "
            r"--config.rollout.old_logprobs=trainer, or --config.rollout.correction=none",
        ),
        (
            {"mesh": "pp2", "pipeline.schedule": "zero_bubble", "microbatches": 3, "batch_size": 6},
            "config.microbatches=3: .*=zero_bubble on pp2 runs only multiples of 2; write --config.microbatches=4",
        ),
        ({"advantages.scale": "std"}, "config.advantages.scale='std' is unknown; use one of group"),
        ({"advantages.combine": "sum"}, "config.advantages.combine='sum' is unknown"),
        ({"judge.deadline": 0.0}, "judge.deadline=0.0"),
        ({"judge.deadline": 1e7}, "judge.deadline must be at most 1,000,000 seconds"),
        ({"grpo.loss": "vespo", "rollout.correction": "token_mask"}, "vespo is not linear"),
        ({"rewards": "correct,reward_model"}, "needs a reward model: write --config.judge.reward_model=W"),
        ({"judge.reward_model": "W"}, "judge.reward_model=W: --config.rewards does not use it"),
        ({"updates": 3, "batch_size": 2}, "config.updates=3: each needs a prompt of its own, and a step has .*=2"),
        ({"sandbox": "jail"}, "config.sandbox='jail' is unknown; use one of auto, bubblewrap"),
        ({"data.kinds": "poems"}, "data.kinds is 'poems'"),
        ({"model.scalar_head": True}, "scalar_head=True does not go with a stage"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(changes, words, root):
    with pytest.raises(UserError, match=words):
        grpo.check(make_setup(toy_rl.make_config(root, **changes)))


def test_a_sandbox_is_asked_of_the_run_and_refused_before_the_workdir_changes(root, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen3f.sandbox.tiers.why_not", lambda _: "it is absent")
    config = toy_rl.make_config(root, tasks="code", sandbox="landlock")
    grpo.check(make_setup(config))  # a plan is not made on the run's machine
    with pytest.raises(UserError, match="sandbox=landlock does not work here: it is absent"):
        loop.run(config, tmp_path / "W", progress=False)
    assert not (tmp_path / "W" / "config.json").exists()
