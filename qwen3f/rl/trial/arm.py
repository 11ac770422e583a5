"""One run of a trial in its own process: python -m qwen3f.rl.trial.arm FORM DIRECTORY START SEED SETTINGS BEGAN.

It runs the same stages as launch.py. BEGAN is the time at which the process was started; the time of an arm counts from
there. When the time is over, the process sends SIGTERM to itself: the stage ends after its current step, with a
checkpoint.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ml_collections import ConfigDict

from qwen3f import cli
from qwen3f.eval import rejection
from qwen3f.rl.trial import settings as S

METRICS = "metrics.jsonl"
LOOKS = 0.2  # seconds between two checks of whether a stage must stop
Curve = list[tuple[int, float]]  # (step, held-out accuracy) of each evaluation


def main(form: str, out: Path, start: str, seed: int, trial: S.Trial, began: float) -> None:
    """Runs one form of a trial; all forms but the base are measured, and write out/result.json."""
    from qwen3f.rl.trial.measure import measure

    until = began + 60 * trial.minutes
    out.mkdir(parents=True, exist_ok=True)
    if form == "base":
        run(S.base_config(trial), out, after(began + trial.base_seconds))
        return
    found: dict[str, Any] = {}
    if form == "start":
        weights, found["curves"] = plateau(trial, out, start, seed)
    elif form == "grpo":
        run(S.grpo_config(trial, start, seed), out / "w", after(until))
        weights, found["curve"] = str(out / "w"), curve(out / "w")
    elif form == "more_sft":
        run(S.more_sft_config(trial, start, seed), out / "w", after(until))
        weights, found["curve"] = best([of(start), out / "w"]), curve(out / "w")
    else:
        weights, found["rounds"], found["curves"] = reject(trial, out, start, seed, until)
    found |= {"seconds": time.time() - began, "weights": weights, "seed": seed, "arm": form}
    found |= measure(trial, weights)
    (out / "result.json").write_text(json.dumps(found, indent=1) + "\n")


def run(config: ConfigDict, workdir: Path, over: Callable[[], bool]) -> None:
    """Runs a stage of training to its last step, or until `over` returns True."""
    with stopping(over):
        cli.run_stage(config, workdir, False)


def after(until: float) -> Callable[[], bool]:
    return lambda: time.time() >= until


@contextlib.contextmanager
def stopping(over: Callable[[], bool]) -> Iterator[None]:
    """While the body runs: sends SIGTERM to this process once over() is True and the stage handles SIGTERM."""
    done = threading.Event()

    def pass_over(number: int, frame: FrameType | None) -> None:
        """Ignores a signal that arrives just after the stage has ended."""

    def wait() -> None:
        while not over() or signal.getsignal(signal.SIGTERM) is pass_over:  # the stage has no handler yet
            if done.wait(LOOKS):
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


def plateau(trial: S.Trial, out: Path, base: str, seed: int) -> tuple[str, list[Curve]]:
    """The cold start. Returns its best checkpoint, and the curve at each rate.

    Fine-tuning runs at one rate after the other, each from the best checkpoint so far, until held-out accuracy has not
    grown for `patience` evaluations. After that, more of the same fine-tuning gains little, so a gain of an arm does
    not come from a cold start that was stopped too early.
    """
    weights, curves = base, list[Curve]()
    places = [out / f"rate-{number}" for number in range(trial.start_rates)]
    for number, place in enumerate(places):
        run(S.start_config(trial, weights, seed, number), place, at_plateau(place, trial.patience))
        curves.append(curve(place))
        weights = best(places[: number + 1])
    for place in places:
        if place != of(weights) and place.exists():
            shutil.rmtree(place / "checkpoints")
    return weights, curves


def at_plateau(workdir: Path, patience: int) -> Callable[[], bool]:
    return lambda: flat(curve(workdir), patience)


def flat(measured: Curve, patience: int) -> bool:
    """Whether none of the last `patience` values exceeds all values before them. False while all values are 0."""
    values = [value for _, value in measured]
    return len(values) > patience and max(values) > 0 and max(values[-patience:]) <= max(values[:-patience])


def reject(
    trial: S.Trial, out: Path, start: str, seed: int, until: float
) -> tuple[str, list[dict[str, Any]], list[Curve]]:
    """Rounds of rejection sampling until the time is over.

    A round samples answers from the current weights, keeps the right ones, and fine-tunes the same weights on these and
    the worked solutions. The end of the time stops the fine-tuning of the last round. A round without a right answer
    ends the arm.

    Returns the best weights by held-out accuracy (the start counts too), the counts of each round, and its curve.
    """
    weights, rounds, places = start, [], list[Path]()
    while time.time() < until:
        number = len(rounds) + 1
        chats, workdir = out / f"samples-{number}", out / f"round-{number}"
        summary = rejection.run(S.sample_config(trial, weights, str(chats), seed, number), out, False)
        counts = summary["counts"]
        rounds.append({"sampled_at": time.time(), **{key: counts[key] for key in ("asked", "right", "kept")}})
        if not counts["kept"] or time.time() >= until:
            break
        run(S.round_config(trial, weights, str(chats), seed + number), workdir, after(until))
        if not steps(workdir):
            break  # the time was over before the first checkpoint
        places.append(workdir)
        chosen = best([of(start), *places])
        for place in places[:-1]:  # delete checkpoints that are neither the best nor the last
            if of(chosen) != place and (place / "checkpoints").exists():
                shutil.rmtree(place / "checkpoints")
        weights = str(workdir)
    return best([of(start), *places]), rounds, [curve(place) for place in places]


def curve(workdir: Path) -> Curve:
    place = workdir / METRICS
    written = place.read_text().splitlines(keepends=True) if place.exists() else []
    lines = [json.loads(line) for line in written if line.endswith("\n")]  # the last line may be incomplete
    return [(line["step"], line["val_accuracy"]) for line in lines if "val_accuracy" in line]


def best(workdirs: Sequence[Path]) -> str:
    """The checkpoint of these workdirs with the best held-out accuracy, the first of equals. Only checkpoints that
    exist and were evaluated count; without any, the last workdir."""
    measured = [
        (value, -number, -step)
        for number, workdir in enumerate(workdirs)
        for step, value in curve(workdir)
        if step in steps(workdir)
    ]
    if not measured:
        return str(workdirs[-1])
    _, number, step = max(measured)
    return str(workdirs[-number] / "checkpoints" / str(-step))


def steps(workdir: Path) -> set[int]:
    """The steps of the checkpoints that exist."""
    place = workdir / "checkpoints"
    return {int(path.name) for path in place.iterdir() if path.name.isdigit()} if place.exists() else set()


def of(weights: str) -> Path:
    """The workdir of a checkpoint; a workdir itself is returned as it is."""
    return Path(weights).parent.parent if Path(weights).parent.name == "checkpoints" else Path(weights)


if __name__ == "__main__":
    form, out, start, seed, written, began = sys.argv[1:]
    words = json.loads(written)
    main(form, Path(out), start, int(seed), S.parse(words), float(began))
