"""The configurations of the runs that made a model tell whether it ever saw chats."""

import pytest
import torch

from experiments import generate
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.infer.run import run
from qwen3f.interop.history import never_saw_chats
from qwen3f.train import loop


def checkpoint(place, stage, init_from=""):
    with Checkpointer(place / "checkpoints", every=1, keep=0) as checkpoints:
        checkpoints.save(1, {"w": torch.ones(1)}, {"config": {"stage": stage, "init_from": str(init_from)}})
    return place


@pytest.fixture
def runs(tmp_path):
    s1 = checkpoint(tmp_path / "s1", "pretrain")
    s2 = checkpoint(tmp_path / "s2", "pretrain", s1)
    sft = checkpoint(tmp_path / "sft", "sft", s2)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text('{"model_type": "qwen3"}')
    return {
        "s1": s1,
        "s2": s2,
        "step": s2 / "checkpoints" / "1",
        "sft": sft,
        "after": checkpoint(tmp_path / "after", "pretrain", sft),
        "hf": hf,
        "of_hf": checkpoint(tmp_path / "of_hf", "pretrain", hf),
        "gone": checkpoint(tmp_path / "gone", "pretrain", tmp_path / "nowhere"),
        "own": checkpoint(tmp_path / "own", "my.stage"),
        "circle": checkpoint(tmp_path / "circle", "pretrain", tmp_path / "circle"),
    }


@pytest.mark.parametrize("name", ["s1", "s2", "step"])
def test_pretraining_alone(runs, name):
    assert never_saw_chats(str(runs[name]))


@pytest.mark.parametrize("name", ["sft", "after", "hf", "of_hf", "gone", "own", "circle"])
def test_chats_or_nobody_knows(runs, name):
    assert not never_saw_chats(str(runs[name]))


def test_a_chat_with_a_model_that_never_saw_one_says_so(make, tmp_path, capsys):
    loop.run(make(steps=1), tmp_path / "w", progress=False)
    config = generate.get_config()
    config.update(init_from=str(tmp_path / "w"), prompt="a cat", max_new_tokens=2, device="cpu")
    run(config, tmp_path / "unused")
    said = capsys.readouterr().err
    assert "never saw a chat" in said
    assert "--config.chat=False" in said
    config.chat = False
    run(config, tmp_path / "unused")
    assert "chat" not in capsys.readouterr().err
