"""A stage that the project does not know trains on every mesh, to the same numbers; and what a stage may not do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from qwen3f.errors import TrainingError, UserError
from qwen3f.processes.world import open_world
from qwen3f.train import loop
from qwen3f.train.stage import find_stage
from sharding.mesh import parse_mesh
from tests.sharding.worlds import run_processes
from tests.train import toy_stage
from tests.train.runs import assert_same_bits, final_state, metrics

ROOT = Path(__file__).parents[2]
NUMBERS = ("loss", "grad_norm", "entropy", "margin", "held_log_prob", "tokens_seen")
TWO = {"dp2": "dense", "tp2": "frozen", "cp2": "dense", "pp2": "frozen", "ep2": "moe"}
FOUR = {"dp2,tp2": "dense", "cp2,tp2": "scores"}


def learned(workdir):
    return [[line[name] for name in NUMBERS if name in line] for line in metrics(workdir)]


def on_ranks(rank, meshes, folder):
    for mesh, kind in meshes.items():
        config = toy_stage.get_config(kind)
        config.mesh = mesh
        loop.run(ConfigDict(config), Path(folder) / mesh, False, open_world(parse_mesh(mesh), "cpu", rank))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a run of each kind on one device."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in ("dense", "moe", "frozen", "scores"):
        loop.run(toy_stage.get_config(kind), folder / kind, progress=False)
    return folder


@pytest.mark.parametrize("meshes, ranks", [(TWO, 2), (FOUR, 4)], ids=["two", "four"])
def test_a_loss_over_documents_is_the_same_on_every_mesh(meshes, ranks, alone, tmp_path):
    """float64: losses, norms, figures and evaluations of six steps to 1e-10; only sums are in another order."""
    run_processes(on_ranks, ranks, meshes, str(tmp_path))
    for mesh, kind in meshes.items():
        got, expected = learned(tmp_path / mesh), learned(alone / kind)
        assert len(got) == 6
        for a, b in zip(got, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-10, abs=1e-10), mesh
    last = final_state(toy_stage.get_config(), alone / "dense", 6)
    assert int(last.position) == 6 * 8 + 3 * 8  # every other step used two batches


def test_a_scalar_head_starts_fresh_on_a_model_of_text_and_goes_on_bit_for_bit(alone, tmp_path, capsys):
    config = toy_stage.get_config("scores")
    config.init_from = str(alone / "dense")
    loop.run(config, tmp_path / "whole", progress=False)
    assert f"config.init_from={alone / 'dense'} has no score.weight; it starts fresh" in capsys.readouterr().out
    config.steps = 2
    loop.run(config, tmp_path / "parts", progress=False)
    config.steps = 6
    loop.run(config, tmp_path / "parts", progress=False)
    assert "starts fresh" not in capsys.readouterr().out.partition("step 2")[2]
    last = final_state(config, tmp_path / "parts", 6)
    assert_same_bits(last, final_state(config, tmp_path / "whole", 6))
    losses = [line["loss"] for line in metrics(tmp_path / "whole") if "loss" in line]
    assert losses[-1] < losses[0]
    assert "lm_head.weight" not in last.params


def launch(workdir, mesh, kind, **more):
    experiment = f"tests/train/toy_stage.py:{kind}"
    command = [sys.executable, "launch.py", "--config", experiment, "--workdir", str(workdir), f"--config.mesh={mesh}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


OTHERS = ["", *[*TWO, *FOUR][1:]]


@pytest.mark.parametrize("mesh", ["dp2", *(pytest.param(mesh, marks=pytest.mark.nightly) for mesh in OTHERS)])
def test_by_launch_it_survives_a_kill_and_goes_on_bit_for_bit(mesh, tmp_path, alone):
    """All its processes are killed somewhere after step 2. The same command then reaches the same end."""
    kind = {**TWO, **FOUR}.get(mesh, "dense")
    killed = launch(tmp_path / "w", mesh, kind, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "w" / "checkpoints" / "2").exists():
        assert killed.poll() is None, killed.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = launch(tmp_path / "w", mesh, kind)
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0, said
    whole = launch(tmp_path / "whole", mesh, kind)
    assert whole.wait(120) == 0
    config = toy_stage.get_config(kind)
    assert_same_bits(final_state(config, tmp_path / "w", 6), final_state(config, tmp_path / "whole", 6))
    assert learned(tmp_path / "whole") == [pytest.approx(line, rel=1e-10, abs=1e-10) for line in learned(alone / kind)]


class Changed:
    """The toy stage with some parts replaced."""

    def __init__(self, refuse=None, **parts):
        self.refuse, self.parts = refuse, parts

    def check(self, setup):
        if self.refuse:
            raise UserError(self.refuse)

    def make(self, run):
        made = toy_stage.make(run)
        return made.__class__(**{**vars(made), **self.parts})


class OtherKeys(toy_stage.Pairs):
    def __getitem__(self, i):
        example = super().__getitem__(i)
        return example if i % 2 else {**example, "bonus": example["tokens"]}


def nan_margin(sums, rows):
    return sums, {"margin": sums * float("nan")}


def test_what_a_stage_may_not_do_is_one_line_at_the_first_step(tmp_path):
    config = toy_stage.get_config()
    objective = toy_stage.Objective("log_probs", None, nan_margin, None, ("margin",))
    with pytest.raises(UserError, match="not on a Sunday"):
        loop.run(config, tmp_path / "a", False, stage=Changed("not on a Sunday"))
    with pytest.raises(
        UserError, match=r"the keys \['loss_weights', .* its batch \['bonus', .* all examples need the same"
    ):
        loop.run(config, tmp_path / "b", False, stage=Changed(dataset=OtherKeys()))
    with pytest.raises(TrainingError, match="step 1: the objective's figure margin is nan"):
        loop.run(config, tmp_path / "c", False, stage=Changed(objective=objective))
    with pytest.raises(UserError, match="consumed=99; it must lie between 0 and 8"):
        loop.run(config, tmp_path / "d", False, stage=Changed(prepare=lambda s, b, m: {**b, "consumed": 99}))
    for name in "abcd":
        assert not list((tmp_path / name).glob("checkpoints/*")), name


def test_a_workdir_remembers_its_stage(tmp_path, make):
    config = toy_stage.get_config()
    config.steps = 1
    loop.run(config, tmp_path, False)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    config.stage = "pretrain"
    with pytest.raises(
        UserError, match=r"of another stage: its stage is tests.train.toy_stage, this run's is pretrain"
    ):
        loop.run(config, tmp_path, False)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "name, words",
    [
        ("prtrain", "no module qwen3f.stages.prtrain; write .*pretrain"),
        ("no.such", "no module no.such"),
        ("json.tool", "has no function check"),
    ],
)
def test_a_stage_that_is_not_there_is_named(name, words):
    with pytest.raises(UserError, match=words):
        find_stage(name)


def test_what_a_stage_remembers_is_in_the_checkpoint(tmp_path):
    seen = []
    memory = Changed(save=lambda: {"n": len(seen)}, load=seen.append)
    config = toy_stage.get_config()
    config.steps = 2
    loop.run(config, tmp_path, False, stage=memory)
    config.steps = 4
    loop.run(config, tmp_path, False, stage=memory)
    assert seen == [{}, {"n": 1}]
    meta = json.loads((tmp_path / "checkpoints" / "4" / "meta" / "metadata").read_text())
    assert meta["stage"] == {"n": 2}
