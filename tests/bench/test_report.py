"""If a peer fails, the report says so and keeps all other numbers."""

import json

import pytest
import torch

from qwen3f.bench.report import Report, busy_microseconds, busy_share, clock, peak_gib

CPU = torch.device("cpu")


def printed(capsys):
    out = capsys.readouterr().out
    return [json.loads(line) for line in out.splitlines() if line.startswith('{"')], out


def missing():
    raise ImportError("no such package")


def full():
    raise torch.OutOfMemoryError("full")


def broken():
    raise RuntimeError("it broke")


@pytest.mark.parametrize(
    "run, package, note, code",
    [
        (missing, "no_such_package", "no_such_package not installed", 0),
        (missing, "torch", "cannot import: no such package", 0),
        (full, "torch", "does not fit", 0),
        (broken, "torch", "failed: RuntimeError", 1),
    ],
)
def test_a_peer_that_fails_is_a_row(capsys, run, package, note, code):
    report = Report("some", CPU)
    report.add(who="ours", speed=2000.0, nothing=None)
    report.peer({"who": "theirs"}, package, run)
    assert report.finish() == code
    rows, out = printed(capsys)
    assert rows == [{"who": "ours", "speed": 2000.0}, {"who": "theirs", "note": note}]
    assert "| who | speed | note |\n|---|---|---|\n| ours | 2,000 |  |" in out
    assert f"| theirs |  | {note} |" in out


def test_a_clock_counts_calls():
    calls = []
    assert clock(lambda: calls.append(0), CPU, repeats=3, warm=2) > 0
    assert len(calls) == 5


def test_what_a_cpu_cannot_say_is_left_out():
    assert peak_gib(CPU) is None
    assert busy_share(lambda: None, CPU) is None


def test_busy_is_the_union_of_what_the_gpu_did():
    spans = [("kernel", 10.0, 5.0), ("gpu_memcpy", 12.0, 5.0), ("kernel", 30.0, 1.0), ("kernel", 30.25, 0.5)]
    others = [{"cat": "cpu_op", "ts": 0.0, "dur": 100.0}, {"ph": "M", "name": "process_name"}]
    events = [*others, *({"cat": cat, "ts": ts, "dur": dur} for cat, ts, dur in reversed(spans))]
    assert busy_microseconds(events) == 8.0
