"""The logger: each step once in metrics.jsonl, TensorBoard, wandb and the bar, also after a resume."""

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import tracemalloc
from collections import defaultdict

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qwen3f.errors import UserError
from qwen3f.train import event_file, patient_file
from qwen3f.train.logger import MetricLogger


def make_logger(workdir, start_step=0, total_steps=10, **kwargs):
    kwargs = {"run_config": {}, "progress": False} | kwargs
    return MetricLogger(workdir, total_steps=total_steps, start_step=start_step, **kwargs)


def lines(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_metrics_jsonl_holds_valid_json_at_once(tmp_path):
    with make_logger(tmp_path / "new" / "w") as logger:
        logger.log(1, {"loss": 2.5, "tokens_seen": 2**60})
        assert lines(tmp_path / "new" / "w") == [{"step": 1, "loss": 2.5, "tokens_seen": 2**60}]  # flushed
        logger.log(3, {"loss": float("nan"), "grad_norm": float("inf"), "lr": -float("inf")})
    assert lines(tmp_path / "new" / "w")[1] == {"step": 3, "loss": None, "grad_norm": None, "lr": None}


def test_a_step_is_logged_once_and_in_order(tmp_path):
    with make_logger(tmp_path) as logger:
        logger.log(2, {"loss": 1.0})
        for step in (2, 1):
            with pytest.raises(ValueError, match=f"step {step} is logged after step 2"):
                logger.log(step, {"loss": 1.0})
    with (
        make_logger(tmp_path, start_step=2) as logger,
        pytest.raises(ValueError, match="step 2 is logged after step 2"),
    ):
        logger.log(2, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 2, "loss": 1.0}]


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    with make_logger(tmp_path) as logger:
        for step in (2, 4, 6, 8):
            logger.log(step, {"loss": 0.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a process killed while it wrote
    with make_logger(tmp_path, start_step=5) as logger:
        assert lines(tmp_path) == [{"step": 2, "loss": 0.0}, {"step": 4, "loss": 0.0}]
        logger.log(6, {"loss": 1.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 0.0), (4, 0.0), (6, 1.0)]
    assert not list(tmp_path.glob("*.tmp"))
    with make_logger(tmp_path, start_step=6):
        pass
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    with make_logger(tmp_path, start_step=0):  # killed before its first checkpoint: begins again
        assert lines(tmp_path) == []


def test_a_long_metrics_file_is_not_read_whole(tmp_path):
    with make_logger(tmp_path):
        pass  # imports what it needs
    line = '{"step": %d, "loss": 1.2345678901234567, "note": "' + 200 * "x" + '"}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(line % (n + 1) for n in range(8000)))
    tracemalloc.start()
    try:
        with make_logger(tmp_path, start_step=6000, total_steps=9000):
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    left = (tmp_path / "metrics.jsonl").read_text()
    assert left == "".join(line % (n + 1) for n in range(6000))
    assert peak < len(left) / 2


def test_a_foreign_metrics_file_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nmy notes\n')
    with pytest.raises(UserError, match=r'metrics\.jsonl, line 2 is not a JSON object with a "step"'):
        make_logger(tmp_path, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\nmy notes\n'


def test_tensorboard_scalars_text_and_purge(tmp_path, monkeypatch):
    monkeypatch.setattr(event_file, "_numbers", itertools.count(9))  # files 9 and 10: the reader sorts their names
    with make_logger(tmp_path) as logger:
        for step in (1, 2, 3, 4):
            logger.log(step, {"loss": 1.0 * step, "val/loss": 0.5})
        logger.text(4, "sample", "def f():\n    return 1")
    with make_logger(tmp_path, start_step=2) as logger:
        logger.log(3, {"loss": 30.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(1, 0.5), (2, 0.5)]
    with make_logger(tmp_path / "text") as logger:
        logger.text(7, "sample", "def f():\n    return 1")
    events = EventAccumulator(str(tmp_path / "text" / "tensorboard")).Reload()
    (event,) = events.Tensors("sample/text_summary")
    assert event.step == 7
    assert event.tensor_proto.string_val == [b"    def f():\n        return 1"]


def test_wandb_offline_writes_into_workdir_and_stays_off_the_network(tmp_path):
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {
            "WANDB_ERROR_REPORTING": "true",
            "WANDB_BASE_URL": url,
            "HTTPS_PROXY": url,
            "HTTP_PROXY": url,
            "HOME": str(tmp_path / "home"),
        }
        code = f"""
from pathlib import Path
from qwen3f.train import event_file, patient_file
from qwen3f.train.logger import MetricLogger
for start in (0, 1):
    with MetricLogger(Path({str(tmp_path / "w")!r}), total_steps=3, start_step=start, wandb_mode="offline",
                      run_config={{"model": {{"hidden_size": 64}}}}, progress=False) as logger:
        for step in range(start + 1, 4):
            logger.log(step, {{"loss": 12.125 + step, "nan": float("nan")}})
"""
        run = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=60
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout + run.stderr == ""
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()  # nobody called
    runs = sorted((tmp_path / "w" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in runs}) == 1  # the resumed run has the same id
    losses = []
    for records in map(read_wandb, runs):
        rows = [
            {item.nested_key[0]: json.loads(item.value_json) for item in r.history.item} for r in records["history"]
        ]
        losses.append([(row["step"], row["loss"]) for row in rows])
        assert [(r.metric.glob_name, r.metric.step_metric) for r in records["metric"] if r.metric.glob_name] == [
            ("*", "step")
        ]
    assert losses == [[(1, 13.125), (2, 14.125), (3, 15.125)], [(2, 14.125), (3, 15.125)]]


def read_wandb(path):
    """A .wandb file's records by type: protobuf in LevelDB's log format, all within the first of its blocks here."""
    from wandb.proto import wandb_internal_pb2

    data, at, records = path.read_bytes(), 7, defaultdict(list)
    assert len(data) < 32768
    while at < len(data):
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])  # after 4 bytes of checksum
        assert kind == 1  # a whole record
        record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        records[record.WhichOneof("record_type")].append(record)
    return records


def test_wandb_errors_name_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"config\.wandb is 'on': write one of off, offline, online"):
        make_logger(tmp_path / "w", wandb_mode="on")
    imports = builtins.__import__

    def without_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb"):
        make_logger(tmp_path / "w", wandb_mode="offline")
    assert not (tmp_path / "w").exists()
    with make_logger(tmp_path / "w"):  # not needed when off
        pass


def test_wandb_without_a_key_says_so_and_drops_nothing(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    with make_logger(tmp_path) as logger:
        logger.log(7, {"loss": 1.0})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no login is stored there
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"wandb can't start .*: run `wandb login`"):
        make_logger(tmp_path, start_step=2, wandb_mode="online")
    assert lines(tmp_path) == [{"step": 7, "loss": 1.0}]


def test_progress_bar_shows_loss_speed_and_time_left(tmp_path, capfd):
    with make_logger(tmp_path, start_step=4, total_steps=8, progress=True) as logger:
        logger._bar.mininterval = 0
        logger.advance(5)
        logger.advance(6, loss=2.34567, tokens_per_sec=7812.0)
        logger.write("a \x1b[1mline beside the bar")
        logger.advance(8, loss=1.5)
    out, err = capfd.readouterr()
    assert out == "a \\x1b[1mline beside the bar\n"
    assert " 50%|" in err
    assert "step 4/8" in err
    assert "step 6/8, loss 2.3457, 7.8k tokens/s [00:00<" in err
    assert err.rstrip().split("\r")[-1].startswith("100%|")
    assert "step 8/8, loss 1.5000, 7.8k tokens/s [" in err
    with make_logger(tmp_path, start_step=4, progress=False) as logger:
        logger.advance(5, loss=1.0)
    assert capfd.readouterr() == ("", "")


def test_what_was_open_closes_when_the_rest_fails(tmp_path, monkeypatch):
    from qwen3f.train import logger as module

    def fail(*args):
        raise ImportError("no tensorboard")

    monkeypatch.setattr(module, "EventFile", fail)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ImportError, match="no tensorboard"):
        make_logger(tmp_path, start_step=1)
    assert os.listdir("/proc/self/fd") == before


