"""metrics.jsonl in every state that a run may leave it in."""

from itertools import pairwise

import pytest

from qwen3f.report import metrics_file as F


def read(path, text, **options):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return F.read_metrics(path, **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_a_last_line_that_is_half_written_is_left_out(path):
    found = read(path, '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    assert found.series["loss"] == F.Series((1, 2), (2.5, 2.0))
    assert (found.lines, found.broken, found.last_step) == (2, 0, 2)


def test_what_is_no_finite_number_is_counted_and_no_point_of_a_curve(path):
    found = read(path, '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 3, "loss": null}\n'
                       '{"step": 4, "loss": 1, "text": "x", "yes": true, "list": [1]}\n')  # fmt: skip
    assert found.series == {"loss": F.Series((4,), (1.0,), missing=3)}


def test_a_number_that_no_float_holds_is_no_finite_one_and_no_step(path):
    huge = 10**400
    found = read(path, f'{{"step": 1, "loss": {huge}}}\n{{"step": 2, "loss": 1.5}}\n{{"step": {huge}, "loss": 1.5}}\n')
    assert found.series == {"loss": F.Series((2,), (1.5,), missing=1)}
    assert found.broken == 1


def test_broken_lines_are_counted(path):
    found = read(
        path, b'{"step": 1, "loss": 1}\nrubbish\n[1]\n{"loss": 1}\n{"step": "2"}\n\xff\xfe\n{"step": 9, "loss": 2}\n'
    )
    assert found.broken == 5
    assert found.series["loss"].steps == (1, 9)


@pytest.mark.parametrize("text", ["", "\n", '{"step": 1'])
def test_an_empty_file_and_none_have_no_series(path, text):
    assert F.read_metrics(path) == F.NO_METRICS
    assert read(path, text).series == {}


def test_a_run_that_went_back_is_shown_as_it_went_the_second_time(path):
    lines = [f'{{"step": {s}, "loss": {s}}}\n' for s in (1, 2, 3, 4)] + ['{"step": 3, "loss": 9}\n']
    assert read(path, "".join(lines)).series["loss"] == F.Series((1, 2, 3), (1.0, 2.0, 9.0))


def test_of_a_million_lines_some_are_read_evenly_with_every_evaluation_and_both_ends(path):
    lines = [b'{"step": %d, "loss": 1.5}\n' % step for step in range(1, 1_000_001)]
    for step in (123_457, 999_999):
        lines[step - 1] = b'{"step": %d, "loss": 1.5, "val_loss": 2.5}\n' % step
    found = read(path, b"".join(lines))
    assert found.lines == 1_000_000
    assert found.parsed <= F.MOST_LINES + 2
    assert found.series["val_loss"].steps == (123_457, 999_999)
    steps = found.series["loss"].steps
    assert (steps[0], steps[-1]) == (1, 1_000_000)
    assert max(b - a for a, b in pairwise(steps)) <= 202


def test_an_evaluation_that_lies_across_two_blocks_is_found(path, monkeypatch):
    monkeypatch.setattr(F, "_BLOCK", 64)
    lines = [
        b'{"step": %d, "loss": 1.5%s}\n' % (s, b', "val_loss": 2.0' if s % 50 == 0 else b"") for s in range(1, 1001)
    ]
    found = read(path, b"".join(lines), most=100)
    assert found.series["val_loss"].steps == tuple(range(50, 1001, 50))


def test_so_many_evaluations_are_thinned_out_too(path):
    lines = [b'{"step": %d, "val_loss": 1.5}\n' % step for step in range(1, 3001)]
    found = read(path, b"".join(lines), most=100)
    assert found.parsed <= 200
    assert (found.series["val_loss"].steps[0], found.last_step) == (1, 3000)
