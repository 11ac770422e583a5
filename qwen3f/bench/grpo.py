"""Compares a step of GRPO with TRL's: python -m qwen3f.bench.grpo [--preset=qwen3-0.6b] [--prompts=16] [--new=512]

Ours is stages/grpo.py as launch.py runs it (its prepare, objective and donated step; without checkpoints and
evaluation): float32 master weights, bfloat16 passes, rewards in processes, log-probs of the trainer in a pass of their
own. Weights are random at a released model's shape, and the vocabulary is made on the spot, so nearly every completion
has the full length. Prompts are generated problems.

The peer is TRL's GRPOTrainer with its transformers backend: the same prompts, samples, lengths and weights. It has pure
bfloat16 (no master weights), a reward that costs nothing, and no recomputation; it computes no old log-probs, which is
its default. Times are medians over the steps after the first.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qwen3f import params as P
from qwen3f import presets
from qwen3f.bench.report import Report, busy_share, device_of, peak_gib, reset_peak, synchronize
from qwen3f.bench.transformers_model import copied
from qwen3f.bench.vocabulary import transformers_tokenizer, write_tokenizer
from qwen3f.data.loader import Loader
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.processes.world import ALONE
from qwen3f.rl.questions import ask
from qwen3f.rl.tasks import find_tasks
from qwen3f.stages import grpo
from qwen3f.stages.configs import grpo_config
from qwen3f.train.setup import Setup, make_setup
from qwen3f.train.stage import Run
from qwen3f.train.state import from_params
from qwen3f.train.step import make_train_step


def make_config(asked: argparse.Namespace, tokenizer: Path) -> Any:
    """The configuration of the stage, with a KV cache for all completions at once."""
    config = grpo_config(asked.preset)
    config.device, config.seed = asked.device, 0
    config.batch_size, config.steps, config.seq_len = asked.prompts, 1000, asked.seq_len
    config.data.tokenizer = str(tokenizer)
    config.data.max_samples = 4096
    config.rollout.update(samples=asked.samples, max_new_tokens=asked.new, microbatch_rows=asked.rows)
    config.rollout.rows = min(512, asked.prompts * asked.samples)
    config.rollout.cache_tokens = max(65_536, config.rollout.rows * (asked.new + 256))
    config.judge.processes = asked.judges
    config.eval.questions = 0
    return config


def measure_ours(setup: Setup, place: Path, steps: int, idle: bool) -> dict[str, Any]:
    run = Run(setup, place, ALONE, False, lambda: False)
    stage = grpo.make(run)
    options = setup.step_options(stage.updates, microbatch_rows=stage.microbatch_rows, donate=True)
    step = make_train_step(setup.model, stage.objective, options)
    state = from_params(setup.model, weights(setup), 0, setup.optimizer)
    history: list[dict[str, float]] = []

    with Loader(stage.dataset, setup.config.batch_size, 0, 0, setup.device, setup.model.vocab_size) as loader:

        def one_step() -> None:
            nonlocal state
            begin = time.perf_counter()
            rows = stage.prepare(state, next(loader), lambda: next(loader))
            synchronize(setup.device)
            prepared = time.perf_counter()
            state, _ = step(state, rows)
            synchronize(setup.device)
            end = time.perf_counter()
            history.append(
                {**stage.figures(rows), "step": end - begin, "prepare": prepared - begin, "update": end - prepared}
            )

        one_step()
        reset_peak(setup.device)
        first = time.perf_counter()
        for _ in range(steps):
            one_step()
        print(f"ours: {steps} steps in {time.perf_counter() - first:.1f} s", flush=True)
        timed, peak = history[1:], peak_gib(setup.device)
        busy = busy_share(one_step, setup.device) if idle else None
    stage.finish(state, None)
    of = {name: statistics.median(one[name] for one in timed) for name in timed[0]}
    completions = setup.config.batch_size * setup.config.rollout.samples
    tokens = of["completion_tokens"] * completions
    others = of["prepare"] - of["rollout_seconds"] - of["reward_seconds"]
    return {
        "step_s": of["step"],
        "tokens_a_completion": of["completion_tokens"],
        "step_tokens_s": tokens / of["step"],
        "rollout_tokens_s": of["rollout_tokens_per_sec"],
        "rollout": of["rollout_seconds"] / of["step"],
        "rewards": of["reward_seconds"] / of["step"],
        "log_probs_and_packing": others / of["step"],
        "update": of["update"] / of["step"],
        "gpu_idle": None if busy is None else 1 - busy,
        "peak_gib": peak,
        "sampler_gap": of.get("sampler_gap"),
    }


def weights(setup: Setup) -> P.Params:
    return P.init_params(setup.model, 0, device=setup.device, dtype=setup.master_dtype)


def measure_trl(setup: Setup, place: Path, asked: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    device, total = setup.device, asked.prompts * asked.samples
    on_gpu = device.type == "cuda"
    model = copied(setup.model, {path: leaf.to(setup.compute_dtype) for path, leaf in weights(setup).items()})
    tokenizer = load_tokenizer(setup.config.data.tokenizer, "")
    questions = ask(find_tasks(setup), tokenizer, True, setup.config.seq_len, asked.prompts * 2)
    prompts = [tokenizer.decode(list(one.ids)) for one in questions.asked[: asked.prompts * 2]]
    ends, sampled = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize(device)
            ends.append(time.perf_counter())

    each = min(asked.trl_rows, total)
    args = GRPOConfig(
        output_dir=str(place / "trl"), per_device_train_batch_size=each, gradient_accumulation_steps=total // each,
        num_generations=asked.samples, max_completion_length=asked.new, max_steps=1 + asked.trl_steps, beta=0.0,
        temperature=1.0, learning_rate=1e-6, bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_steps=100, use_vllm=False, optim="adamw_torch_fused",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=transformers_tokenizer(Path(setup.config.data.tokenizer)),
        callbacks=[Clock()],
    )
    trainer._generate_single_turn = _timed(trainer._generate_single_turn, sampled, device)
    reset_peak(device)
    trainer.train()
    step = (ends[-1] - ends[0]) / (len(ends) - 1)
    seconds, tokens = (statistics.median(values) for values in zip(*sampled[1:]))
    return {
        "step_s": step,
        "tokens_a_completion": tokens / total,
        "step_tokens_s": tokens / step,
        "rollout_tokens_s": tokens / seconds,
        "rollout": seconds / step,
        "peak_gib": peak_gib(device),
    }


def _timed(generate: Callable[..., Any], out: list[tuple[float, int]], device: torch.device) -> Callable[..., Any]:
    """`generate`, which appends (seconds, tokens of the completions) of each call to `out`."""

    def timed(*args: Any, **named: Any) -> Any:
        synchronize(device)
        begin = time.perf_counter()
        found = generate(*args, **named)
        synchronize(device)
        out.append((time.perf_counter() - begin, sum(map(len, found[0]))))
        return found

    return timed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="ours,trl", help="some of ours, trl")
    parser.add_argument("--preset", default="qwen3-0.6b")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step")
    parser.add_argument("--samples", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--new", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--seq_len", type=int, default=4096, help="tokens of our packed rows")
    parser.add_argument("--rows", type=int, default=4, help="rows of our micro-batch")
    parser.add_argument("--judges", type=int, default=4, help="our reward processes")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of ours")
    parser.add_argument("--no_idle", action="store_true", help="do not profile a step for the GPU's idle share")
    parser.add_argument("--trl_rows", type=int, default=16, help="completions of TRL's micro-batch")
    parser.add_argument("--trl_steps", type=int, default=1, help="timed steps of TRL")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(arguments)
    device = device_of(asked.device)
    report = Report("GRPO", device)
    names = {"case": f"{asked.preset}, {asked.prompts} × {asked.samples} × {asked.new}"}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_tokenizer(place / "tokenizer", presets.get(asked.preset).vocab_size)
        setup = make_setup(make_config(asked, place / "tokenizer"))
        if "ours" in asked.cases.split(","):
            report.add(**names, who="qwen3f", **measure_ours(setup, place, asked.steps, not asked.no_idle))
        reset_peak(device)
        if "trl" in asked.cases.split(","):
            report.peer({**names, "who": "TRL"}, "trl", lambda: measure_trl(setup, place, asked))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
