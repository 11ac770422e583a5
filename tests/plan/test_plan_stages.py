"""Plans of pipelines whose last stage has the head and fewer layers: the number they name, against trying all."""

import dataclasses

import pytest

from qwen3f import cli, presets
from qwen3f.plan import make as plan_make
from qwen3f.plan.case import Case
from qwen3f.plan.config import from_config
from qwen3f.plan.hardware import TABLE
from qwen3f.plan.make import by_policy, faster_cut, make
from qwen3f.plan.memory import FILLED
from qwen3f.plan.text import render
from sharding.mesh import parse_mesh
from sharding.pipeline.cut import Pipeline

HINT, EQUAL = "config.pipeline.layers=", Pipeline()


def setup(preset="qwen3-1.7b", mesh="pp4", pipeline=EQUAL, **model):
    """qwen3-1.7b has 28 layers: a stage of four may hold 7 to 9, and the last one holds the rest."""
    cfg = presets.get(preset).replace(**model)
    return Case(cfg, parse_mesh(mesh), 32, 4096, TABLE["h100"], microbatches=32, pipeline=pipeline)


ELEVEN = {"preset": "debug_moe", "mesh": "pp3", "num_hidden_layers": 11, "vocab_size": 151_936}


def plans(at, values):
    return {n: make(dataclasses.replace(at, pipeline=dataclasses.replace(at.pipeline, layers=n))) for n in values}


def texts(plan):
    return render(plan, by_policy(plan.setup)).splitlines()


def hints(plan):
    return [line for line in texts(plan) if line.startswith(HINT)]


def test_equal_stages_that_the_head_makes_uneven_are_told_of_a_better_value():
    equal, tried = make(setup()), plans(setup(), (7, 8, 9))
    assert equal.time == tried[7].time
    best = min(tried, key=lambda n: tried[n].time.step)
    assert best > 7
    assert faster_cut(equal).setup.pipeline == Pipeline(layers=best)
    left = 28 - 3 * best
    step = f"{tried[best].time.step * 1e3:.1f} ms"
    assert hints(equal) == [f"{HINT}{best}, which leaves {left} for the last stage, would be faster: {step} a step"]
    assert hints(tried[best]) == []


@pytest.mark.parametrize("schedule, stages", [("1f1b", 1), ("zero_bubble", 2), ("zbv", 2)])
def test_taking_the_hint_leaves_none(schedule, stages):
    at = setup(mesh="pp2", pipeline=Pipeline(schedule, stages))
    better = faster_cut(make(at))
    assert better.time.step < 0.98 * make(at).time.step
    assert make(better.setup) == better
    assert faster_cut(better) is None


def test_of_a_great_many_layers_few_cuts_are_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(plan_make, "make", lambda case: tried.append(case.pipeline.layers) or plan)
    plan = make(setup(num_hidden_layers=2000, mesh="pp2"))
    assert faster_cut(plan) is None
    assert len(tried) <= plan_make.MOST_CUTS
    assert tried[0] == 1000
    assert tried[-1] > 1980


def test_a_value_that_is_too_large_is_told_of_too():
    assert hints(make(setup(mesh="pp2", pipeline=Pipeline(layers=27))))[0].startswith(f"{HINT}16, ")


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": "tp2"},  # no pipeline
        {"vocab_size": 1024},  # a head that weighs little
        {"mesh": "pp8", "num_hidden_layers": 16},  # two layers a stage: no other value leaves the last one any
        ELEVEN | {"decoder_sparse_step": 2},  # with 5 layers a stage the first has two with experts, the second three
    ],
)
def test_where_nothing_is_better_nothing_is_said(options):
    assert hints(make(setup(**options))) == []


def test_the_value_that_unequal_kinds_rule_out_would_be_named():
    assert hints(make(setup(**ELEVEN)))[0].startswith(f"{HINT}5, ")


def test_what_does_not_fit_is_not_recommended():
    equal, other = plans(setup(), (7, 8)).values()
    between = (equal.peak + other.peak) / 2
    small = dataclasses.replace(TABLE["h100"], memory=between / FILLED)
    equal = make(dataclasses.replace(equal.setup, hardware=small))
    assert equal.fits
    assert faster_cut(equal) is None


def test_stages_and_their_times():
    plan = plans(setup(), (9,))[9]
    first, *middle, last = plan.stages
    assert len(middle) == 2
    assert first > middle[0] == middle[1] > last  # 9 layers with the embedding, 9, and 1 with the head
    assert middle[0] == pytest.approx(make(setup(num_hidden_layers=36)).stages[1])
    assert all(leaf.local_shape[0] == 9 for leaf in plan.leaves if leaf.stack)
    text = texts(plan)
    assert any("28 layers in 4 stages of 9 (8 of them padding)" in line for line in text)
    (line,) = (line for line in text if line.startswith("forward and backward of a micro-batch take "))
    first, middle, last = (f"{seconds * 1e3:.1f} ms" for seconds in (first, middle[0], last))
    assert line.endswith(f"take {first} on stage 0, {middle} on stages 1 to 2, {last} on stage 3")


def test_the_key_is_the_configurations():
    config = cli.load_experiment("experiments/pretrain_s1.py:qwen3-1.7b")
    config.mesh, config.microbatches, config.pipeline.layers = "pp4", 8, 9
    cut = from_config(config).cut
    assert [len(cut.layers_of(stage)) for stage in range(4)] == [9, 9, 9, 1]
