"""Checkpoints: exact, whole, never lost, readable from plain JAX; and what goes wrong says so."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree

from qwen3f.checkpoint import manifest
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.checkpoint.retention import Retention
from qwen3f.errors import UserError


class Moments(NamedTuple):
    mu: dict
    nu: dict


class State(NamedTuple):
    step: torch.Tensor
    params: dict
    optimizer: tuple
    seed: torch.Tensor
    extra: object


def make_state(seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, 5, generator=g)
    weight[0, 0, 0], weight[0, 0, 1], weight[0, 0, 2] = float("nan"), float("-inf"), -0.0
    params = {
        "model.layers.self_attn.q_proj.weight": weight,
        "model.norm.weight": torch.randn(7, generator=g).bfloat16(),
    }
    return State(
        step=torch.tensor(2**53 + 1 + seed),
        params=params,
        optimizer=(
            Moments(
                {k: torch.randn(v.shape, generator=g).t_() if v.ndim == 2 else v * 2 for k, v in params.items()}, {}
            ),
            torch.rand(2, 6, generator=g, dtype=torch.float64).T,  # not contiguous
        ),
        seed=torch.tensor([-1, 2**62]),
        extra=[torch.tensor(True), None, torch.zeros(0, 3), torch.tensor(1e-300, dtype=torch.float64)],
    )


def assert_same(a, b):
    (la, ta), (lb, tb) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert ta == tb
    for x, y in zip(la, lb):
        if x is None or y is None:
            assert x is y
            continue
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        assert x.contiguous().view(-1).view(torch.uint8).equal(y.contiguous().view(-1).view(torch.uint8))


def test_roundtrip_is_bitwise_and_keeps_structure(tmp_path):
    state, meta = make_state(), {"model": {"hidden_size": 64}, "tokens": 2**60, "name": "é"}
    with Checkpointer(tmp_path / "c", every=1, keep=0) as c:
        c.save(3, state, meta)
    like = pytree.tree_map(lambda t: None if t is None else torch.zeros_like(t), state)
    fresh = Checkpointer(tmp_path / "c", every=1, keep=0)
    restored, restored_meta = fresh.restore(like)
    assert_same(restored, state)
    assert restored_meta == meta == fresh.read_meta(3)
    assert isinstance(restored, State)
    assert isinstance(restored.optimizer[0], Moments)
    assert all(t is None or not t.any() for t in pytree.tree_leaves(like))
    restored.params["model.norm.weight"].zero_()  # the caller owns it
    on_meta = pytree.tree_map(lambda t: None if t is None else t.to("meta"), state)
    assert_same(fresh.restore(on_meta, step=3)[0], state)


def test_one_field_alone(tmp_path):
    """restore_part needs no other field of the state. Within its own field it checks everything."""
    state = make_state()
    with Checkpointer(tmp_path, every=1, keep=0) as c:
        c.save(3, state, {"run": 1})
        like = {path: leaf.to("meta") for path, leaf in state.params.items()}
        params, meta = c.restore_part("params", like)
        assert_same(params, state.params)
        assert meta == {"run": 1}
        with pytest.raises(UserError, match="params.more is absent on disk"):
            c.restore_part("params", {**like, "more": torch.zeros(2)})
        like.pop("model.norm.weight")
        with pytest.raises(UserError, match="params.model.norm.weight .* absent in this run"):
            c.restore_part("params", like)


def test_one_field_alone_reads_and_checks_only_its_own_files(tmp_path, monkeypatch):
    """Damage in the optimizer's values does not keep anyone from the weights; damage in the weights does."""
    state = make_state()
    with Checkpointer(tmp_path, every=1, keep=0) as c:
        c.save(3, state, {})
    for path in (tmp_path / "3" / "state").glob("optimizer.*/0*"):
        path.write_bytes(bytes(path.stat().st_size))
    read = []
    monkeypatch.setattr(manifest, "_sha256", lambda path, real=manifest._sha256: (read.append(path), real(path))[1])
    like = {path: leaf.to("meta") for path, leaf in state.params.items()}
    assert_same(c.restore_part("params", like)[0], state.params)
    values = [path.parent.name for path in read if path.name[0].isdigit()]
    assert set(values) == {f"params.{name}" for name in state.params}
    with pytest.raises(DamagedCheckpoint, match="the checksum of state/optimizer"):
        c.restore(state)
    path = tmp_path / "3" / "state" / "params.model.norm.weight" / "0"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedCheckpoint, match="the checksum of state/params.model.norm.weight/0"):
        c.restore_part("params", like)


