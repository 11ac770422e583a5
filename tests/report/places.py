"""Writes directories as runs and pipelines leave them, with made-up numbers, and a text that no run would write."""

import json
import shutil

from qwen3f.eval.statistics import wilson

HOSTILE = "</style></svg><script>alert(1)</script><img src=x onerror=alert(2)> &amp; {{ 7 * 7 }}"


def measure(right, n=64):
    low, high = wilson(right, n)
    return {"value": right / n, "low": low, "high": high, "n": n}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(place, steps=30, stage="sft", text="right", **config):
    """Write a run with a few metrics, whose answers say `text`. Returns its directory."""
    lines = [{"step": s, "loss": 5 / s, "lr": 1e-3, "tokens_per_sec": 900.0, "mfu": 0.3} for s in range(1, steps + 1)]
    for step in (steps // 2, steps):
        lines[step - 1] |= {"val_loss": 4 / step, "val_accuracy": 0.5, "val_well_formed": 1.0}
        answers = [
            {"evaluation": "val", "mode": "thinking", "number": i, "mark": float(i % 2), "formed": True, "ended": True,
             "prompt": f"{text} {i}?", "gold": text, "text": f"<think>\n{text}\n</think>\n\n{text}"}
            for i in range(4)
        ]  # fmt: skip
        write_lines(place / "answers" / f"step-{step:08d}.jsonl", answers)
    write_lines(place / "metrics.jsonl", lines)
    told = {
        "stage": stage,
        "steps": steps,
        "init_from": "",
        "model": {"hidden_size": 32},
        "eval": {"modes": "thinking"},
    }
    (place / "config.json").write_text(json.dumps(told | config))
    (place / "run.json").write_text(json.dumps({"lines": [text], "commit": text, "sessions": [{"seconds": 9.5}]}))
    return place


def write_pipeline(place, runs, names=None):
    """Write a pipeline. runs: directories to copy; each is a stage that starts from the one before."""
    stages, before = [], None
    for number, run in enumerate(runs, 1):
        folder = f"{number:02d}_{run.name}"
        shutil.copytree(run, place / folder, dirs_exist_ok=True)
        name = names[number - 1] if names else run.name
        stages.append({
            "name": name, "purpose": "learns something", "experiment": "experiments/x.py:nano",
            "overrides": {"steps": 3},
            "workdir": folder, "from": before, "init_from": None, "inputs": "", "status": "done", "error": "",
            "started": 1.0, "seconds": 60.0 * number, "steps": 3,
            "measures": {"reasoning_thinking": measure(6 * number),
                         "val_loss/text": {"value": 3.0 / number, "low": None, "high": None, "n": None}},
        })  # fmt: skip
        before = name
    told = {"preset": "nano", "seed": 0, "commit": "abc", "budget_s": 1680, "stages": stages}
    (place / "pipeline.json").write_text(json.dumps(told))
    return place
