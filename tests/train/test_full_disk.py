"""A run on a disk that is really full for a while: a small file system of its own."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PROGRAM = textwrap.dedent("""
    import json, os, sys
    from pathlib import Path
    from qwen3f.stages.configs import pretrain_config
    from qwen3f.train.loop import run
    from qwen3f.train.step import make_train_step

    place, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    filler = place / "filler"

    def fill():
        with filler.open("wb", buffering=0) as file:
            for size in (2**16, 2**8, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass
        assert os.statvfs(place).f_bavail == 0

    def filling(*args):
        step = make_train_step(*args)
        def wrapped(state, batch):
            if int(state.step) == 12:
                fill()
            if int(state.step) == 45:
                filler.unlink()
            return step(state, batch)
        return wrapped

    config = pretrain_config("nano")
    config.update_from_flattened_dict(changes)
    run(config, place / "w", progress=False, make_step=filling)
""")


@pytest.fixture
def run_on_small_disk(make, tmp_path):
    """run(**changes of the config) -> (the finished process, a copy of the workdir)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=8m none {disk}"
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")

    def run(**changes):
        config = make(
            steps=60, log_every=1, **{"eval.every": 0, "checkpoint.keep": 0, "checkpoint.every": 10, **changes}
        )
        config.checkpoint.asynchronous = False
        flat = {}
        for key, value in config.to_dict().items():
            flat |= {f"{key}.{name}": x for name, x in value.items()} if isinstance(value, dict) else {key: value}
        command = (
            f'{mount} && {{ "{sys.executable}" -c "$0" {disk} "$1"; code=$?; cp -r {disk}/w {tmp_path}/; exit $code; }}'
        )
        done = subprocess.run(
            [*namespace, command, PROGRAM, json.dumps(flat)], capture_output=True, text=True, timeout=200
        )
        return done, tmp_path / "w"

    return run


def test_going_on_loses_no_line_and_no_event(run_on_small_disk):
    done, workdir = run_on_small_disk(**{"checkpoint.on_failure": "go_on"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "step 20 could not be written" in done.stdout
    assert "No space left on device" in done.stdout
    assert done.stdout.count("could not be written") == 3  # at 20, 30 and 40
    assert done.stdout.count("cannot be written") == done.stdout.count("is written again") == 2
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    events = EventAccumulator(str(workdir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 61))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "50", "60"]
