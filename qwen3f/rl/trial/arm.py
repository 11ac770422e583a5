"""One run of a trial in a process of its own: python -m qwen3f.rl.trial.arm FORM DIRECTORY START SEED SETTINGS.

It goes through the same stages as launch.py. The time of an arm is counted from the start of this process; when it is
out, the stage is asked to stop as by SIGTERM from outside: after the step it is in, with a checkpoint.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ml_collections import ConfigDict

from qwen3f import cli
from qwen3f.eval import rejection
from qwen3f.rl.trial import settings as S

METRICS = "metrics.jsonl"


def main(form: str, out: Path, start: str, seed: int, trial: S.Trial, began: float) -> None:
    """Runs it, and for what is measured writes out/result.json."""
    from qwen3f.rl.trial.measure import measure

    until = began + 60 * trial.minutes
    out.mkdir(parents=True, exist_ok=True)
    if form == "base":
        run(S.base_config(trial), out, began + trial.base_seconds)
        return
    found: dict[str, Any] = {}
    if form == "start":
        run(S.start_config(trial, start, seed), out / "w", float("inf"))
        weights = str(out / "w")
    elif form == "grpo":
        run(S.grpo_config(trial, start, seed), out / "w", until)
        weights, found["curve"] = str(out / "w"), curve(out / "w")
    elif form == "more_sft":
        run(S.more_sft_config(trial, start, seed), out / "w", until)
        weights, found["curve"] = best(out / "w"), curve(out / "w")
    else:
        weights, found["rounds"] = reject(trial, out, start, seed, until)
    found |= {"seconds": time.time() - began, "weights": weights, "seed": seed, "arm": form}
    found |= measure(trial, weights)
    (out / "result.json").write_text(json.dumps(found, indent=1) + "\n")


def run(config: ConfigDict, workdir: Path, until: float) -> None:
    """A stage of training, to its last step or until a time."""
    with stopping(until):
        cli.run_stage(config, workdir, False)


@contextlib.contextmanager
def stopping(until: float) -> Iterator[None]:
    """Asks this process's stage to stop at a time, or as soon after it as it listens."""
    done = threading.Event()

    def pass_over(number: int, frame: FrameType | None) -> None:
        """A signal that comes just after the stage has ended is for nobody."""

    def wait() -> None:
        if done.wait(min(max(0.0, until - time.time()), threading.TIMEOUT_MAX)):
            return
        while signal.getsignal(signal.SIGTERM) is pass_over:  # the stage does not listen yet
            if done.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, pass_over)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def reject(trial: S.Trial, out: Path, start: str, seed: int, until: float) -> tuple[str, list[dict[str, Any]]]:
    """Rounds of rejection sampling until the time is out: the weights, and what each round kept.

    A round asks the weights that it has, keeps right answers, and fine-tunes the same weights on these and the worked
    solutions. The last round's fine-tuning is cut off by the time; a round without a right answer ends the arm.
    """
    weights, rounds = start, []
    while time.time() < until:
        number = len(rounds) + 1
        chats, workdir = out / f"samples-{number}", out / f"round-{number}"
        summary = rejection.run(S.sample_config(trial, weights, str(chats), seed, number), out, False)
        counts = summary["counts"]
        rounds.append({"sampled_at": time.time(), **{key: counts[key] for key in ("asked", "right", "kept")}})
        if not counts["kept"] or time.time() >= until:
            break
        run(S.round_config(trial, weights, str(chats), seed + number), workdir, until)
        if not (workdir / "checkpoints").exists() or not any((workdir / "checkpoints").iterdir()):
            break  # the time was out before a step was done
        if number > 1:
            shutil.rmtree(weights)
        weights = str(workdir)
    return weights, rounds


def curve(workdir: Path) -> list[tuple[int, float]]:
    """(step, held-out accuracy) wherever it was measured."""
    lines = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]
    return [(line["step"], line["val_accuracy"]) for line in lines if "val_accuracy" in line]


def best(workdir: Path) -> str:
    """The checkpoint with the best held-out accuracy of those that are there; without one, the workdir."""
    there = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
    measured = [(value, step) for step, value in curve(workdir) if step in there]
    return str(workdir / "checkpoints" / str(max(measured)[1])) if measured else str(workdir)


if __name__ == "__main__":
    form, out, start, seed, written, began = sys.argv[1:]
    words = json.loads(written)
    main(form, Path(out), start, int(seed), S.parse(words), float(began))
