"""The copy of the state for a save: later updates do not change it, the next gradient runs beside it, and its memory is
allocated once.
"""

import time

import pytest
import torch

from qwen3f import model, presets
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.checkpoint.snapshot import Snapshot
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import init_state
from tests.batches import random_batch
from tests.train.runs import assert_same_bits


def test_memory_is_made_once_and_follows_the_shapes():
    leaves = {("a",): torch.arange(12.0).view(3, 4).T, ("b",): torch.ones(5, dtype=torch.bfloat16)}
    snapshot = Snapshot()
    snapshot.reserve(leaves)
    first = snapshot.begin(leaves)
    places = {name: copy.data_ptr() for name, copy in first.items()}
    snapshot.finish()
    assert all(torch.equal(first[name], leaves[name]) for name in leaves)
    assert all(copy.is_contiguous() for copy in first.values())
    leaves[("b",)].add_(1)
    assert first[("b",)].eq(1).all()
    again = snapshot.begin(leaves)
    assert {name: copy.data_ptr() for name, copy in again.items()} == places
    assert again[("b",)].eq(2).all()
    other = snapshot.begin({("b",): torch.zeros(6)})
    assert [(name, copy.shape, copy.dtype) for name, copy in other.items()] == [(("b",), (6,), torch.float32)]


def tiny():
    return presets.get("nano").replace(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16
    )


@pytest.mark.parametrize("compile", ["off", "step"])
def test_before_update_comes_once_a_step_and_before_any_write(compile, monkeypatch):
    """It is called after the gradient and before the donated state changes. The result is that of a step without it."""
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    cfg, batch = tiny(), random_batch(2, 16, 64)
    options = {"execution": model.Execution(compile=compile, attention="reference")}
    plain = make_train_step(cfg, AdamW(), Schedule("constant", 1e-2, 9), **options)
    want, _ = plain(init_state(cfg, 0), batch)
    start, seen = init_state(cfg, 0), []
    step = make_train_step(
        cfg, AdamW(), Schedule("constant", 1e-2, 9), donate=True, **options,
        before_update=lambda: seen.append({path: leaf.clone() for path, leaf in start.params.items()}),
    )  # fmt: skip
    state, _ = step(start, batch)
    assert_same_bits(seen, [init_state(cfg, 0).params])
    assert_same_bits(state, want)
    assert state.params["model.norm.weight"] is start.params["model.norm.weight"]
    step(state, batch)
    assert len(seen) == 2


def test_a_save_that_is_not_joined_by_the_caller_joins_itself(tmp_path, monkeypatch):
    joined = []
    monkeypatch.setattr(Snapshot, "join", lambda self: joined.append(1))
    with Checkpointer(tmp_path, 1, 0) as checkpoints:
        checkpoints.save(1, {"w": torch.ones(2)}, {})
        assert joined == [1]
        checkpoints.save(2, {"w": torch.ones(2)}, {}, overlap=True)
        assert joined == [1]
        checkpoints.join()
        assert joined == [1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_cuda_copy_overlaps_and_is_of_the_state_at_the_call(tmp_path, overlap):
    """2 GB: the host comes back long before the copy has ended, and an update after `join` does not reach it."""
    state = {"w": torch.full((2**29,), 1.0, device="cuda"), "b": torch.ones(3, device="cuda")}
    with Checkpointer(tmp_path, 1, 1) as checkpoints:
        checkpoints.prepare(state)
        checkpoints.wait()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        checkpoints.save(1, state, {}, overlap=overlap)
        took = time.perf_counter() - begin
        reader = state["w"].sum()  # reading is free
        if overlap:
            checkpoints.join()
        state["w"].add_(1.0)
        state["b"].add_(1.0)
        assert took < 0.05
        checkpoints.wait()
        like = {key: leaf.to("meta") for key, leaf in state.items()}
        saved, _ = checkpoints.restore(like, 1)
    assert saved["w"].eq(1.0).all()
    assert saved["b"].eq(1.0).all()
    assert reader == 2**29
    assert state["w"].eq(2.0).all()
