"""Which value a stage's key gets: the pipeline's, or the one that the user set for the stage, even if that is the
default of the stage's experiment."""

import pytest

from qwen3f.pipeline import chain, commands, run
from tests.pipeline import toy


def steps_of(**changes):
    keys = [key.replace("__", ".") for key in changes]
    return {step.name: step for step in chain.steps_of(toy.make_config(**changes), keys)}


@pytest.mark.parametrize(
    "key, all_of_them, own",
    [("seed", 5, 0), ("mesh", "dp2", ""), ("device", "cuda", "auto"), ("hardware", "h200", "auto")],
)
def test_a_stage_keeps_what_the_user_has_set_of_it_its_default_too(key, all_of_them, own):
    steps = steps_of(**{key: all_of_them, f"set__grpo__{key}": own})
    assert steps["grpo"].config[key] == own
    assert steps["dpo"].config[key] == all_of_them
    assert key not in steps["grpo"].overrides


def test_what_differs_from_the_experiment_is_the_stage_s_own_whoever_set_it():
    steps = {step.name: step for step in chain.steps_of(toy.make_config(seed=5, set__grpo__seed=3))}
    assert (steps["grpo"].config.seed, steps["dpo"].config.seed) == (3, 5)


@pytest.mark.parametrize(
    "changes, device",
    [
        ({"device": "cpu"}, "cpu"),
        ({"set__measure__device": "cpu"}, "cpu"),
        ({"device": "cuda", "set__measure__device": "auto"}, "auto"),
        ({"device": "cuda", "set__measure__device": "cpu"}, "cpu"),
    ],
)
def test_questions_have_a_device_of_their_own_where_the_user_set_one(changes, device):
    keys = [key.replace("__", ".") for key in changes]
    assert run._questions(toy.make_config(**changes), keys).device == device


def test_a_plan_is_for_the_mesh_and_the_card_of_the_stage(tmp_path):
    steps = steps_of(mesh="dp2", hardware="h100", set__grpo__mesh="", set__dpo__hardware="h200")
    flags = {name: commands.planning(step, tmp_path) for name, step in steps.items() if step.kind == "training"}
    assert not [word for word in flags["grpo"] if word.startswith("--config.mesh")]
    assert {"--config.mesh=dp2", "--config.hardware=h200"} <= set(flags["dpo"])
    assert {"--config.mesh=dp2", "--config.hardware=h100"} <= set(flags["sft_fusion"])


def test_what_the_user_set_of_a_model_reaches_a_stage_that_starts_from_weights(tmp_path, monkeypatch):
    """A stage that starts from weights takes only the model's keys that are on its command line. A key that the user
    set must be there, even if it has the experiment's own value."""
    own = toy.make_config().set.grpo.model.max_position_embeddings
    flag = f"--config.model.max_position_embeddings={own}"
    without, said = steps_of(), steps_of(set__grpo__model__max_position_embeddings=own)
    assert flag in commands.training(said["grpo"], "W", tmp_path, False)
    assert flag not in commands.training(without["grpo"], "W", tmp_path, False)
    assert flag not in commands.training(said["dpo"], "W", tmp_path, False)
    toy.fake(monkeypatch.setattr)
    skip = "pretrain_s2,pretrain_s3,sft_cold_start,sft_fusion,grpo_general,dpo"
    toy.go(tmp_path / "P", skip=skip)
    with pytest.raises(
        ValueError, match=rf"grpo ran with other settings \(model.max_position_embeddings: its .* {own}\)"
    ):
        toy.go(tmp_path / "P", skip=skip, set__grpo__model__max_position_embeddings=own)


def test_a_dict_that_the_user_set_in_the_place_of_a_value_reaches_the_stage(tmp_path):
    scaling = {"factor": 4.0, "original_max_position_embeddings": 256, "rope_type": "yarn"}
    key = "set__pretrain_s1__model__rope_scaling"
    step = steps_of(**{key: scaling})["pretrain_s1"]
    assert step.overrides["model.rope_scaling"] == scaling
    assert f"--config.model.rope_scaling={scaling}" in commands.training(step, "", tmp_path, False)
    assert step.fresh_record().overrides["model.rope_scaling"] == scaling


def test_a_record_names_weights_of_a_stages_own_before_it_runs():
    steps = steps_of(set__grpo__init_from="W")
    assert (steps["grpo"].fresh_record().start, steps["grpo"].fresh_record().init_from) == (None, "W")
    assert (steps["dpo"].fresh_record().start, steps["dpo"].fresh_record().init_from) == ("grpo_general", None)
