"""Whole runs in a directory: resuming is exact, and what cannot run says why and destroys nothing."""

import json
import re

import pytest
import torch
from torch.torch_version import TorchVersion

from qwen3f import tree
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.errors import TrainingError, UserError
from qwen3f.train.hyper import Muon
from qwen3f.train.loop import run
from qwen3f.train.restore import starting_state
from qwen3f.train.setup import make_setup
from qwen3f.train.state import init_state
from qwen3f.train.step import make_train_step
from tests.train.runs import assert_same_bits, final_state, metrics, pretrain_model

EXPERTS = {"model.num_experts": 4, "model.num_experts_per_tok": 2, "model.moe_intermediate_size": 16}


def test_resuming_is_bitwise_exact(make, tmp_path):
    """20 steps equal a run that is killed after step 13 and resumes from 10. So does the whole run with resume=10."""
    config = make(**{"model.attention_dropout": 0.1})
    run(config, tmp_path / "whole", progress=False)
    straight = final_state(config, tmp_path / "whole", 20)

    class Killed(Exception):
        pass

    calls = []

    def dies_after_13(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            calls.append(1)
            if len(calls) > 13:
                raise Killed
            return step(state, batch)

        return wrapped

    with pytest.raises(Killed):
        run(config, tmp_path / "cut", progress=False, make_step=dies_after_13)
    assert [m["step"] for m in metrics(tmp_path / "cut")] == [1, 5, 10]
    run(config, tmp_path / "cut", progress=False)
    assert_same_bits(final_state(config, tmp_path / "cut", 20), straight)

    def learned(workdir):
        return [(m["step"], m["loss"], m["grad_norm"], m.get("val_loss")) for m in metrics(workdir)]

    whole = learned(tmp_path / "whole")
    assert [m for m in learned(tmp_path / "cut") if m[0] != 11] == whole  # 11: the first step after the restart
    assert int(straight.position) == 80

    again = make(**{"model.attention_dropout": 0.1, "resume": 10})
    run(again, tmp_path / "whole", progress=False)
    assert_same_bits(final_state(config, tmp_path / "whole", 20), straight)
    assert (tmp_path / "whole" / "checkpoints.aside1" / "20").is_dir()


def test_a_state_that_is_restored_is_the_only_one_in_memory(make, tmp_path, monkeypatch):
    setup, held, restore = make_setup(make()), [], Checkpointer.restore

    def noting(checkpoints, like, *rest):
        held.append(sum(leaf.nbytes for leaf in tree.leaves(like) if not leaf.is_meta))
        return restore(checkpoints, like, *rest)

    monkeypatch.setattr(Checkpointer, "restore", noting)
    state = init_state(setup.model, 3, setup.optimizer)
    with Checkpointer(tmp_path, 0, 0) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        assert_same_bits(starting_state(setup, checkpoints).state, state)
    assert held == [0]


def test_learns_and_validates(make, tmp_path):
    out = run(make(steps=60), tmp_path, progress=False)
    log = metrics(tmp_path)
    assert log[0]["loss"] == pytest.approx(5.90, abs=0.2)  # ln 320 + D·σ²/2, the spread of random logits
    assert log[-1]["loss"] < 3.5
    assert out["val_loss"] == log[-1]["val_loss"] < 3.5
    assert (tmp_path / "checkpoints" / "60").is_dir()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    "metric, words",
    [
        ("val_los", r"write one of val_loss, .*val_\w+, or --config"),
        ("los", r"write one of loss, .*, or what val_… gives, or --config"),
        ("val_loss", None),
    ],
)
def test_a_best_metric_that_is_not_measured_is_said_once(make, tmp_path, capsys, metric, words):
    best = {"checkpoint.keep": 1, "checkpoint.keep_best": 2, "checkpoint.best_metric": metric, "sample.tokens": 0}
    run(make(steps=4, **{"eval.every": 2, "checkpoint.every": 1}, **best), tmp_path, progress=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no checkpoint is kept")]
    assert len(lines) == (words is not None)
    if words:
        assert re.search(f"the run does not measure config.checkpoint.best_metric={metric}; {words}", lines[0])


def test_second_stage_starts_from_the_first(make, tmp_path):
    run(make(), tmp_path / "one", progress=False)
    run(make(steps=1, init_from=str(tmp_path / "one")), tmp_path / "two", progress=False)
    first = metrics(tmp_path / "two")[0]["loss"]
    assert first < 4.5  # a fresh model starts at 5.9
    run(make(steps=1, init_from=str(tmp_path / "one" / "checkpoints" / "10")), tmp_path / "three", progress=False)
    assert metrics(tmp_path / "three")[0]["loss"] != first
    with pytest.raises(UserError, match="there is no"):
        run(make(init_from=str(tmp_path / "nowhere")), tmp_path / "four", progress=False)
    assert not (tmp_path / "four").exists()


def test_another_models_workdir_is_refused_and_kept(make, tmp_path):
    run(make(steps=2), tmp_path, progress=False)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"belongs to another model: its model\.hidden_size is 32, this run's is 64"):
        run(make(**{"model.hidden_size": 64}), tmp_path, progress=False)
    (tmp_path / "config.json").rename(tmp_path / "gone")  # the checkpoint itself says so too
    with pytest.raises(UserError, match="another model"):
        run(make(**{"model.hidden_size": 64}), tmp_path, progress=False)
    (tmp_path / "gone").rename(tmp_path / "config.json")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_changed_config_is_reported_and_the_old_one_kept(make, tmp_path, capsys):
    run(make(steps=2), tmp_path, progress=False)
    run(make(steps=3), tmp_path, progress=False)
    assert "config changed: steps: 2 -> 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.until-step-2.json").read_text())["steps"] == 2
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(make, tmp_path):
    run(make(), tmp_path, progress=False)

    def poisoned(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            if int(state.step) == 23:
                batch = batch | {"loss_weights": batch["loss_weights"] * float("inf")}
            return step(state, batch)

        return wrapped

    with pytest.raises(TrainingError, match=r"step 24 is not finite: loss nan.* examples 92 to 95"):
        run(make(steps=30, **{"checkpoint.every": 1}), tmp_path, progress=False, make_step=poisoned)
    with Checkpointer(tmp_path / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == [22, 23]
    run(make(steps=30), tmp_path, progress=False)  # and goes on from there


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": 6, "microbatches": 4}, "cannot be cut"),
        ({"seq_len": 4096}, "exceeds config.model.max_position_embeddings"),
        ({"steps": 0}, "config.steps must be at least 1"),
        ({"nonfinite_skips": -1}, "config.nonfinite_skips must be at least 0"),
        ({"context_warmup.length": 8, "data.cross_documents": True}, "config.context_warmup.length has no effect"),
        ({"context_warmup.length": 8, "context_warmup.steps": -1}, "config.context_warmup.steps must be at least 0"),
        ({"optimizer.kind": "sgd"}, "optimizer.kind='sgd'"),
        ({"mesh": "dp2"}, "2 devices"),
        ({"attention": "invariant", "mesh": "cp2"}, "config.attention=invariant takes a model without experts"),
        ({"attention": "invariant", **EXPERTS}, "config.attention=invariant takes a model without experts"),
        ({"checkpoint.on_failure": "ignore"}, "config.checkpoint.on_failure"),
        ({"device": "gpu"}, "config.device='gpu'"),
        ({"dtype": "fp8"}, "config.dtype"),
        ({"compile": "all"}, "config.compile='all'"),
        ({"wandb": "on"}, "config.wandb"),
        ({"schedule.warmup": 30}, "take more than config.steps=20"),
        ({"data.tokenizer": "/no/such.model"}, "/no/such.model"),
        ({"data.mixture": "fineweb"}, "fineweb"),
        ({"model.vocab_size": 100_000}, "ocabulary"),
        ({"resume": 5}, "holds no checkpoint"),
    ],
)
def test_wrong_configurations_are_named_and_leave_nothing(make, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run(make(**changes), tmp_path / "w", progress=False)
    assert not (tmp_path / "w").exists() or not any((tmp_path / "w").iterdir())


@pytest.mark.parametrize("changes", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}])
@pytest.mark.parametrize("version", ["2.11.0", "2.13.0"])
def test_recomputation_that_torch_cannot_put_into_one_graph(make, changes, version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    config = make(compile="step")
    config.model.update(changes)
    for policy, fails in (("full", True), ("selective", bool(changes))):
        config.model.gradient_checkpointing = policy
        if fails and version == "2.13.0":
            with pytest.raises(UserError, match=r"config\.compile=step with .*write --config\.compile=block"):
                make_setup(config)
        else:
            make_setup(config)
    config.compile = "block"
    make_setup(config)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"attention": "invariant", "model.attention_dropout": 0.1}, r"write --config\.model\.attention_dropout=0, or"),
        ({"attention": "flash", "model.head_dim": 8}, r"model\.head_dim is 8; write --config\.attention=auto"),
        ({"attention": "flash", "model.head_dim": 20}, r"config\.model\.head_dim is 20"),
        ({"mesh": "cp2", "model.head_dim": 8}, r"cp2 in config\.mesh needs .*model\.head_dim is 8; leave cp out"),
        (
            {
                "attention": "flash",
                "model.vision_enabled": True,
                "model.vision_deepstack_layers": (),
                "model.mrope_section": (4, 2, 2),
                "model.vision_num_attention_heads": 256,
                "model.image_token_id": 1,
                "model.video_token_id": 2,
                "model.vision_start_token_id": 3,
                "model.vision_end_token_id": 4,
            },
            "vision_num_attention_heads is 4",
        ),
    ],
)
def test_attention_that_the_model_cannot_have_is_refused(make, changes, words):
    config = make()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        make_setup(config)


