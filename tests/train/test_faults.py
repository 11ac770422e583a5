"""What clusters do to a run: signals, damaged and unwritable files, losses that are not finite. Nothing is lost."""

import dataclasses
import errno
import hashlib
import os
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._inductor import compile_fx

from qwen3f.checkpoint import manifest
from qwen3f.checkpoint.checkpointer import Checkpointer, StuckWrite
from qwen3f.errors import TrainingError, UserError
from qwen3f.stages import pretrain
from qwen3f.train import optimizer
from qwen3f.train.loop import run
from qwen3f.train.state import init_state
from qwen3f.train.step import make_train_step
from tests.train.runs import assert_same_bits, final_state, metrics, pretrain_model


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_exactly(make, tmp_path, number, capsys):
    config = make(steps=6, **{"checkpoint.every": 4, "eval.every": 5})
    run(config, tmp_path / "whole", progress=False)
    straight = final_state(config, tmp_path / "whole", 6)

    def signalled(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            if int(state.step) == 4:  # in step 5, after which there would be an evaluation and no checkpoint
                os.kill(os.getpid(), number)
            return step(state, batch)

        return wrapped

    run(config, tmp_path / "w", progress=False, make_step=signalled)
    assert f"{number.name}: stopped after step 5" in capsys.readouterr().out
    with Checkpointer(tmp_path / "w" / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == [4, 5]
    assert [line["step"] for line in metrics(tmp_path / "w") if "val_bpb" in line] == []
    run(config, tmp_path / "w", progress=False)
    assert_same_bits(straight, final_state(config, tmp_path / "w", 6))


class Moment:
    """Calls `act` once in a run; `done` says whether it did."""

    def __init__(self, act):
        self.act, self.done = act, False

    def __call__(self):
        if not self.done:
            self.done = True
            self.act()


def before(function, moment):
    """`function`, with the moment's act before its first call."""

    def wrapped(*args, **kw):
        moment()
        return function(*args, **kw)

    return wrapped


class InEvaluation:
    """Pretraining, with the moment before the first batch of an evaluation."""

    def __init__(self, moment):
        self.moment = moment

    def check(self, setup):
        pretrain.check(setup)

    def make(self, run):
        return pretrain.make(dataclasses.replace(run, stopping=before(run.stopping, self.moment)))


def in_evaluation(patch, moment):
    return {"stage": InEvaluation(moment)}


def in_writing(patch, moment):
    """When the checkpoint is being written; step 4 waits until then."""
    written, act = threading.Event(), moment.act
    moment.act = lambda: (act(), written.set())
    patch.setattr(manifest, "write", before(manifest.write, moment))

    def waiting(*args):
        step = make_train_step(*args)
        return lambda state, batch: (int(state.step) == 3 and written.wait(20), step(state, batch))[1]

    return {"make_step": waiting}


def in_compilation(patch, moment):
    patch.setattr(compile_fx, "compile_fx", before(compile_fx.compile_fx, moment))
    return {}


@pytest.mark.parametrize(
    "place, stopped, saved",
    [
        (in_evaluation, 2, [2]),  # in the evaluation after step 2, where no checkpoint is due; the rest is skipped
        (in_writing, 4, [3, 4]),  # the checkpoint of step 3, while step 4 runs
        pytest.param(in_compilation, 1, [1], marks=pytest.mark.nightly),
    ],
)
def test_a_signal_while_something_else_goes_on(place, stopped, saved, make, tmp_path, capsys, monkeypatch):
    """Wherever SIGTERM comes, the step is finished and saved within seconds, and the run resumes exactly."""
    config = make(steps=6, **{"checkpoint.every": 3, "eval.every": 2, "model.num_hidden_layers": 1})
    config.compile = "block" if place is in_compilation else "off"
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, *args, **kw: graph.forward)  # traced, not compiled
    run(config, tmp_path / "whole", progress=False)
    straight = final_state(config, tmp_path / "whole", 6)
    torch.compiler.reset()
    moment = Moment(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.MonkeyPatch.context() as patch:
        options = place(patch, moment)
        begin = time.monotonic()
        run(config, tmp_path / "w", progress=False, **options)
    assert moment.done
    assert time.monotonic() - begin < 60
    said = capsys.readouterr().out
    assert f"SIGTERM: stopped after step {stopped}" in said
    assert ("the evaluation was interrupted" in said) == (place is in_evaluation)
    with Checkpointer(tmp_path / "w" / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == saved
    run(config, tmp_path / "w", progress=False)
    assert_same_bits(straight, final_state(config, tmp_path / "w", 6))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(make, tmp_path, capsys):
    config = make(steps=6, **{"checkpoint.every": 2, "checkpoint.keep": 0, "eval.every": 0})
    run(config, tmp_path, progress=False)
    straight = final_state(config, tmp_path, 6)
    for step in (6, 4):
        for path in (tmp_path / "checkpoints" / str(step)).rglob("manifest.json"):
            path.write_text(path.read_text().replace('"bytes": ', '"bytes": 9'))
    capsys.readouterr()
    run(config, tmp_path, progress=False)
    said = capsys.readouterr().out
    assert "checkpoints/6 is damaged" in said
    assert "checkpoints/4 is damaged" in said
    assert "resuming from step 2" in said
    assert_same_bits(straight, final_state(config, tmp_path, 6))
    assert {p.name for p in (tmp_path / "checkpoints.aside1").iterdir()} == {"4", "6"}

    for path in (tmp_path / "checkpoints").rglob("manifest.json"):
        path.write_text("{")
    with pytest.raises(UserError, match="checkpoints/2 is damaged"):
        run(make(steps=8), tmp_path, progress=False)


def test_steps_that_are_not_finite_are_kept_and_passed_over_as_often_as_allowed(make, tmp_path, capsys):
    batches = {}

    def poisoned(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            number = int(state.step) + 1
            batches[number] = batch
            if number in (3, 5):
                batch = batch | {"loss_weights": batch["loss_weights"] * float("inf")}
            return step(state, batch)

        return wrapped

    def attempt(workdir, skips):
        config = make(steps=6, nonfinite_skips=skips, **{"checkpoint.every": 1, "checkpoint.keep": 0})
        run(config, workdir, False, make_step=poisoned)

    attempt(tmp_path / "two", 2)
    said = capsys.readouterr().out
    assert "step 3 is not finite" in said
    assert "2 of 2 such steps skipped" in said
    with pytest.raises(TrainingError, match=r"step 5 is not finite.* kept in .*nonfinite/step-5\.npz"):
        attempt(tmp_path / "one", 1)
    assert {p.name for p in (tmp_path / "two" / "nonfinite").iterdir()} == {"step-3.npz", "step-5.npz"}
    with np.load(tmp_path / "two" / "nonfinite" / "step-3.npz") as kept:
        assert set(kept) == set(batches[3])
        assert all((kept[key] == batches[3][key].numpy()).all() for key in kept)
    config = make(steps=6)
    before, bad, after = (final_state(config, tmp_path / "two", step) for step in (2, 3, 4))
    assert_same_bits((before.params, before.opt), (bad.params, bad.opt))
    assert (int(bad.step), int(bad.position)) == (3, 12)
    assert not torch.equal(bad.params["model.norm.weight"], after.params["model.norm.weight"])


@pytest.mark.parametrize("policy", ["stop", "go_on"])
def test_a_full_disk_stops_the_run_or_not_by_policy(make, tmp_path, policy, capsys):
    """A limit on file sizes during steps 4 and 5 stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            full = int(state.step) in (3, 4)  # before steps 4 and 5, so also in the save after step 4
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else soft, hard))
            return step(state, batch)

        return wrapped

    config = make(steps=8, **{"checkpoint.every": 2, "checkpoint.keep": 0, "eval.every": 0, "log_every": 8})
    config.checkpoint.update(on_failure=policy, asynchronous=False)
    try:
        if policy == "stop":
            with pytest.raises(TrainingError, match=r"step 4 could not be written .*last complete one is of step 2"):
                run(config, tmp_path, progress=False, make_step=filling)
        else:
            run(config, tmp_path, progress=False, make_step=filling)
            assert "step 4 could not be written" in capsys.readouterr().out
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Checkpointer(tmp_path / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == ([2] if policy == "stop" else [2, 6, 8])


def stuck(patch, until):
    """Writes hang until `until` is set."""
    patch.setattr(manifest, "write", lambda *args, real=manifest.write: (until.wait(30), real(*args)))


def slow_step(*args):
    step = make_train_step(*args)
    return lambda state, batch: (time.sleep(0.05), step(state, batch))[1]


@pytest.mark.parametrize("policy", ["stop", "go_on"])
def test_a_save_that_hangs_stops_the_run_or_not_by_policy(make, tmp_path, policy, capsys, monkeypatch):
    """The error comes within the timeout; nothing is deleted. If the write ends later it counts, and saving goes on."""
    config = make(steps=2, **{"checkpoint.every": 2, "checkpoint.keep": 1, "eval.every": 0})
    run(config, tmp_path, progress=False)
    config.update(steps=30)
    config.checkpoint.update(on_failure=policy, timeout=0.3)
    until = threading.Event()
    with monkeypatch.context() as patch:
        stuck(patch, until)
        if policy == "stop":
            begin = time.monotonic()
            with pytest.raises(TrainingError, match=r"step 4 has not been written .* within 0\.3 s .* is of step 2\)"):
                run(config, tmp_path, progress=False, make_step=slow_step)
            assert time.monotonic() - begin < 20
        else:
            real = Checkpointer.wait

            def released_in_the_end(self):
                try:
                    real(self)
                except StuckWrite:
                    stuck_at.append(self.latest())
                    if len(stuck_at) == 3:
                        until.set()
                        self.timeout = 0.0
                    raise

            stuck_at = []
            patch.setattr(Checkpointer, "wait", released_in_the_end)
            run(config, tmp_path, progress=False, make_step=slow_step)
            assert capsys.readouterr().out.count("step 4 has not been written") == 3
            assert stuck_at == [2, 2, 2]
    with Checkpointer(tmp_path / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == ([2] if policy == "stop" else [30])
        until.set()


def test_a_directory_that_cannot_be_written_is_named_and_the_run_goes_on_by_policy(make, tmp_path, capsys, monkeypatch):
    real = Path.mkdir

    def denied(self, *args, **kw):
        if self.suffix == ".writing" and self.stem != "6":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *args, **kw)

    config = make(steps=6, **{"checkpoint.every": 2, "eval.every": 0})
    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(TrainingError, match=r"step 2 could not be .*there is no earlier one.*Permission denied"):
        run(config, tmp_path / "stop", progress=False)
    config.checkpoint.on_failure = "go_on"
    run(config, tmp_path / "w", progress=False)
    said = capsys.readouterr().out
    assert "step 2 could not be written" in said
    assert "step 4 could not be written" in said
    with Checkpointer(tmp_path / "w" / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == [6]


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_one_byte_makes_a_run_go_back_one_checkpoint(make, tmp_path, capsys, damage):
    config = make(steps=4, **{"checkpoint.every": 2, "checkpoint.keep": 0, "eval.every": 0})
    run(config, tmp_path, progress=False)
    straight = final_state(config, tmp_path, 4)
    path = tmp_path / "checkpoints" / "4" / "state" / "params.model.norm.weight" / "0"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage == "truncate" else bytes([content[0] ^ 1]) + content[1:])
    capsys.readouterr()
    run(config, tmp_path, progress=False)
    said = capsys.readouterr().out
    assert "checkpoints/4 is damaged" in said
    assert "state/params.model.norm.weight/0" in said
    assert "resuming from step 2" in said
    assert_same_bits(straight, final_state(config, tmp_path, 4))


@pytest.mark.parametrize(
    "backend, device", [("orbax", "cpu"), ("dcp", "cpu"), pytest.param("orbax", "cuda", marks=pytest.mark.gpu)]
)
def test_a_resumed_run_sees_the_same_batches(make, tmp_path, backend, device):
    """Every array of every batch and the final state equal those of the run without a stop, with either backend."""
    seen = {}

    def recording(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            digest = hashlib.sha256(b"".join(batch[key].cpu().numpy().tobytes() for key in sorted(batch))).hexdigest()
            seen.setdefault(int(state.step), []).append(digest)
            return step(state, batch)

        return wrapped

    config = make(steps=6, **{"checkpoint.every": 3, "checkpoint.backend": backend, "model.attention_dropout": 0.1})
    config.device = device
    run(config, tmp_path, progress=False, make_step=recording)
    straight = restored(config, tmp_path, 6)
    config.resume = 3
    run(config, tmp_path, progress=False, make_step=recording)
    assert_same_bits(straight, restored(config, tmp_path, 6))
    assert [len(digests) for digests in seen.values()] == [1, 1, 1, 2, 2, 2]
    assert len({digest for digests in seen.values() for digest in digests}) == 6


def restored(config, workdir, step):
    with Checkpointer(workdir / "checkpoints", 0, 0, backend=config.checkpoint.backend) as checkpoints:
        return checkpoints.restore(init_state(pretrain_model(config), 0), step)[0]


def test_a_gradient_that_is_not_finite_changes_nothing(make, tmp_path):
    """The loss is finite but one gradient has a NaN: the state stays, no checkpoint is saved, the batch is kept."""
    real = optimizer.global_norm
    calls = []

    def poisoned(grads, *where):
        calls.append(1)
        if len(calls) == 4:
            next(iter(grads.values())).view(-1)[3] = float("nan")
        return real(grads, *where)

    config = make(steps=6, **{"checkpoint.every": 1, "checkpoint.keep": 0, "eval.every": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "global_norm", poisoned)
        with pytest.raises(TrainingError, match=r"step 4 is not finite: loss \d.*norm nan, on examples 12 to 15"):
            run(config, tmp_path / "stop", progress=False)
        calls.clear()
        config.nonfinite_skips = 1
        run(config, tmp_path / "skip", progress=False)
    with Checkpointer(tmp_path / "stop" / "checkpoints", 0, 0) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
    assert [path.name for path in (tmp_path / "stop" / "nonfinite").iterdir()] == ["step-4.npz"]
    third, fourth = (final_state(config, tmp_path / "skip", step) for step in (3, 4))
    assert_same_bits((third.params, third.opt), (fourth.params, fourth.opt))
    assert (int(fourth.step), int(fourth.position)) == (4, 16)
