"""Runs in place of launch.py in tests of pipelines: "trains" a hash at once, and fails where it is told to.

The weights are a hash of the steps, the settings and the weights at the start. So equal weights mean that the same work
was done. The environment variable TROUBLE names a file with "STAGE ACTION"; for the actions see `trouble`.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

STOP = []


def main():
    experiment, flags = (
        Path(sys.argv[2].partition(":")[0]).stem,
        dict(a.split("=", 1) for a in sys.argv[3:] if "=" in a),
    )
    workdir = Path(flags["--workdir"])
    if experiment == "eval":
        return evaluate(flags, workdir)
    if experiment == "generate":
        return show(flags)
    signal.signal(signal.SIGTERM, lambda *_: STOP.append(1))
    print(f"training {workdir.name}", flush=True)
    steps, checkpoints = int(flags["--config.steps"]), workdir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    first = max((int(path.name) for path in checkpoints.iterdir()), default=0)
    start = flags.get("--config.init_from", "")
    weights = json.loads((Path(start) / "manifest.json").read_text())["weights"] if start else "0"
    settings = sorted(
        key + value for key, value in flags.items() if key.startswith("--config.") and key != "--config.init_from"
    )
    if first:
        weights = json.loads((checkpoints / str(first) / "manifest.json").read_text())["weights"]
    for step in range(first + 1, steps + 1):
        trouble(workdir, step)
        weights = hashlib.sha256(f"{weights} {settings} {step}".encode()).hexdigest()
        (checkpoints / str(step)).mkdir()
        (checkpoints / str(step) / "manifest.json").write_text(json.dumps({"weights": weights}))
        if STOP:
            print(f"stopped after step {step}")
            return
    value = None if "NO_NUMBER" in os.environ else int(weights[:4], 16) / 65536
    line = {"step": steps, "val_loss": value, "val_loss/embedded": value, "val_loss/reasoning": value and value / 2}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def evaluate(flags, workdir):
    records = workdir / "records" / "reasoning.jsonl"
    head = {"model": str(Path(flags["--config.init_from"]).absolute()), "dtype": "float32"}
    if not records.exists():
        records.parent.mkdir(parents=True)
        records.write_text(json.dumps(head) + "\n")
    if json.loads(records.read_text().split("\n")[0]) != head:
        print(f"error: {records} holds answers by other settings", file=sys.stderr)
        sys.exit(2)
    trouble(workdir.parents[1] if workdir.parent.name == "measures" else workdir.parent, 99)
    weights = json.loads((Path(flags["--config.init_from"]) / "manifest.json").read_text())["weights"]
    right = int(weights[:2], 16) if flags["--config.thinking"] == "True" else int(weights[2:3], 16)
    metric = {
        "value": right / 256,
        "low": right / 300,
        "high": min(1, right / 200),
        "n": 2 * int(flags["--config.limit"]),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    results = {"benchmarks": {"reasoning": {"metrics": {"accuracy": metric}}}}
    (workdir / "results.json").write_text(json.dumps(results))


def show(flags):
    """Stands for the stage generate. Refuses a file that exists, as generate refuses answers of another model."""
    out = Path(flags["--config.out"])
    if out.exists():
        print(f"error: {out} holds another answer", file=sys.stderr)
        sys.exit(2)
    trouble(out.parent, 99)
    out.write_text(json.dumps({"answer": f"two\u2028lines of {out.stem}"}, ensure_ascii=False) + "\n")


def trouble(workdir, step):
    """Do what the file says, in the stage that it names: at step 2, or in measures if the action ends in "-asking"."""
    path = Path(os.environ.get("TROUBLE", "/nowhere"))
    stage, _, action = path.read_text().partition(" ") if path.is_file() else ("", "", "")
    wanted = 99 if action.endswith("-asking") else 2
    if not stage or not workdir.name.endswith(f"_{stage}") or step != wanted:
        return
    Path(f"{path}.reached").write_text(str(os.getpid()))
    action = action.removesuffix("-asking")
    if action == "wrong":
        key = "limit" if wanted == 99 else "batch_size"
        print(f"error: config.{key}=3 cannot be used; write --config.{key}=4", file=sys.stderr)
        sys.exit(2)
    if action == "disk":
        print("a bar 50%\rlog line", file=sys.stderr)
        print("error: No space left on device: make room; the same command goes on", file=sys.stderr)
        sys.exit(1)
    if action == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    while action == "hang" and not STOP:
        time.sleep(0.01)


if __name__ == "__main__":
    main()
