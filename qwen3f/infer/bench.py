"""The engine's speed: python -m qwen3f.infer.bench [--cases decode,workload,peers] [--model qwen3-0.6b]

On a GPU: random weights in bfloat16 at a released model's shape, since speed does not ask what is said. A rate's bound
is a step that reads all weights and the cache once at BANDWIDTH, or computes the products at FLOPS, the longer of both.
Peers: transformers' generate with a static cache (compiled), and its continuous batching.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable

import torch

from qwen3f import params as P
from qwen3f import presets
from qwen3f.config import ModelConfig
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.sampling import SamplingParams

BANDWIDTH, FLOPS = 3.0e12, 700e12  # of an H100: bytes/s of a large copy, and bfloat16 products as cuBLAS reaches them
DRAWN = SamplingParams(temperature=0.6)


def bound(cfg: ModelConfig, params: P.Params, batch: int, context: int) -> float:
    """tokens/s of decoding that the card's memory or arithmetic allows."""
    head = 0 if cfg.tie_word_embeddings else params[P.EMBED].numel()  # an embedding of its own is hardly read
    weights = sum(leaf.numel() for leaf in params.values()) - head
    active = weights
    if cfg.num_experts:
        experts = sum(leaf.numel() for path, leaf in params.items() if ".experts." in path)
        read = 1 - (1 - cfg.num_experts_per_tok / cfg.num_experts) ** batch  # share of experts that some row asks for
        weights, active = (
            weights - experts * (1 - read),
            weights - experts * (1 - cfg.num_experts_per_tok / cfg.num_experts),
        )
    cache = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * 2 * context * batch
    seconds = max(2 * weights / BANDWIDTH, 2 * active * batch / FLOPS) + cache / BANDWIDTH
    return batch / seconds


def decode_rate(engine: Engine, vocabulary: int, batch: int, context: int, new: int = 256) -> float:
    """tokens/s of `batch` rows that have about `context` tokens, prefill not counted."""
    length = context - new // 2 if context > new else max(1, context - 32)
    prompts = [[(7 * row + at) % vocabulary for at in range(length)] for row in range(batch)]
    rows = engine.submit([engine.request(prompt, new, sampling=DRAWN) for prompt in prompts])
    while min(row.answered for row in rows) < 16:
        engine.step()
    torch.cuda.synchronize()
    start, before = time.perf_counter(), sum(row.answered for row in rows)
    end = min(new - 4, 16 + (64 if context <= new else new - 32))
    while min(row.answered for row in rows) < end:
        engine.step()
    torch.cuda.synchronize()
    rate = (sum(row.answered for row in rows) - before) / (time.perf_counter() - start)
    engine.cancel(rows)
    return rate


def workload(count: int = 256) -> tuple[list[list[int]], list[int]]:
    """The public workload of nano-vllm's bench, by its seed: prompts and answers of 100 to 1,024 tokens."""
    chance = random.Random(0)
    prompts = [[chance.randint(0, 10000) for _ in range(chance.randint(100, 1024))] for _ in range(count)]
    return prompts, [chance.randint(100, 1024) for _ in range(count)]


def table(cfg: ModelConfig, params: P.Params, cases: list[tuple[int, int]]) -> None:
    engine = Engine(cfg, params, max_tokens=cases_room(cases))
    print("| batch | context | tokens/s | of the bound |\n|---|---|---|---|")
    for batch, context in cases:
        rate = decode_rate(engine, cfg.vocab_size, batch, context)
        print(f"| {batch} | {context} | {rate:,.0f} | {rate / bound(cfg, params, batch, context):.2f} |", flush=True)


def cases_room(cases: list[tuple[int, int]]) -> int:
    return max(batch * (context + 384) for batch, context in cases)


def run_workload(cfg: ModelConfig, params: P.Params) -> None:
    prompts, lengths = workload()
    engine = Engine(cfg, params, max_tokens=600_000, options=EngineOptions(chunk=8192))
    engine.generate(prompts[:256], DRAWN, max_new_tokens=[8] * 256)  # captures graphs
    engine.update(params)
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = engine.generate(prompts, DRAWN, max_new_tokens=lengths)
    seconds = time.perf_counter() - start
    total = sum(len(one.ids) for one in found)
    print(f"public workload: {total:,} tokens in {seconds:.2f} s, {total / seconds:,.0f} tokens/s", flush=True)


def profile(cfg: ModelConfig, params: P.Params, batch: int, context: int) -> None:
    """Kernels of a decoding pass, and the share of the time that the card is idle."""
    engine = Engine(cfg, params, max_tokens=batch * (context + 384))
    rows = engine.submit([engine.request([1 + row] * context, 200, sampling=DRAWN) for row in range(batch)])
    while min(row.answered for row in rows) < 16:
        engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(16):
            engine.step()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - start) / 16 * 1e6
    kernels = [event for event in trace.key_averages() if event.self_device_time_total > 0]
    busy = sum(event.self_device_time_total for event in kernels) / 16
    launches = sum(event.count for event in kernels) / 16
    print(f"profile B{batch} context {context}: {wall:.0f} µs a pass, busy {busy:.0f}, {launches:.0f} kernels")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]:
        print(f"  {event.self_device_time_total / 16:8.1f} µs {event.count / 16:6.1f} x {event.key[:90]}", flush=True)
    engine.cancel(rows)


def peers(cfg: ModelConfig, cases: list[tuple[int, int]]) -> None:
    """transformers' generate with a static cache, its forward pass compiled: tokens/s, prefill not counted."""
    import transformers

    from qwen3f.interop.config import to_hf

    hf_config = transformers.AutoConfig.for_model(**to_hf(cfg, torch.bfloat16))
    with torch.device("cuda"):
        hf = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16).eval()
    for batch, context in cases:
        tokens = torch.randint(0, 10_000, (batch, context), device="cuda")
        mask = torch.ones_like(tokens)

        def seconds(new: int, tokens: torch.Tensor = tokens, mask: torch.Tensor = mask) -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            hf.generate(
                tokens, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
                cache_implementation="static", 
            )  # fmt: skip
            torch.cuda.synchronize()
            return time.perf_counter() - start

        seconds(96), seconds(32)
        rate = batch * 64 / (seconds(96) - seconds(32))
        print(
            f"transformers {transformers.__version__}, static cache: B{batch} context {context}: {rate:,.0f} tokens/s",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="decode,workload", help="of decode, workload, profile, peers")
    parser.add_argument("--model", default="qwen3-0.6b", help="a preset")
    parser.add_argument("--layers", type=int, default=0, help="cut the model to so many layers")
    parser.add_argument("--batches", default="1x128,64x128,64x1024,256x128", help="batch x context, several")
    asked = parser.parse_args(arguments)
    cfg = presets.get(asked.model)
    if asked.layers:
        cfg = cfg.replace(num_hidden_layers=asked.layers)
    cases = [tuple(map(int, pair.split("x"))) for pair in asked.batches.split(",")]
    params = P.init_params(cfg, 0, dtype=torch.bfloat16, device="cuda")
    todo: dict[str, Callable[[], None]] = {
        "decode": lambda: table(cfg, params, cases),
        "workload": lambda: run_workload(cfg, params),
        "profile": lambda: [profile(cfg, params, *case) for case in cases],
        "peers": lambda: peers(cfg, cases),
    }
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.model}, {cfg.num_hidden_layers} layers")
    for case in asked.cases.split(","):
        todo[case]()


if __name__ == "__main__":
    main(sys.argv[1:])