@contextlib.contextmanager
def full(monkeypatch, room, error=errno.ENOSPC):
    """Inside, every write and every new file fails after `room` bytes were written."""
    left, write, opened = [room], os.write, os.open

    def writing(file, content):
        if left[0] == 0:
            raise OSError(error, os.strerror(error))
        taken = write(file, bytes(content)[: left[0]])
        left[0] -= taken
        return taken

    def opening(path, flags, *more):
        if left[0] == 0 and not os.path.exists(path):
            raise OSError(error, os.strerror(error), str(path))
        return opened(path, flags, *more)

    with monkeypatch.context() as patch:
        patch.setattr(patient_file.os, "write", writing)
        patch.setattr(patient_file.os, "open", opening)
        yield


@pytest.mark.parametrize("room", [0, 1, 40, 200])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_what_a_full_disk_does_not_take_comes_when_there_is_room(tmp_path, monkeypatch, capsys, room, error):
    with make_logger(tmp_path) as logger:
        logger.log(1, {"loss": 1.0})
        with full(monkeypatch, room, error):
            logger.log(2, {"loss": 2.0})
            logger.text(2, "sample", "a text")
            logger.image(2, "load", torch.zeros(4, 4, 3, dtype=torch.uint8))
            logger.log(3, {"loss": 3.0})
            said = capsys.readouterr().out
            assert f"metrics.jsonl cannot be written ({os.strerror(error)}); its records wait in memory" in said
            assert said.count("cannot be written") == 2  # once for this file, once for TensorBoard's
            assert [line["step"] for line in lines(tmp_path)] in ([1], [1, 2])  # and no torn line
        logger.log(4, {"loss": 4.0})
        assert capsys.readouterr().out.count("is written again") == 2
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(step, float(step)) for step in (1, 2, 3, 4)]
    assert [event.step for event in events.Images("load")] == [2]
    assert [event.step for event in events.Tensors("sample/text_summary")] == [2]


