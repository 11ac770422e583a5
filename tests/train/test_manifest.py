"""Damage to a checkpoint is named, at rest and on the way back into training."""

import json

import pytest
import torch
from ml_collections import ConfigDict

from qwen3f.errors import UserError
from qwen3f.train import inspect, manifest
from qwen3f.train.checkpoint import Checkpointer
from qwen3f.train.manifest import DamagedCheckpoint


@pytest.fixture
def saved(tmp_path):
    state = {"params": {"w": torch.arange(5000.0), "b": torch.ones(3, dtype=torch.bfloat16)}, "step": torch.tensor(7)}
    with Checkpointer(tmp_path / "checkpoints", 0, 0) as checkpoints:
        checkpoints.save(7, state, {"config": {"stage": "pretrain", "seed": 3}})
    return tmp_path


def payload(directory):
    """The largest file: the leaves' values."""
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "flip": (flip, "the checksum of .* is not the one"),
    "truncate": (truncate, "bytes instead of"),
    "remove": (lambda path: path.unlink(), "is missing"),
    "add": (lambda path: path.with_name("more").write_text("x"), r"more is not in its manifest\.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage_is_named(saved, kind):
    place = saved / "checkpoints" / "7"
    assert manifest.verify(place) >= 3
    harm, words = DAMAGE[kind]
    harm(payload(place))
    with pytest.raises(DamagedCheckpoint, match=words):
        manifest.verify(place)
    with Checkpointer(saved / "checkpoints", 0, 0) as checkpoints, pytest.raises(DamagedCheckpoint, match=words):
        checkpoints.restore(
            {"params": {"w": torch.empty(5000), "b": torch.empty(3).bfloat16()}, "step": torch.tensor(0)}
        )
    with pytest.raises(UserError, match=words):
        inspect.run(ConfigDict({"path": str(saved), "verify": True}), saved)


def test_every_single_file_counts(saved):
    place = saved / "checkpoints" / "7"
    for path in [p for p in place.rglob("*") if p.is_file() and p.stat().st_size]:
        before = path.read_bytes()
        flip(path)
        with pytest.raises(DamagedCheckpoint):
            manifest.verify(place)
        path.write_bytes(before)
    manifest.verify(place)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}'])
def test_a_broken_manifest_is_damage(saved, content):
    place = saved / "checkpoints" / "7"
    (place / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpoint):
        manifest.verify(place)


def test_names_in_a_manifest_lead_nowhere(saved):
    """A name that points out of the directory is reported as missing; what it points at is not read."""
    place = saved / "checkpoints" / "7"
    values = json.loads((place / "manifest.json").read_text())
    values["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    (saved / "secret").write_text("x")
    (place / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DamagedCheckpoint, match="secret is missing"):
        manifest.verify(place)


def test_without_a_manifest_restore_warns(saved, caplog):
    (saved / "checkpoints" / "7" / "manifest.json").unlink()
    assert manifest.verify(saved / "checkpoints" / "7") is None
    assert "can't be checked" in caplog.text


def test_inspect_says_what_is_there(saved, capsys):
    lines = inspect.run(ConfigDict({"path": str(saved / "checkpoints" / "7"), "verify": True}), saved)
    assert capsys.readouterr().out == "\n".join(lines) + "\n"
    text = "\n".join(lines)
    for words in ("params.w  [5000] float32", "params.b  [3] bfloat16", "params: 2 leaves, 20,006 bytes", "seed 3",
                  "checkpoints of steps [7]; this is 7", "every checksum as written"):  # fmt: skip
        assert words in text
    unread = inspect.run(ConfigDict({"path": str(saved), "verify": False}), saved)
    assert unread[:-1] == lines[:-1]
    assert "not checked" in unread[-1]


@pytest.mark.parametrize("path, words", [("", "config.path is missing"), ("nowhere", "no nowhere/checkpoints")])
def test_inspect_names_what_is_missing(path, words, tmp_path):
    with pytest.raises(UserError, match=words):
        inspect.run(ConfigDict({"path": path, "verify": True}), tmp_path)
