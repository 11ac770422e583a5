"""What the benchmark parses, computes and prints. Its measurements need GPUs and are not tested here."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.errors import UserError
from qwen3f.train.bench import Case, Measured, _covered, main, parse_case, plan, report


def test_a_case_is_its_words():
    assert parse_case("") == Case()
    case = parse_case("mesh=dp2,pp2 rows=8 pure=true remat=full stage_layers=3")
    assert case == Case(mesh="dp2,pp2", rows=8, pure=True, remat="full", stage_layers=3)
    assert case.batch_size == 16
    assert case.pipeline.layers == 3
    assert (case.model.gradient_checkpointing, case.model.num_hidden_layers) == ("full", 28)
    assert parse_case("layers=4").model.num_hidden_layers == 4


@pytest.mark.parametrize(
    "text, message",
    [
        ("rows", r"'rows' is not part of a case; write key=value, with one of the keys mesh, preset"),
        ("row=4", r"'row=4' is not part of a case"),
        ("rows=four", r"'rows=four': 'four' is not of type int"),
        ("pure=yes", r"'pure=yes': write pure=True or pure=False"),
    ],
)
def test_wrong_words_are_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_case(text)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA device"):
        main([])


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20))))
def test_time_that_spans_cover_counts_once(spans):
    spans = [(start, start + length) for start, length in spans]
    assert _covered(spans) == len({moment for start, end in spans for moment in range(start, end)})


def test_a_report_has_the_slowest_rank_and_the_plan(monkeypatch):
    monkeypatch.setattr("qwen3f.train.bench.peak_flops", lambda device: 989e12)
    case = parse_case("preset=debug mesh=dp2 rows=2 tokens=256")
    fast = Measured(0.5, 2**30, 0.4, 0.1, 0.05, 0.05)
    line = report(case, "mesh=dp2", [fast, dataclasses.replace(fast, seconds=1.0, peak=2**31)])
    assert line.startswith("mesh=dp2: 1000.0 ms, 512 tokens/s a GPU, MFU ")  # 2·2·256 tokens a second on two GPUs
    assert "peak 1.0–2.0 GiB, computing 400.0 ms, collectives 100.0 ms, not hidden 50.0 ms, idle 50.0 ms" in line
    assert f"planned {plan(case).time.step * 1e3:.1f} ms" in line
    for changes in ({"pure": True}, {"documents": 100}):
        assert "planned" not in report(dataclasses.replace(case, **changes), "", [fast])