def test_a_disk_that_stays_full_is_said_at_the_end(tmp_path, monkeypatch, capsys):
    with full(monkeypatch, 0), make_logger(tmp_path) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": 1.0})
    said = capsys.readouterr().out
    assert "metrics.jsonl could not be written to the end; 3 of its records are lost" in said
    assert "cannot be written" in said


def test_going_back_needs_no_room(tmp_path, monkeypatch):
    with make_logger(tmp_path) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": 1.0})
    with full(monkeypatch, 0), make_logger(tmp_path, start_step=2):
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_what_waits_has_a_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patient_file, "_MOST", 25)
    with patient_file.PatientFile(tmp_path / "log", print) as file:
        with full(monkeypatch, 0):
            for number in range(5):
                file.write(b"record %d.\n" % number)
                file.flush()
        file.flush()
        assert (tmp_path / "log").read_bytes() == b"record 0.\nrecord 1.\n"
    assert "is written again; 3 of its records are lost" in capsys.readouterr().out


def test_a_console_on_a_full_disk_ends_nothing_and_a_reader_that_left_does(tmp_path, monkeypatch):
    class Full(io.StringIO):
        error = errno.ENOSPC

        def write(self, text):
            raise OSError(self.error, os.strerror(self.error))

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Full())
    with make_logger(tmp_path, progress=True, total_steps=3) as logger:
        logger._bar.mininterval = 0
        logger.write("a line")
        logger.advance(1, loss=1.0)
        logger.log(1, {"loss": 1.0})
        Full.error = errno.EPIPE
        with pytest.raises(BrokenPipeError):
            logger.write("a line")
        Full.error = errno.ENOSPC
    assert [line["step"] for line in lines(tmp_path)] == [1]
