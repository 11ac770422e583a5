"""Damage to a checkpoint is named, when it is inspected and when a run restores it."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from qwen3f import cli
from qwen3f.checkpoint import inspect, manifest
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.errors import UserError


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
        inspect.run(ConfigDict({"path": str(saved), "verify": True, "backend": "orbax"}), saved)


def test_every_single_file_counts(saved):
    place = saved / "checkpoints" / "7"
    for path in [p for p in place.rglob("*") if p.is_file() and p.stat().st_size]:
        before = path.read_bytes()
        flip(path)
        with pytest.raises(DamagedCheckpoint):
            manifest.verify(place)
        path.write_bytes(before)
    manifest.verify(place)


def test_every_bit_of_the_record_counts(saved):
    """In each way of reading it: one flipped bit would give another model, or another place in the data."""
    path = saved / "checkpoints" / "7" / "meta" / "metadata"
    content = path.read_bytes()
    like = {"params": {"w": torch.empty(5000), "b": torch.empty(3).bfloat16()}, "step": torch.tensor(0)}
    with Checkpointer(saved / "checkpoints", 0, 0) as checkpoints:
        for at in range(8 * len(content)):
            harmed = bytearray(content)
            harmed[at // 8] ^= 1 << at % 8
            path.write_bytes(harmed)
            with pytest.raises(DamagedCheckpoint, match="the checksum of meta/metadata"):
                checkpoints.read_meta(7)
        for use in (lambda: checkpoints.restore_part("params", like["params"]), lambda: checkpoints.restore(like)):
            with pytest.raises(DamagedCheckpoint, match="the checksum of meta/metadata"):
                use()
        path.write_bytes(content)
        assert checkpoints.read_meta(7) == checkpoints.restore(like)[1]


@pytest.mark.parametrize("backend", ["orbax", "dcp"])
def test_names_and_shapes_are_checked_before_they_are_read(backend, saved):
    state = {"params": {"w": torch.arange(5000.0)}}
    with Checkpointer(saved / "more", 0, 0, backend=backend) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        shape = next((saved / "more" / "1").rglob({"orbax": ".zarray", "dcp": ".metadata"}[backend]))
        flip(shape)
        for use in (lambda: checkpoints.read_tree(1), lambda: checkpoints.restore_part("params", state["params"])):
            with pytest.raises(DamagedCheckpoint, match=rf"the checksum of state/.*\{shape.name} is not"):
                use()
        flip(shape)
        flip(payload(saved / "more" / "1"))
        assert checkpoints.read_tree(1)["params", "w"].shape == (5000,)  # the values were not looked at


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}'])
def test_a_broken_manifest_is_damage(saved, content):
    place = saved / "checkpoints" / "7"
    (place / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpoint):
        manifest.verify(place)


@pytest.mark.parametrize("key", ["shape", "chunks", "dtype"])
@pytest.mark.parametrize("value", [None, 3, "x", [], [1e999], [None], [[]], {}, ["9" * 5000]])
def test_an_array_that_is_described_wrongly_is_damage(saved, key, value):
    """Also if the manifest fits, because the same person has written it."""
    place = saved / "checkpoints" / "7"
    path = next(place.rglob("params.w/.zarray"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (place / "manifest.json").unlink()
    manifest.write(place, {})
    like = {"w": torch.empty(5000), "b": torch.empty(3, dtype=torch.bfloat16)}
    with Checkpointer(saved / "checkpoints", 0, 0) as checkpoints, pytest.raises(UserError, match="checkpoints.7"):
        checkpoints.restore_part("params", like, 7)


@pytest.mark.parametrize("name", ["../../secret", "{root}/secret", "state/../../../secret"])
def test_names_in_a_manifest_lead_nowhere(saved, name):
    place, name = saved / "checkpoints" / "7", name.format(root=saved)
    values = json.loads((place / "manifest.json").read_text())
    (saved / "secret").write_text("x")
    values["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (place / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DamagedCheckpoint, match="secret in its manifest.json leads out of the checkpoint"):
        manifest.verify(place)


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_symbolic_link_is_not_followed(saved, what):
    """Even if it leads to exactly the content that the manifest describes."""
    place = saved / "checkpoints" / "7"
    inside = payload(place) if what == "file" else place / "state"
    inside.rename(saved / "elsewhere")
    inside.symlink_to(saved / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match=f"{inside.name} is not a regular file or directory"):
        manifest.verify(place)


def test_a_checkpoint_without_a_manifest_is_damaged(saved):
    """A directory has a step as its name only after its manifest is written, so a missing one is damage."""
    (saved / "checkpoints" / "7" / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json cannot be read \(there is no file"):
        manifest.verify(saved / "checkpoints" / "7")


def test_sizes_are_compared_before_anything_is_read(saved, monkeypatch):
    place = saved / "checkpoints" / "7"
    truncate(payload(place))
    monkeypatch.setattr(manifest, "_sha256", lambda path: 1 / 0)
    with pytest.raises(DamagedCheckpoint, match="bytes instead of"):
        manifest.verify(place)


@pytest.mark.parametrize("metrics", [3, {"loss": "low"}, {"loss": None}])
def test_metrics_that_are_no_numbers_are_damage(saved, metrics):
    place = saved / "checkpoints" / "7"
    values = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(values | {"metrics": metrics}))
    with pytest.raises(DamagedCheckpoint, match="not names and numbers"):
        manifest.metrics(place)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"path": "/none"}, "config.path=/none: there is no /none/checkpoints; give a workdir or its checkpoints/N$"),
        ({"path": "~no-such-user/W"}, "config.path: there is no home directory for ~no-such-user"),
        ({"path": "/none", "backend": "zarr"}, "config.backend='zarr' is unknown; use one of orbax, dcp"),
    ],
)
def test_inspect_names_its_own_keys(changes, words):
    config = cli.load_experiment("experiments/inspect.py")
    config.update(changes)
    with pytest.raises(UserError, match=words):
        cli.run_stage(config, Path("unused"), False)


def test_inspect_refuses_a_hugging_face_directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match=r"is a Hugging Face directory; give a workdir or its checkpoints/N$"):
        inspect.report(str(tmp_path), verify=True)


def test_inspect_says_what_is_there(saved, capsys):
    config = ConfigDict({"path": str(saved / "checkpoints" / "7"), "verify": True, "backend": "orbax"})
    lines = inspect.run(config, saved)
    assert capsys.readouterr().out == "\n".join(lines) + "\n"
    text = "\n".join(lines)
    for words in ("params.w  [5000] float32", "params.b  [3] bfloat16", "params: 2 leaves, 20,006 bytes", "seed 3",
                  "checkpoints of steps [7]; this is 7", "every checksum as written"):  # fmt: skip
        assert words in text
    unread = inspect.run(ConfigDict({"path": str(saved), "verify": False, "backend": "orbax"}), saved)
    assert unread[:-1] == lines[:-1]
    assert "not checked" in unread[-1]


def test_inspect_names_the_flag_of_a_step_that_is_not_there(saved):
    path = str(saved / "checkpoints" / "9")
    with pytest.raises(UserError, match=rf"^config\.path={path}: .* holds no checkpoint of step 9: there are 7"):
        inspect.run(ConfigDict({"path": path, "verify": True, "backend": "orbax"}), saved)


@pytest.mark.parametrize("path, words", [("", "config.path is missing"), ("nowhere", "no nowhere/checkpoints")])
def test_inspect_names_what_is_missing(path, words, tmp_path):
    with pytest.raises(UserError, match=words):
        inspect.run(ConfigDict({"path": path, "verify": True, "backend": "orbax"}), tmp_path)