@pytest.mark.parametrize("part", [False, True])
def test_dtypes_are_converted_on_request_alone(tmp_path, part):
    """cast=True converts as Tensor.to does. Shapes, and dtypes that are not floating-point, must still agree."""
    g = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(5, 3, generator=g), "b": torch.randn(4, generator=g).bfloat16(), "n": torch.tensor(3)}
    with Checkpointer(tmp_path, every=1, keep=0) as c:
        c.save(1, {"params": params}, {})

        def restored(cast, **dtypes):
            like = {name: leaf.to(dtypes.get(name, leaf.dtype)) for name, leaf in params.items()}
            if part:
                return c.restore_part("params", like, cast=cast)[0]
            return c.restore({"params": like}, cast=cast)[0]["params"]

        with pytest.raises(UserError, match=r"a is \[5, 3\] float32 on disk .* write --config\.checkpoint\.cast=True"):
            restored(False, a=torch.float64)
        got = restored(True, a=torch.bfloat16, b=torch.float64)
        assert_same(got, {"a": params["a"].bfloat16(), "b": params["b"].double(), "n": params["n"]})
        with pytest.raises(UserError, match=r"n is \[\] int64 on disk and \[\] float32 in this run\. Choose"):
            restored(True, n=torch.float32)


def test_plain_orbax_reads_it(tmp_path):
    import jax
    import orbax.checkpoint as ocp

    state = make_state()
    with Checkpointer(tmp_path, every=1, keep=0) as c:
        c.save(3, state, {"a": [1]})
        c.save(11, state, {"a": [2]})
    with ocp.CheckpointManager(tmp_path) as manager:
        assert list(manager.all_steps()) == [3, 11]
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        read = manager.restore(11, args=args)
    assert read.meta == {"a": [2]}
    arrays = jax.tree.map(np.asarray, read.state)
    assert set(arrays) == {"step", "params", "optimizer", "seed", "extra"}
    assert arrays["step"].dtype == np.int64
    assert arrays["step"] == 2**53 + 1
    np.testing.assert_array_equal(
        arrays["params"]["model.layers.self_attn.q_proj.weight"],
        state.params["model.layers.self_attn.q_proj.weight"].numpy(),
    )
    norm = arrays["params"]["model.norm.weight"]
    assert norm.dtype.name == "bfloat16"
    np.testing.assert_array_equal(norm.view(np.int16), state.params["model.norm.weight"].view(torch.int16).numpy())
    np.testing.assert_array_equal(arrays["optimizer"]["1"], state.optimizer[1].numpy())
    assert arrays["extra"]["0"].dtype == bool


def test_snapshot_is_apart_from_the_state(tmp_path):
    state = {"w": torch.full((1000, 1000), 1.0)}
    with Checkpointer(tmp_path, every=1, keep=0) as c:
        for step in (1, 2, 3):
            state["w"].fill_(step)
            c.save(step, state, {})
            state["w"].fill_(-1.0)  # as a donating update does, while the files are being written
        c.wait()
        for step in (1, 2, 3):
            assert c.restore(state, step)[0]["w"].eq(step).all()


