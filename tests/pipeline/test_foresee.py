"""Errors that a later stage would raise after an hour are raised before the first stage starts."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from experiments import pipeline
from qwen3f import presets
from qwen3f.errors import TrainingError, UserError
from qwen3f.interop.config import to_hf
from qwen3f.interop.vision_config import to_hf as vl_to_hf
from qwen3f.pipeline import chain, commands, foresee, run
from tests.pipeline import toy


def described(preset="nano", names=None, directory=Path("P"), **changes):
    """The stages as the check gets them. `__` in a key stands for a dot."""
    config = toy.preset(preset)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    steps = chain.steps_of(config)
    questions = run._questions(config, ())
    names = [step.name for step in steps] if names is None else names
    return json.loads(json.dumps(foresee.described(steps, names, questions, directory)))


def weights(place, preset="nano", **changes):
    """A Hugging Face directory with only config.json, which is all that the check reads."""
    place.mkdir(parents=True)
    cfg = presets.get(preset).replace(max_position_embeddings=2048, **changes)
    (place / "config.json").write_text(json.dumps((vl_to_hf if cfg.vision_enabled else to_hf)(cfg, torch.float32)))
    return str(place)


@pytest.mark.parametrize("preset", pipeline.PRESETS)
def test_the_presets_pass(preset):
    foresee.check(described(preset))


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("grpo.rewards", "corect=1", r"grpo: --config.set.grpo.rewards names 'corect': write one of correct"),
        ("grpo_general.tasks", "reasning", r"grpo_general: --config.set.grpo_general.tasks=reasning: there is no such"),
        ("grpo.rollout.max_new_tokens", 5000, "grpo: --config.set.grpo.rollout.max_new_tokens=5000 leaves no room"),
        ("dpo.dpo.loss", "exo_pair", r"dpo: --config.set.dpo.dpo.label_smoothing=0.0 with .* above 0"),
        ("dpo.data.mixture", "right-or-rong", "dpo: Unknown source 'right-or-rong' in --config.set.dpo.data.mixture"),
        ("sft_fusion.data.mixture", "reasning", "sft_fusion: Unknown source 'reasning' in --config.set.sft_fusion"),
        ("sft_fusion.eval.task", "reasning", "sft_fusion: --config.set.sft_fusion.eval.task=reasning: there is no"),
        ("sft_fusion.eval.benchmarks", "mmluu", r"sft_fusion: --config.set.sft_fusion.eval.benchmarks: .*mean mmlu\?"),
        (
            "pretrain_s2.data.mixture",
            "embeded",
            r"pretrain_s2: Unknown --config.set.pretrain_s2.data.mixture 'embeded'",
        ),
        ("grpo.model.attention_dropout", 0.1, r"grpo: --config.set.grpo.model.attention_dropout .*set it to 0"),
        ("evaluation.benchmarks", "mmluu", r"evaluation: --config.set.evaluation.benchmarks: .* did you mean mmlu\?"),
        ("evaluation.benchmarks", "vqav2", "evaluation: .*vqav2"),  # the model has no vision tower
        (
            "evaluation.benchmarks",
            "gsm8k@/nowhere",
            "evaluation: --config.set.evaluation.bench.*: there is no /nowhere",
        ),
        ("evaluation.mesh", "tp2", "evaluation: --config.set.evaluation.mesh=tp2: questions are shared out by dp"),
        ("measure.mesh", "tp2", "measure: --config.set.measure.mesh=tp2: questions are shared out by dp"),
        ("sft_fusion.data.mixture", "chats@/nowhere=1,reasoning=1", "sft_fusion: --config.set.*: there is no /nowhere"),
        ("grpo.tasks", "gsm8k@/nowhere", "grpo: --config.set.grpo.tasks=gsm8k@/nowhere: there is no /nowhere"),
        (
            "pretrain_s2.data.tokenizer",
            "/nowhere",
            "pretrain_s2: --config.set.pretrain_s2.data.*: there is no /nowhere",
        ),
        ("measure.benchmarks", "reasonin", r"measure: --config.set.measure.benchmarks: .* did you mean reasoning\?"),
    ],
)
def test_what_a_stage_refuses_is_found_before_any_starts(flag, value, words):
    name = flag.partition(".")[0]
    names = None if name in ("measure", "evaluation") else [name]
    more = {"set__grpo__mesh": "tp2"} if "dropout" in flag else {}  # not supported on a mesh
    with pytest.raises(UserError, match=words):
        foresee.check(described(names=names, **more, **{f"set.{flag}".replace(".", "__"): value}))


def test_the_whole_pipelines_keys_keep_their_names():
    with pytest.raises(UserError, match="^--config.mesh=dp: 'dp' is not an axis"):
        described(mesh="dp")
    with pytest.raises(UserError, match=r"^grpo: .* tp=3; write in --config\.mesh tp2"):
        foresee.check(described(names=["grpo"], mesh="tp3"))
    with pytest.raises(UserError, match=r"^grpo: .* tp=3; write in --config\.set\.grpo\.mesh tp2"):
        foresee.check(described(names=["grpo"], set__grpo__mesh="tp3"))


def test_later_stages_have_the_first_ones_model():
    """The mesh of grpo fits the model that the settings of the first stage give, and does not fit the preset's."""
    heads = {"set__pretrain_s1__model__num_attention_heads": 4, "set__pretrain_s1__model__num_key_value_heads": 4}
    foresee.check(described(names=["grpo"], set__grpo__mesh="tp4", **heads))
    with pytest.raises(UserError, match="^grpo: .*tp"):
        foresee.check(described(names=["grpo"], set__grpo__mesh="tp4"))


