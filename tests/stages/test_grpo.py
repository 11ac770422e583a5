"""Runs of GRPO: meshes, micro-batches and packing change no number and no sample."""

import functools
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from qwen3f.processes.world import open_world
from qwen3f.train import loop
from sharding.mesh import parse_mesh
from tests.sharding.worlds import run_processes
from tests.stages import toy_rl
from tests.train.runs import metrics

NUMBERS = ("loss", "aux_loss", "grad_norm", "tokens_seen", "ratio_gap", "clip_low", "clip_high", "moved", "entropy",
           "kl", "reward", "truncated", "completion_tokens", "groups_wasted", "sampler_kl", "val_accuracy")  # fmt: skip
TWO = [("dp2", "dense"), ("tp2", "reward"), ("cp2", "dense"), ("pp2", "dense"), ("ep2", "moe")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("grpo")
    toy_rl.write_data(place)
    return place


@pytest.fixture(scope="module")
def alone(root):
    """kind -> the metrics of one device. They include the KL and ratio_gap, and each step makes two updates."""

    @functools.cache
    def found(kind):
        loop.run(hard(root, kind), root / "alone" / kind, progress=False)
        return learned(root / "alone" / kind)

    return found


def hard(root, kind="dense", **changes):
    """A run whose numbers are hardest to keep equal: two updates of two micro-batches, KL to a reference, a mean over
    each document.

    kind "reward": the dense model, with a reward model's scores beside the rules. kind "running": the mixture of
    experts, with running counts for its balancing loss, as a stage of a pipeline cannot know those of the whole step.
    """
    if kind == "running":
        changes = {"model.router_balance": "global", **changes}
        kind = "moe"
    if kind == "reward":
        rewards = "tests.rl.toy_rewards:small_letters=1,reward_model=0.5"
        changes = {"rewards": rewards, "judge.reward_model": str(root / "reward"), **changes}
        kind = "dense"
    parts = {
        "grpo.loss": "grpo",
        "grpo.kl_coef": 0.1,
        "grpo.router_losses": True,
        "updates": 2,
        "steps": 2,
        "rollout.samples": 3,
        "checkpoint.every": 0,
    }
    return toy_rl.make_config(root, kind, **(parts | changes))


def learned(workdir):
    return [[line[name] for name in NUMBERS if name in line] for line in metrics(workdir)]


def same(got, expected, what):
    """To 1e-10: float64, and only sums are in another order."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-10, abs=1e-10), what


def samples(workdir):
    return {path.name: path.read_text() for path in (workdir / "samples").glob("*.jsonl")}


# -- micro-batches, packing and meshes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"microbatches": 1}, {"rollout.microbatch_rows": 2}, {"seq_len": 256}], ids=str)
def test_any_cut_into_micro_batches_and_any_packing(changes, root, alone, tmp_path):
    loop.run(hard(root, **changes), tmp_path, progress=False)
    same(learned(tmp_path), alone("dense"), changes)
    assert samples(tmp_path) == samples(root / "alone" / "dense")


def on_ranks(rank, runs, root, folder):
    for mesh, kind in runs:
        config = hard(Path(root), kind, mesh=mesh)
        loop.run(ConfigDict(config), Path(folder) / mesh / kind, False, open_world(parse_mesh(mesh), "cpu", rank))


NIGHTLY = pytest.param([("pp2", "running")], marks=pytest.mark.nightly)  # it rarely breaks if those of TWO pass


@pytest.mark.parametrize("runs", [TWO, NIGHTLY], ids=["two", "pipeline of experts"])
def test_every_mesh(runs, root, alone, tmp_path):
    run_processes(on_ranks, 2, runs, str(root), str(tmp_path))
    for mesh, kind in runs:
        workdir = tmp_path / mesh / kind
        same(learned(workdir), alone(kind), (mesh, kind))
        if kind != "reward":  # a mesh sums its scores in another order
            assert samples(workdir) == samples(root / "alone" / kind), (mesh, kind)