def test_a_tokenizer_of_another_size_is_refused(make, tmp_path):
    run(make(steps=1), tmp_path / "one", progress=False)
    tokenizer = str(tmp_path / "one" / "tokenizer")
    with pytest.raises(UserError, match=r"has 320 tokens and the model 400; write --config\.model\.vocab_size=320"):
        run(make(**{"model.vocab_size": 400, "data.tokenizer": tokenizer}), tmp_path / "two", progress=False)


def test_muon_after_a_short_context_resumes_exactly(make, tmp_path):
    """The short context lasts 6 of 8 steps, so the run resumes from step 4 within it."""
    changes = {"steps": 8, "optimizer.kind": "muon", "context_warmup.length": 8, "context_warmup.steps": 6}
    config = make(**changes, **{"checkpoint.every": 4, "log_every": 1, "eval.every": 0})

    def trained():
        run(config, tmp_path / "w", progress=False)
        with Checkpointer(tmp_path / "w" / "checkpoints", 0, 0) as checkpoints:
            like = init_state(pretrain_model(config), 0, Muon())
            return checkpoints.restore(like, 8)[0]

    straight = trained()
    config.resume = 4
    assert_same_bits(straight, trained())

    config.context_warmup.length = 0
    config.resume = None
    run(config, tmp_path / "plain", progress=False)
    short, plain = (next(line["loss"] for line in metrics(tmp_path / w)) for w in ("w", "plain"))
    assert short != plain


def test_another_optimizers_workdir_is_refused(make, tmp_path):
    run(make(steps=1), tmp_path / "w", progress=False)
    with pytest.raises(UserError, match=r"optimizer\.kind"):
        run(make(steps=2, **{"optimizer.kind": "muon"}), tmp_path / "w", progress=False)
