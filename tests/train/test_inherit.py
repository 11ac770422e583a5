"""A model that starts from weights takes their config. What preset, command line and stage 3 may change in it."""

import shutil

import pytest

from qwen3f import cli, params, presets
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.interop import hf, source
from qwen3f.train.inherit import inherit_model
from tests.interop.models import edit_config

THEIRS = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=320,
    intermediate_size=48, max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    place = tmp_path_factory.mktemp("weights") / "hf"
    hf.save_pretrained(place, THEIRS, params.init_params(THEIRS, 0))
    return place


@pytest.fixture
def directory(weights, tmp_path):
    return shutil.copytree(weights, tmp_path / "hf")


def inherited(experiment, directory, chosen=None):
    config = cli.load_experiment(f"experiments/{experiment}")
    config.update_from_flattened_dict({"init_from": str(directory), **(chosen or {})})
    made = inherit_model(config, directory / "no workdir", (chosen or {}).keys())
    return ModelConfig.from_dict(made.model.to_dict())


@pytest.mark.parametrize("experiment", ["pretrain_s1.py", "pretrain_s2.py:qwen3-0.6b", "sft_cold_start.py:debug_moe"])
def test_the_preset_says_how_the_model_is_trained_and_nothing_else(experiment, directory):
    for changes in ({}, {"rope_theta": 5e6, "rope_scaling": YARN}):
        edit_config(directory, rope_parameters=None, **changes)
        there = source.read_model_config(str(directory))
        assert there.rope_theta == changes.get("rope_theta", 1e6)
        ours = ModelConfig.from_dict(cli.load_experiment(f"experiments/{experiment}").model.to_dict())
        trained = {name: getattr(ours, name) for name in ("gradient_checkpointing", "router_aux_loss_coef")}
        spread = {name: getattr(ours, name) for name in ("initializer_range", "embed_initializer_range")}
        assert inherited(experiment, directory) == there.replace(**trained, **spread)


def test_the_command_line_may_change_what_the_weights_fit(directory):
    chosen = {"model.rope_theta": 2e4, "model.rms_norm_eps": 1e-6, "model.max_position_embeddings": 8192}
    made = inherited("pretrain_s2.py:small", directory, chosen)
    assert (made.rope_theta, made.rms_norm_eps, made.max_position_embeddings) == (2e4, 1e-6, 8192)
    assert made.hidden_size == 32
    source.check_same_model(str(directory), made)
    made = inherited("pretrain_s2.py:small", directory, {"model.rope_scaling": YARN})
    assert made.rope_scaling.factor == 4.0
    with pytest.raises(UserError, match="hidden_size is 32 there and 64 here"):
        source.check_same_model(str(directory), inherited("pretrain_s2.py:small", directory, {"model.hidden_size": 64}))


@pytest.mark.parametrize("theta, wanted", [(1e4, 1e6), (1e6, 1e6), (5e6, 5e6)])
@pytest.mark.parametrize("positions, room", [(4096, 32768), (262144, 262144)])
def test_stage_3_raises_base_and_context_and_lowers_neither(directory, theta, wanted, positions, room):
    edit_config(directory, rope_theta=theta, max_position_embeddings=positions, rope_parameters=None)
    made = inherited("pretrain_s3.py:small", directory)
    assert (made.rope_theta, made.max_position_embeddings, made.rope_scaling) == (wanted, room, None)
    assert inherited("pretrain_s3.py:small,yarn", directory).rope_scaling.factor == 8.0
    assert inherited("pretrain_s3.py:small", directory, {"model.rope_theta": 3e4}).rope_theta == 3e4
    edit_config(directory, rope_scaling=YARN)
    assert inherited("pretrain_s3.py:small", directory).rope_scaling.factor == 4.0


def test_without_weights_the_preset_stays(tmp_path):
    config = cli.load_experiment("experiments/pretrain_s3.py:nano")
    assert inherit_model(config, tmp_path, ()) is config


def test_a_text_model_gets_the_preset_s_tower_with_all_that_belongs_to_it(directory):
    """It also gets the rotary sections, which have to fit the head's width, and the ids of picture tokens."""
    theirs = THEIRS.replace(head_dim=64)
    hf.save_pretrained(directory / "wide", theirs, params.init_params(theirs, 0))
    found, wanted = inherited("multimodal.py:nano_vl", directory / "wide"), presets.get("nano_vl")
    assert (found.hidden_size, found.rope_theta) == (theirs.hidden_size, theirs.rope_theta)
    for name in source.OF_VISION - {
        "mrope_section",
        "vision_patch_size",
        "vision_image_size",
        "vision_deepstack_layers",
    }:
        assert getattr(found, name) == getattr(wanted, name)
    assert (found.mrope_section, found.vision_patch_size) == ((12, 10, 10), 16)
    changed = inherited("multimodal.py:nano_vl", directory / "wide", {"model.mrope_section": (16, 8, 8)})
    assert changed.mrope_section == (16, 8, 8)


def test_from_a_workdir_through_all_three_stages(make, tmp_path, capsys):
    """Each stage takes what the one before has, prints what it changes, and resumes also when its source is gone."""
    config = make(steps=1)
    config.model.update(rope_theta=3e4, max_position_embeddings=64)
    cli.run_stage(config, tmp_path / "w1", False)
    assert "rotary base 30,000 over 64 positions" in capsys.readouterr().out
    for stage, base, room in ((2, 3e4, 64), (3, 1e6, 2048)):
        config = cli.load_experiment(f"experiments/pretrain_s{stage}.py:nano")
        config.update_from_flattened_dict(
            {
                "device": "cpu", "seq_len": 32, "batch_size": 2, "steps": 1, "eval.every": 0, "sample.tokens": 0,
                "data.length_mix": "", "data.mixture": make().data.mixture, "data.cache": make().data.cache,
                "init_from": str(tmp_path / f"w{stage - 1}"),
            }
        )  # fmt: skip
        for again in (False, True):
            cli.run_stage(config, tmp_path / f"w{stage}", False)
            out = capsys.readouterr().out
            there = source.read_model_config(str(tmp_path / f"w{stage}"))
            assert (there.rope_theta, there.max_position_embeddings, there.hidden_size) == (base, room, 32)
            assert ("rope_theta: 30000.0 -> 1000000.0" in out) == (stage == 3 and not again)
            assert ("max_position_embeddings: 64 -> 2048" in out) == (stage == 3 and not again)
            if not again:
                shutil.move(tmp_path / f"w{stage - 1}", tmp_path / "gone")
        shutil.move(tmp_path / "gone", tmp_path / f"w{stage - 1}")


def test_a_plan_is_of_the_model_that_will_train(directory, tmp_path, capsys):
    config = cli.load_experiment("experiments/pretrain_s2.py:qwen3-0.6b")
    config.update(init_from=str(directory), plan=True, hardware="h100")
    cli.run_stage(config, tmp_path / "w", False)
    assert f"{THEIRS.total_params_estimate():,} parameters" in capsys.readouterr().out


def test_a_source_that_is_not_there(tmp_path):
    config = cli.load_experiment("experiments/pretrain_s2.py:nano")
    config.init_from = str(tmp_path / "absent")
    with pytest.raises(UserError, match="config.init_from=.*absent: there is no"):
        cli.run_stage(config, tmp_path / "w", False)
    assert not (tmp_path / "w").exists()
