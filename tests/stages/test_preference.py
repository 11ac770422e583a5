"""Reward model and DPO: meshes and micro-batches change no number, a run that was killed resumes."""

import functools
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from qwen3f.processes.world import open_world
from qwen3f.train import loop
from sharding.mesh import parse_mesh
from tests.sharding.worlds import run_processes
from tests.stages import toy_pairs
from tests.stages.test_sft import Killed, watched
from tests.train.runs import assert_same_bits, final_state, metrics

NUMBERS = {
    "reward_model": ("loss", "grad_norm", "chosen_score", "rejected_score", "score_margin", "accuracy"),
    "dpo": ("loss", "grad_norm", "kl", "chosen_log_prob", "rejected_log_prob", "reward_margin", "accuracy"),
}
CHANGES = {"reward_model": {"reward_model.margin": 0.5, "reward_model.centre": 0.01}, "dpo": {"dpo.sft_weight": 0.2}}
SHORT = {"steps": 2, "checkpoint.every": 0}
LIVE = {"dpo.reference_log_probs": "live"}
RUNS = {  # ranks -> (mesh, model, stage, changes) of each run
    2: [
        ("dp2", "dense", "dpo", {}),
        ("cp2", "dense", "dpo", LIVE),
        ("pp2", "dense", "dpo", {}),
        ("tp2", "dense", "reward_model", {}),
        ("cp2", "dense", "reward_model", {}),
        ("ep2", "moe", "reward_model", {}),
    ],
    4: [("dp2,tp2", "dense", "dpo", {})],
}
MORE = {  # runs that rarely break if those above pass
    2: [
        *((mesh, "dense", "reward_model", {}) for mesh in ("dp2", "pp2")),
        *((mesh, "dense", "dpo", changes) for mesh in ("tp2", "cp2", "pp2") for changes in ({}, LIVE)),
        ("ep2", "moe", "dpo", {}),
    ],
    4: [("dp2,tp2", "dense", "reward_model", {}), ("cp2,tp2", "dense", "dpo", LIVE)],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("preference")
    toy_pairs.write_data(place)
    return place


def configured(root, stage, kind="dense", **changes):
    return toy_pairs.make_config(root, stage, kind, **CHANGES[stage], **changes)


@pytest.fixture(scope="module")
def alone(root):
    """(stage, kind) -> the numbers of one device."""

    @functools.cache
    def found(stage, kind):
        loop.run(configured(root, stage, kind), place := root / "alone" / stage / kind, progress=False)
        return learned(place, stage)

    return found


def learned(workdir, stage):
    lines = metrics(workdir)
    return [[line[n] for n in (*NUMBERS[stage], *(k for k in line if k.startswith("val_")))] for line in lines]


def same(got, expected, what):
    """To 1e-10: float64, and only sums are in another order. The last line has the held-out values of two sources."""
    assert len(got[-1]) == len(got[0]) + 12
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-10, abs=1e-10), what


@pytest.mark.parametrize(
    "stage, parts",
    [("dpo", 1), *(pytest.param(*case, marks=pytest.mark.nightly) for case in [("reward_model", 1), ("dpo", 4)])],
)
def test_any_cut_into_micro_batches(stage, parts, root, alone, tmp_path):
    loop.run(configured(root, stage, microbatches=parts), tmp_path, progress=False)
    same(learned(tmp_path, stage), alone(stage, "dense"), parts)


def on_ranks(rank, runs, root, folder):
    """Each mesh has its own cache, so its ranks compute the reference's log-probabilities themselves."""
    for number, (mesh, kind, stage, changes) in enumerate(runs):
        changes = {**changes, "mesh": mesh, "data.cache": f"{folder}/cache-{number}"}
        config = configured(Path(root), stage, kind, **SHORT, **changes)
        loop.run(ConfigDict(config), Path(folder) / str(number), False, open_world(parse_mesh(mesh), "cpu", rank))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("runs", [RUNS, pytest.param(MORE, marks=pytest.mark.nightly)], ids=["usual", "more"])
def test_every_mesh(runs, ranks, root, alone, tmp_path):
    run_processes(on_ranks, ranks, runs[ranks], str(root), str(tmp_path))
    for number, (mesh, kind, stage, changes) in enumerate(runs[ranks]):
        same(learned(tmp_path / str(number), stage), alone(stage, kind)[: SHORT["steps"]], (mesh, stage, changes))
        files = [*(tmp_path / f"cache-{number}").glob("reference-*")]
        assert len(files) == (4 if stage == "dpo" and not changes else 0)


@pytest.mark.parametrize("stage", ["dpo", pytest.param("reward_model", marks=pytest.mark.nightly)])
def test_a_killed_run_goes_on_with_the_same_batches_and_numbers(stage, root, alone, tmp_path):
    """The run dies before step 4 and resumes from the checkpoint of step 2, bit for bit like an uninterrupted run."""
    config, whole, first, second = configured(root, stage), {}, {}, {}
    loop.run(config, tmp_path / "whole", False, make_step=watched(whole))
    with pytest.raises(Killed):
        loop.run(config, tmp_path / "cut", False, make_step=watched(first, 4))
    loop.run(config, tmp_path / "cut", False, make_step=watched(second))
    assert (list(first), list(second), list(whole)) == ([1, 2, 3], [3, 4], [1, 2, 3, 4])
    for number, batch in (*first.items(), *second.items()):
        assert batch.keys() == whole[number].keys()
        assert all(torch.equal(value, whole[number][key]) for key, value in batch.items()), number
    assert_same_bits(final_state(config, tmp_path / "cut", 4), final_state(config, tmp_path / "whole", 4))
    same(learned(tmp_path / "whole", stage), alone(stage, "dense"), "whole")
    again = {line["step"]: line for line in metrics(tmp_path / "cut")}
    for line in metrics(tmp_path / "whole"):
        for name in (*NUMBERS[stage], "val_loss", "val_accuracy", "val_calibration", "padding"):
            assert again[line["step"]].get(name) == line.get(name), name
