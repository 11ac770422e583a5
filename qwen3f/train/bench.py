"""The training step's speed and memory on a GPU: python -m qwen3f.train.bench --preset=qwen3-1.7b --rows=4

Random tokens; float32 master weights under a bfloat16 forward and backward pass (--pure: bfloat16 throughout), compiled
blocks, the donated fused update: what `launch.py` trains with. Prints one line: milliseconds a step, tokens/s, MFU as
the README defines it, peak memory, and the share of a step in which the GPU had nothing to do.
"""

import time

import torch
from absl import app, flags

from qwen3f import model, presets
from qwen3f.stages.pretrain import Batch, make_train_step
from qwen3f.train.metrics import flops_per_token, peak_flops
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import init_state

_PRESET = flags.DEFINE_string("preset", "qwen3-1.7b", "A preset of qwen3f/presets.py.")
_LAYERS = flags.DEFINE_integer("layers", 0, "Cut the model to this many layers; 0: all.")
_ROWS = flags.DEFINE_integer("rows", 4, "Rows of a batch.")
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens of a row.")
_DOCUMENTS = flags.DEFINE_integer("documents", 0, "Mean length of the documents packed into a row; 0: one document.")
_MICROBATCHES = flags.DEFINE_integer("microbatches", 1, "Parts that the batch is cut into.")
_REMAT = flags.DEFINE_enum("remat", "none", ["none", "selective", "full"], "What is recomputed.")
_PURE = flags.DEFINE_bool("pure", False, "bfloat16 weights and moments.")
_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps.")


def random_batch(rows: int, length: int, vocabulary: int, mean: int, seed: int = 0) -> Batch:
    """A batch on the GPU: uniform tokens; mean 0: one document a row, else documents of exponential length."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (rows, length + 1), generator=g)
    starts = torch.rand(rows, length, generator=g) < 1 / mean if mean else torch.zeros(rows, length, dtype=torch.bool)
    segments = 1 + starts.cumsum(1, dtype=torch.int32)
    place = torch.arange(length)
    positions = place - torch.where(starts, place, 0).cummax(1).values
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": torch.ones(rows, length),
        "segments": segments,
        "positions": positions,
    }
    return {key: value.cuda() for key, value in batch.items()}


def busy_seconds(fn: object, times: int) -> float:
    """Device time of the kernels of one call, from torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            fn()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6 / times


def main(argv: list[str]) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    cfg = presets.get(_PRESET.value).replace(gradient_checkpointing=_REMAT.value)
    if _LAYERS.value:
        cfg = cfg.replace(num_hidden_layers=_LAYERS.value)
    rows, length, hyper = _ROWS.value, _TOKENS.value, AdamW()
    state = init_state(cfg, 0, hyper, device="cuda", dtype=torch.bfloat16 if _PURE.value else torch.float32)
    batch = random_batch(rows, length, cfg.vocab_size, _DOCUMENTS.value)
    step = make_train_step(
        cfg,
        hyper,
        Schedule("constant", 3e-4, 100),
        microbatches=_MICROBATCHES.value,
        compute_dtype=torch.bfloat16,
        execution=model.Execution(compile="block"),
        donate=True,
        cross_documents=_DOCUMENTS.value == 0,  # plain causal attention
    )

    def once() -> None:
        nonlocal state
        state, _ = step(state, batch)

    for _ in range(3):
        once()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(_STEPS.value):
        once()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / _STEPS.value
    peak = torch.cuda.max_memory_allocated() / 2**30
    idle = 1 - busy_seconds(once, 3) / seconds
    speed = rows * length / seconds
    mfu = speed * flops_per_token(cfg, length) / peak_flops(torch.device("cuda"))
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {_PRESET.value}, {cfg.num_hidden_layers} layers, "
        f"{rows}×{length}: {seconds * 1e3:.1f} ms, {speed:,.0f} tokens/s, MFU {mfu:.1%}, peak {peak:.1f} GiB, "
        f"GPU idle {max(idle, 0):.1%}",
        flush=True,
    )


if __name__ == "__main__":
    app.run(main)
