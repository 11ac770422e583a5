"""A plan that does not fit names the smallest change that does: it fits, and by trying all, nothing smaller does."""

import itertools

import pytest
import torch
from ml_collections import ConfigDict
from torch.torch_version import TorchVersion

from qwen3f import cli
from qwen3f.errors import UserError
from qwen3f.plan.config import from_config
from qwen3f.plan.fit import smallest_changes
from qwen3f.plan.make import by_policy, make
from qwen3f.plan.memory import FILLED
from qwen3f.plan.text import render

POLICIES = ("none", "selective", "full")


def configured(experiment, **changes):
    config = cli.load_experiment(f"experiments/{experiment}")
    config.update_from_flattened_dict(changes)
    return config


def plan_of(config, **changes):
    """The plan of a changed configuration; None where it cannot run."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(changes)
    try:
        return make(from_config(config))
    except UserError:
        return None


def fits(config, **changes):
    plan = plan_of(config, **changes)
    return plan is not None and plan.fits


def lines(config):
    plan = make(from_config(config))
    text = render(plan, by_policy(plan.setup), None if plan.fits else smallest_changes(config)).splitlines()
    assert any(line.endswith("on h100, fits" if plan.fits else "above the 95% that a run can fill") for line in text)
    return [line for line in text if line.startswith("does not fit")]


@pytest.mark.parametrize(
    "config, flags",
    [
        (configured("pretrain_s3.py:medium", mesh="dp8,tp2,pp4"), "model.gradient_checkpointing=selective"),
        (configured("pretrain_s3.py:qwen3-14b", mesh="dp8,tp2,pp4"), "model.gradient_checkpointing=full"),
        (configured("pretrain_s1.py:small", microbatches=1), "microbatches=0"),
        (configured("pretrain_s1.py:qwen3-4b", mesh="dp4", **{"fsdp.enabled": False}), "fsdp.enabled=True"),
        (configured("pretrain_s1.py:qwen3-4b", mesh="dp4", **{"fsdp.shard_size": 1}), "fsdp.shard_size=0"),
        (
            configured(
                "pretrain_s1.py:qwen3-8b",
                mesh="dp4",
                **{"fsdp.reshard": False, "model.gradient_checkpointing": "selective", "fsdp.shard_size": 2},
            ),
            "fsdp.shard_size=0",
        ),
        (
            configured("pretrain_s1.py:small", batch_size=8, dtype="float32", hardware="h100,memory=40e9"),
            "model.gradient_checkpointing=full",
        ),
    ],
)
def test_one_key_is_enough(config, flags):
    assert not fits(config)
    (change,) = smallest_changes(config)
    assert change.flags == f"--config.{flags}"
    plan = plan_of(config, **dict(change.values))
    assert plan.fits
    assert plan.peak == change.peak
    assert plan.setup == change.case


def test_of_settings_the_fewest_keys_that_fit_by_trying_all():
    """Every setting that could save memory is at its worst. On small cards one or two must change, or none helps."""
    start = configured(
        "pretrain_s1.py:qwen3-1.7b",
        mesh="dp4",
        microbatches=1,
        batch_size=16,
        **{"fsdp.shard_size": 2, "fsdp.reduce": "float32", "fsdp.reshard": False},
    )
    values = {
        "microbatches": (1, 0),
        "fsdp.shard_size": (2, 0),
        "fsdp.reduce": ("float32", "compute"),
        "fsdp.reshard": (False, True),
        "model.gradient_checkpointing": POLICIES,
    }
    everything = [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]
    usual = {key: first for key, (first, *_) in values.items()}

    def changed(setting):
        return sum(setting[key] != usual[key] for key in values)

    counts = set()
    for memory in (11e9, 14e9, 30e9, 45e9):
        start.hardware = f"h100,memory={memory}"
        needed = min((changed(setting) for setting in everything if fits(start, **setting)), default=None)
        changes = smallest_changes(start)
        if needed is None:
            assert all(dict(change.values).keys() & {"mesh", "hardware"} for change in changes)
        else:
            (change,) = changes
            assert len(change.values) == needed
            assert fits(start, **dict(change.values))
        counts.add(needed)
    assert counts == {None, 2, 1}


@pytest.mark.parametrize("preset, experiment", [("large", "pretrain_s1"), ("qwen3-235b-a22b", "pretrain_s3")])
def test_more_devices_are_twice_as_many_and_the_fastest_of_those(preset, experiment):
    config = configured(f"{experiment}.py:{preset}", mesh="dp8,tp2,pp4")
    assert not any(fits(config, **{"model.gradient_checkpointing": policy}) for policy in POLICIES)
    mesh, other = smallest_changes(config)
    assert (mesh.case.mesh.size, other.case.mesh.size) == (128, 64)
    settings = dict(mesh.values)
    del settings["mesh"]
    doubled = ("dp16,tp2,pp4", "dp8,tp4,pp4", "dp8,tp2,pp8")
    plans = [plan_of(config, mesh=text, **settings) for text in doubled]
    steps = [plan.time.step for plan in plans if plan is not None and plan.fits]
    assert plan_of(config, **dict(mesh.values)).time.step == min(steps)
    assert other.flags.startswith("--config.hardware=h200")
    assert fits(config, **dict(other.values))
    with_fewer = POLICIES[: POLICIES.index(settings.get("model.gradient_checkpointing", "none"))]
    for policy, text in itertools.product(with_fewer, doubled):
        assert not fits(config, mesh=text, **{"model.gradient_checkpointing": policy})


@pytest.mark.parametrize("node, widest", [(8, 8), (2, 2)])
def test_devices_are_doubled_until_it_fits_and_tp_stays_in_a_node(node, widest):
    config = configured("pretrain_s1.py:qwen3-14b", hardware=f"h100,node={node}")
    (change,) = smallest_changes(config)
    mesh = change.case.mesh
    assert mesh.tp <= widest
    assert fits(config, **dict(change.values))
    assert mesh.size in (4, 8, 16)
    for axes in itertools.combinations_with_replacement(("dp", "tp", "pp"), mesh.size.bit_length() - 2):
        half = ",".join(f"{axis}{2 ** axes.count(axis)}" for axis in sorted(set(axes)))
        if 2 ** axes.count("tp") <= widest:
            assert not any(fits(config, mesh=half, **{"model.gradient_checkpointing": p}) for p in POLICIES), half


def test_the_line_of_a_plan():
    config = configured("pretrain_s3.py:medium", mesh="dp8,tp2,pp4")
    (change,) = smallest_changes(config)
    peak = f"{change.peak / 2**30:.1f} of 79.1 GiB"
    flag = "--config.model.gradient_checkpointing=selective"
    assert lines(config) == [f"does not fit; the smallest change that fits: {flag} (peak {peak})"]
    config.model.gradient_checkpointing = "selective"
    assert lines(config) == []
    (line,) = lines(configured("pretrain_s1.py:large", mesh="dp8,tp2,pp4", hardware="h100,node=4"))
    assert "fits: --config.mesh=dp16,tp2,pp4 (128 × h100, 4 micro-batches, peak " in line
    assert ", or --config.hardware=h200,node=4 (64 × h200, peak " in line
    (line,) = lines(configured("pretrain_s1.py:large", batch_size=1))
    assert line == "does not fit, not even with recomputation, more micro-batches, 64 times the devices or other cards"


def test_what_no_run_can_do_is_neither_planned_nor_recommended(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    config = configured("pretrain_s1.py:qwen3-4b", compile="step", microbatches=1)
    assert not fits(config)
    assert [*by_policy(from_config(config))] == ["none", "selective"]
    for change in smallest_changes(config):
        assert "gradient_checkpointing=full" not in change.flags
        assert fits(config, **dict(change.values))


def test_a_card_is_never_full():
    config = configured("pretrain_s1.py:small", mesh="dp8", microbatches=1)
    peak = make(from_config(config)).peak
    for share, wanted in ((FILLED * 0.999, True), (FILLED * 1.001, False)):
        config.hardware = f"h100,memory={peak / share}"
        assert fits(config) is wanted
