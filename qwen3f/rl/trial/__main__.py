"""Does reinforcement teach a tiny model more than other training in the same time? Arguments are key=value …

    python -m qwen3f.rl.trial kinds=sorting base_seconds=60 start_steps=230 minutes=2.5 out=runs/trial

A base is pretrained on other texts, once for all seeds. From it each seed makes a cold start: fine-tuning on few worked
solutions, at one learning rate after the other, until held-out accuracy stops growing. Its best checkpoint is the start
of three arms, which run for the same number of minutes:

- GRPO on many questions with known answers but no solutions; its last weights count.
- More fine-tuning on the same solutions; the checkpoint with the best held-out accuracy counts, or the cold start's.
- Rounds of rejection sampling on the same questions as GRPO; likewise.

All of them then answer new held-out questions, greedily and at temperature 1. Results: out/trial.json, and a table.
Keys: qwen3f/rl/trial/settings.py. Commands for larger machines: qwen3f/rl/trial/README.md.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3f.errors import TrainingError, UserError
from qwen3f.processes.parent import end_with
from qwen3f.rl.trial.settings import parse
from qwen3f.rl.trial.table import table

Job = tuple[str, str, str, int]  # form, directory, start, seed


def main(words: Sequence[str]) -> dict[str, Any]:
    trial = parse(words)
    out = Path(trial.out).resolve()
    if (out / "trial.json").exists():
        raise UserError(f"out={trial.out} has a trial already: choose another directory")
    began = time.time()
    base = trial.base or str(out / "base")
    if not trial.base:
        _run([("base", base, "", 0)], words, together=False)
    based = time.time()
    starts = {seed: out / f"start-{seed}" for seed in trial.seeds}
    _run([("start", str(place), base, seed) for seed, place in starts.items()], words, trial.together)
    started = time.time()
    places = {(arm, seed): out / f"{arm}-{seed}" for seed in trial.seeds for arm in trial.arms}
    begun = {seed: json.loads((place / "result.json").read_text())["weights"] for seed, place in starts.items()}
    jobs = [(arm, str(place), begun[seed], seed) for (arm, seed), place in places.items()]
    _run(jobs, words, trial.together)
    results = [json.loads((place / "result.json").read_text()) for place in (*starts.values(), *places.values())]
    seconds = {"base": based - began, "starts": started - based, "arms": time.time() - started}
    found = {"settings": list(words), "seconds": seconds, "results": results}
    (out / "trial.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)), flush=True)
    return found


def _run(jobs: Sequence[Job], words: Sequence[str], together: bool) -> None:
    """Runs each job in its own process, with its output in DIRECTORY/log.

    together: run all at the same time, each with one thread, so that all have equal resources. Raises TrainingError if
    a job fails.
    """
    threads = {"OMP_NUM_THREADS": "1"} if together else {}
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    for job in jobs:
        form, place, start, seed = job
        Path(place).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "qwen3f.rl.trial.arm", form, place, start, str(seed), json.dumps(list(words))]
        with (Path(place) / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, str(time.time())],
                stdout=log,
                stderr=log,
                env={**os.environ, **threads},
                preexec_fn=functools.partial(end_with, os.getpid()),
            )
        running.append((job, process))
        if not together:
            process.wait()
    failed = [job for job, process in running if process.wait()]
    if failed:
        form, place, _, seed = failed[0]
        end = "\n".join((Path(place) / "log").read_text(errors="replace").splitlines()[-15:])
        raise TrainingError(f"{form} of seed {seed} failed; the end of {place}/log:\n{end}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