def test_a_stage_with_weights_of_its_own_has_their_model(tmp_path):
    """Also a stage of reinforcement learning, which needs weights."""
    place = weights(tmp_path / "W", num_attention_heads=8, num_key_value_heads=8)
    foresee.check(described(set__grpo__init_from=place, set__grpo__mesh="tp8", set__grpo_general__mesh="tp8"))
    with pytest.raises(UserError, match="^grpo_general: .*tp"):
        foresee.check(described(set__grpo__init_from=place, set__grpo_general__mesh="tp16"))
    with pytest.raises(UserError, match="^grpo: --config.set.grpo.init_from=/nowhere"):
        foresee.check(described(set__grpo__init_from="/nowhere"))


def test_a_stage_whose_first_weights_are_gone_has_its_runs_model(tmp_path):
    (tmp_path / "05_grpo").mkdir()
    there = {"model": presets.get("nano").to_dict(), "optimizer": {}}
    (tmp_path / "05_grpo" / "config.json").write_text(json.dumps(there))
    foresee.check(described(names=["sft_fusion"], directory=tmp_path, set__grpo__init_from="/nowhere"))


def test_an_evaluation_asks_the_model_that_is_its_own(tmp_path):
    own = {"set__evaluation__benchmarks": "vqav2", "set__evaluation__data__kinds": ""}
    place = weights(tmp_path / "V", "nano_vl")
    foresee.check(described(names=["evaluation"], **own, set__evaluation__init_from=place))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"set__pictures__top_p": 3.0}, "--config.set.pictures.top_p must lie in"),
        ({"set__pictures__mesh": "dp2"}, "--config.set.pictures.mesh=dp2: generation has only tp"),
        ({"set__pictures__max_pixels": 1}, "--config.set.pictures.max_pixels=1 leave no size for an image"),
        ({"set__pictures__chat": False}, "--config.set.pictures.chat=True"),
        ({"skip": "multimodal"}, "its model has no vision tower: .* write --config.set.pictures.init_from=W"),
    ],
)
def test_questions_about_pictures_are_looked_at(changes, words):
    with pytest.raises(UserError, match=f"^pictures: .*{words}"):
        foresee.check(described("nano_vl", **changes))


def test_a_tokenizer_that_an_earlier_stage_will_write_is_not_missed():
    foresee.check(described(set__pretrain_s2__data__tokenizer="P/01_pretrain_s1/tokenizer"))


def test_weights_that_an_earlier_stage_will_write_are_not_missed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = {"set__dpo__dpo__reference": "P/06_sft_fusion"}
    foresee.check(described(**reference))
    for names in (["dpo"], ["grpo", "dpo"]):  # the stage that would write them does not run
        with pytest.raises(UserError, match="dpo: --config.set.dpo.dpo.reference=P/06_sft_fusion: there is no"):
            foresee.check(described(names=names, **reference))


def test_what_is_not_run_is_not_looked_at():
    wrong = {"set__grpo__rewards": "corect=1"}
    foresee.check(described(names=["dpo", "evaluation"], **wrong))
    foresee.check(described(skip="grpo", **wrong))


def test_a_pipeline_ends_with_it_in_one_line_and_has_made_nothing(tmp_path, monkeypatch):
    """Also if launch.py is started from another directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "LAUNCHER", toy.HERE / "fake_launch.py")
    with pytest.raises(UserError, match="grpo: --config.set.grpo.rewards names 'corect'"):
        toy.go(tmp_path / "P", set__grpo__rewards="corect=1")
    assert not list((tmp_path / "P").glob("0*"))
    assert not (tmp_path / "P" / "pipeline.json").exists()


def test_a_fault_of_its_own_ends_the_pipeline_too(tmp_path, monkeypatch):
    toy.fake(monkeypatch.setattr)
    monkeypatch.setattr(commands, "FORESEE", ("-c", "import sys; sys.exit('error: no torch')"))
    with pytest.raises(TrainingError, match="the stages could not be checked: no torch"):
        toy.go(tmp_path / "P")


def test_its_command_says_the_error_alone():
    command = commands.foreseeing(described(names=["dpo"], set__dpo__dpo__loss="exo_pair"))
    done = subprocess.run(command.words, capture_output=True, text=True, check=False, cwd=toy.ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: dpo: --config.set.dpo.dpo.label_smoothing")
    assert done.stderr.count("\n") == 1
