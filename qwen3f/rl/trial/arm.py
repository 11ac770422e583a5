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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ml_collections import ConfigDict

from qwen3f import cli
from qwen3f.eval import rejection
from qwen3f.rl.trial import settings as S

METRICS = "metrics.jsonl"
LOOKS = 0.2  # seconds between two looks at whether a stage is to stop
Curve = list[tuple[int, float]]  # (step, held-out accuracy) wherever it was measured


def main(form: str, out: Path, start: str, seed: int, trial: S.Trial, began: float) -> None:
    """Runs it, and for what is measured writes out/result.json."""
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
    """A stage of training, to its last step or until it is over."""
    with stopping(over):
        cli.run_stage(config, workdir, False)


def after(until: float) -> Callable[[], bool]:
    return lambda: time.time() >= until


@contextlib.contextmanager
def stopping(over: Callable[[], bool]) -> Iterator[None]:
    """Asks this process's stage to stop once that is so, or as soon after it as it listens."""
    done = threading.Event()

    def pass_over(number: int, frame: FrameType | None) -> None:
        """A signal that comes just after the stage has ended is for nobody."""

    def wait() -> None:
        while not over() or signal.getsignal(signal.SIGTERM) is pass_over:  # or the stage does not listen yet
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
    """The cold start: fine-tuning at one rate after the other, each from the best checkpoint so far, until held-out
    accuracy has not grown for `patience` evaluations. Returns that checkpoint, and the curve at each rate.

    So more of the same fine-tuning has little to add, and what an arm adds is not what the cold start left out.
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
    """Whether none of the last `patience` values is above all before them; never while all are 0, before a model has
    its first answer right."""
    values = [value for _, value in measured]
    return len(values) > patience and max(values) > 0 and max(values[-patience:]) <= max(values[:-patience])


def reject(
    trial: S.Trial, out: Path, start: str, seed: int, until: float
) -> tuple[str, list[dict[str, Any]], list[Curve]]:
    """Rounds of rejection sampling until the time is out.

    Returns the best weights by held-out accuracy, the start's among them; what each round kept; and each one's curve.

    A round asks the weights that it has, keeps right answers, and fine-tunes the same weights on these and the worked
    solutions. The last round's fine-tuning is cut off by the time; a round without a right answer ends the arm.
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
            break  # the time was out before a step was done
        places.append(workdir)
        chosen = best([of(start), *places])
        for place in places[:-1]:  # what is neither the best nor gone on from
            if of(chosen) != place and (place / "checkpoints").exists():
                shutil.rmtree(place / "checkpoints")
        weights = str(workdir)
    return best([of(start), *places]), rounds, [curve(place) for place in places]


def curve(workdir: Path) -> Curve:
    place = workdir / METRICS
    written = place.read_text().splitlines(keepends=True) if place.exists() else []
    lines = [json.loads(line) for line in written if line.endswith("\n")]  # the last one may be on its way
    return [(line["step"], line["val_accuracy"]) for line in lines if "val_accuracy" in line]


def best(workdirs: Sequence[Path]) -> str:
    """Of all their checkpoints that are there and were measured, the one with the best held-out accuracy, the first of
    equals; without any, the last workdir."""
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
    """Of the checkpoints that are there."""
    place = workdir / "checkpoints"
    return {int(path.name) for path in place.iterdir() if path.name.isdigit()} if place.exists() else set()


def of(weights: str) -> Path:
    """The workdir of a checkpoint, or the workdir."""
    return Path(weights).parent.parent if Path(weights).parent.name == "checkpoints" else Path(weights)


if __name__ == "__main__":
    form, out, start, seed, written, began = sys.argv[1:]
    words = json.loads(written)
    main(form, Path(out), start, int(seed), S.parse(words), float(began))