@pytest.mark.gpu
def test_cuda_state_is_exact_and_jax_stays_off_the_card(tmp_path):
    state = pytree.tree_map(lambda t: None if t is None else t.cuda(), make_state())
    with Checkpointer(tmp_path, every=1, keep=0) as c:
        for step in (1, 2):  # the second uses the first one's pinned memory
            c.save(step, state, {})
            want = pytree.tree_map(lambda t: None if t is None else t.clone(), state)
            state.params["model.norm.weight"].add_(1)
        restored, _ = c.restore(state)
        assert_same(
            pytree.tree_map(lambda t: None if t is None else t.cpu(), restored),
            pytree.tree_map(lambda t: None if t is None else t.cpu(), want),
        )
        assert restored.step.is_cuda
    jax = sys.modules["jax"]  # imported by Orbax
    assert {device.platform for device in jax.devices()} == {"cpu"}


def test_all_of_it_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut must lose nothing: every file and directory is synced before the rename, the rename after it."""
    synced, events = set(), []

    def fsync(handle, real=os.fsync):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        return real(handle)

    def rename(self, target, real=Path.rename):
        if str(target) == str(tmp_path / "1"):
            events.append({str(path) for path in (self, *self.rglob("*"))} - synced)
            synced.clear()
        return real(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with Checkpointer(tmp_path, every=1, keep=0) as c:
        c.save(1, make_state(), {})
    assert events == [set()]
    assert str(tmp_path) in synced


def test_retention_and_schedule(tmp_path):
    state = {"w": torch.zeros(2)}
    with Checkpointer(tmp_path / "two", every=10, keep=2) as c:
        assert c.latest() is None
        assert c.steps() == []
        assert [c.should_save(s, False) for s in (5, 10, 15, 20)] == [False, True, False, True]
        assert c.should_save(15, True)
        for step in (9, 10, 100):  # by number, not by name
            c.save(step, state, {})
        c.wait()
        assert c.steps() == [10, 100]
        assert c.latest() == 100
        assert sorted(p.name for p in c.directory.iterdir()) == ["10", "100"]
    with Checkpointer(tmp_path / "all", every=0, keep=0, asynchronous=False) as c:
        assert [c.should_save(s, s == 7) for s in (1, 7)] == [False, True]
        for step in (1, 2, 3):
            c.save(step, state, {})
            assert c.latest() == step  # no wait: it was synchronous
        assert c.steps() == [1, 2, 3]


@pytest.mark.parametrize("keep", [Retention(2), Retention(0), Retention(0, best=1), Retention(2, every=1)])
def test_where_no_metric_decides_what_stays_no_old_manifest_is_read(tmp_path, monkeypatch, keep):
    read = []
    monkeypatch.setattr(manifest, "metrics", lambda directory: read.append(directory) or {})
    with Checkpointer(tmp_path, every=1, keep=keep, asynchronous=False) as c:
        for step in (1, 2, 3):
            c.save(step, {"w": torch.zeros(2)}, {})
    assert not read


def test_save_returns_before_the_write_ends(tmp_path, monkeypatch):
    may_finish = threading.Event()
    with Checkpointer(tmp_path, every=1, keep=0) as c:
        write = c._write
        monkeypatch.setattr(c, "_write", lambda *args: (may_finish.wait(10), write(*args)))
        c.save(1, {"w": torch.ones(3)}, {})
        assert not c._writing.ended(1e-9)
        may_finish.set()
        c.wait()
        assert c.latest() == 1


def test_restore_names_what_differs(tmp_path):
    with Checkpointer(tmp_path, every=1, keep=0) as c:
        c.save(20, {"params": {"a.b": torch.zeros(2, 3), "c": torch.zeros(1)}, "step": torch.tensor(20)}, {})
        c.wait()
        like = {"params": {"a.b": torch.zeros(2, 4), "d": torch.zeros(5)}, "step": torch.tensor(0, dtype=torch.int32)}
        with pytest.raises(UserError) as error:
            c.restore(like)
        assert "workdir's checkpoint belongs to another model" in str(error.value)
        assert "params.a.b is [2, 3] float32 on disk and [2, 4] float32 in this run" in str(error.value)
        assert "params.d is absent on disk and [5] float32 in this run" in str(error.value)
        assert "step is [] int64 on disk and [] int32 in this run; and 1 more" in str(error.value)
        with pytest.raises(UserError, match=r"no checkpoint of step 19: there are 20$"):
            c.restore(like, step=19)
        with pytest.raises(UserError, match=r"no checkpoint of step 7: there are 20$"):
            c.read_meta(7)
    with pytest.raises(UserError, match="holds no checkpoint: save one first"):
        Checkpointer(tmp_path / "nothing", every=1, keep=1).restore(like)
    assert not (tmp_path / "nothing").exists()  # reading makes nothing


def test_nothing_is_overwritten_and_set_aside_moves(tmp_path):
    state = {"w": torch.tensor([1.0])}
    with Checkpointer(tmp_path / "checkpoints", every=1, keep=0) as c:
        for step in (10, 20, 30):
            c.save(step, state, {"run": 1})
        for step, words in ((20, "already holds step 20"), (25, "has a checkpoint of step 30, later than step 25")):
            with pytest.raises(UserError, match=words):
                c.save(step, {"w": torch.tensor([2.0])}, {"run": 2})
        assert c.steps() == [10, 20, 30]
        assert c.restore(state, 20) == (state, {"run": 1})
        assert c.set_aside(after=30) is None
        aside = c.set_aside(after=10)
        assert c.steps() == [10]
        assert Checkpointer(aside, every=1, keep=0).steps() == [20, 30]
        assert Checkpointer(aside, every=1, keep=0).restore(state, 30)[1] == {"run": 1}
        c.save(20, {"w": torch.tensor([2.0])}, {"run": 2})
        assert c.set_aside(after=10) != aside
        assert Checkpointer(aside, every=1, keep=0).steps() == [20, 30]


def test_bad_arguments(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Checkpointer(tmp_path / "file", every=1, keep=1)
    with pytest.raises(UserError, match=r"config\.checkpoint\.keep is -1"):
        Checkpointer(tmp_path, every=1, keep=-1)
    with pytest.raises(UserError, match=r"config\.checkpoint\.every is -5"):
        Checkpointer(tmp_path, every=-5, keep=1)
    with Checkpointer(tmp_path / "c", every=1, keep=1) as c:
        with pytest.raises(TypeError, match="a checkpoint's leaf is a int"):
            c.save(1, {"step": 1}, {})
        with pytest.raises(TypeError, match="not JSON serializable"):
            c.save(1, {"w": torch.ones(1)}, {"path": tmp_path})
        with pytest.raises(ValueError, match="share a name on disk"):  # Orbax would return one for both
            c.save(1, {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, {})
        with pytest.raises(ValueError, match="has a / in its name"):
            c.save(1, {"../a": torch.ones(1)}, {})
        assert c.steps() == []
    (tmp_path / "c").mkdir(exist_ok=True)
    for name in ("12", "3.writing", "notes"):
        (tmp_path / "c" / name).mkdir()
    assert Checkpointer(tmp_path / "c", every=1, keep=1).steps() == []


def test_a_run_prints_nothing_of_orbax(tmp_path):
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        import torch
        from absl import app, logging
        from qwen3f.checkpoint.checkpointer import Checkpointer
        assert not {"jax", "orbax", "orbax.checkpoint"} & set(sys.modules)

        def main(argv):
            logging.set_verbosity(logging.INFO)
            state = {"w": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)}
            with Checkpointer(Path(argv[1]), every=1, keep=1) as c:
                assert c.latest() is None
                for step in (1, 2, 3):
                    c.save(step, state, {"step": step})
                c.wait()
                c.restore(state)
            logging.info("the user's own line")
            import jax
            assert [d.platform for d in jax.devices()] == ["cpu"]

        app.run(main)
    """)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].endswith("the user's own line")
