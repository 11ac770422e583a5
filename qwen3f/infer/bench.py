"""The engine's speed: python -m qwen3f.infer.bench [--cases first,decode,workload,profile,peers] [--model qwen3-0.6b]

On a GPU: random weights in bfloat16 at a released model's shape, since speed does not depend on the text. The bound is
the rate of a step that reads all weights and the cache once at BANDWIDTH, or computes the products at FLOPS, whichever
takes longer. Peers: transformers' generate with a static cache (compiled), and its continuous batching.
--tp 2 splits the model over two GPUs; the bound is then that of both together.

--device cpu takes a small model, such as --model nano --batches 64x128 --cases decode,peers: float32, without a bound.
The peer is transformers' generate, sampling and greedy. OMP_NUM_THREADS sets the number of cores.

A decoding rate is the best of REPEATS, the peer's too.
"""

import argparse
import gc
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qwen3f import params as P
from qwen3f import presets
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.sampling import GREEDY, SamplingParams
from qwen3f.infer.tensor_parallel import check, generation_layout
from qwen3f.processes import ranks
from sharding.axes import ONE, Axis
from sharding.mesh import MeshShape
from sharding.state import init_shards

BANDWIDTH = {"H200": 4.3e12, "H100": 3.0e12}  # bytes/s of a large copy; another card's bound is the H100's
FLOPS = 700e12  # what cuBLAS reaches for bfloat16 products on either card
DRAWN = SamplingParams(temperature=0.6)
CASES = ("first", "decode", "workload", "profile", "peers")
REPEATS = 3  # of a decoding rate, the peer's too; the best counts, because a measurement takes only a tenth of a second


def bound(cfg: ModelConfig, params: P.Params, batch: int, context: int, tp: Axis) -> float:
    """Upper bound of decoding in tokens/s, by the memory and arithmetic of a card that holds params."""
    head = 0 if cfg.tie_word_embeddings else params[P.EMBED].numel()  # an untied embedding is read only for few ids
    weights = sum(leaf.numel() for leaf in params.values()) - head
    active = weights
    if cfg.num_experts:
        experts = sum(leaf.numel() for path, leaf in params.items() if ".experts." in path)
        read = 1 - (1 - cfg.num_experts_per_tok / cfg.num_experts) ** batch  # share of experts that a row selects
        weights, active = (
            weights - experts * (1 - read),
            weights - experts * (1 - cfg.num_experts_per_tok / cfg.num_experts),
        )
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    bandwidth = next((rate for card, rate in BANDWIDTH.items() if card in name), BANDWIDTH["H100"])
    cache = 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * 2 * context * batch // tp.size
    seconds = max(2 * weights / bandwidth, 2 * active * batch / FLOPS) + cache / bandwidth
    return batch / seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def decode_rate(
    engine: Engine, vocabulary: int, batch: int, context: int, new: int = 256, way: SamplingParams = DRAWN
) -> float:
    """Decoding rate in tokens/s of `batch` rows with about `context` tokens each; prefill is not counted."""
    length = context - new // 2 if context > new else max(1, context - 32)
    prompts = [[(7 * row + at) % vocabulary for at in range(length)] for row in range(batch)]
    rows = engine.submit([engine.request(prompt, new, sampling=way) for prompt in prompts])
    while min(row.answered for row in rows) < 16:
        engine.step()
    synchronize()
    start, before = time.perf_counter(), sum(row.answered for row in rows)
    end = min(new - 4, 16 + (64 if context <= new else new - 32))
    while min(row.answered for row in rows) < end:
        engine.step()
    synchronize()
    rate = (sum(row.answered for row in rows) - before) / (time.perf_counter() - start)
    engine.cancel(rows)
    return rate


def best_rate(engine: Engine, vocabulary: int, batch: int, context: int, way: SamplingParams = DRAWN) -> float:
    return max(decode_rate(engine, vocabulary, batch, context, way=way) for _ in range(REPEATS))


def workload(count: int = 256) -> tuple[list[list[int]], list[int]]:
    """The public workload of nano-vllm's bench, with its seed: prompts and answers of 100 to 1,024 tokens.

    Returns (prompts, lengths of the answers).
    """
    chance = random.Random(0)
    prompts = [[chance.randint(0, 10000) for _ in range(chance.randint(100, 1024))] for _ in range(count)]
    return prompts, [chance.randint(100, 1024) for _ in range(count)]


def table(cfg: ModelConfig, params: P.Params, cases: list[tuple[int, int]], tp: Axis) -> None:
    """Print the rate of each case. Of its repeats, the first may also capture graphs."""
    rows = max(EngineOptions.rows, *(batch for batch, _ in cases))  # so that all rows of a case run together
    engine = Engine(cfg, params, max_tokens=cases_room(cases), options=EngineOptions(rows=rows, tp=tp))
    if params[P.EMBED].device.type == "cpu":
        for batch, context in cases:
            drawn, greedy = (best_rate(engine, cfg.vocab_size, batch, context, way) for way in (DRAWN, GREEDY))
            print(f"B{batch} context {context}: {drawn:,.0f} tokens/s drawn, {greedy:,.0f} greedy", flush=True)
        return
    print("| batch | context | tokens/s | of the bound |\n|---|---|---|---|")
    for batch, context in cases:
        rate = best_rate(engine, cfg.vocab_size, batch, context)
        print(
            f"| {batch} | {context} | {rate:,.0f} | {rate / bound(cfg, params, batch, context, tp):.2f} |", flush=True
        )


def cases_room(cases: list[tuple[int, int]]) -> int:
    return max(batch * (context + 384) for batch, context in cases)


def run_workload(cfg: ModelConfig, params: P.Params, tp: Axis) -> None:
    prompts, lengths = workload()
    engine = Engine(cfg, params, max_tokens=600_000, options=EngineOptions(chunk=8192, tp=tp))
    engine.generate(prompts[:256], DRAWN, max_new_tokens=[8] * 256)  # captures graphs
    engine.update(params)
    synchronize()
    start = time.perf_counter()
    found = engine.generate(prompts, DRAWN, max_new_tokens=lengths)
    seconds = time.perf_counter() - start
    total = sum(len(one.ids) for one in found)
    print(f"public workload: {total:,} tokens in {seconds:.2f} s, {total / seconds:,.0f} tokens/s", flush=True)


def profile(cfg: ModelConfig, params: P.Params, batch: int, context: int, tp: Axis) -> None:
    """Print the kernels of a decoding pass, its time, and the time that the GPU is busy."""
    options = EngineOptions(rows=max(EngineOptions.rows, batch), tp=tp)
    engine = Engine(cfg, params, max_tokens=cases_room([(batch, context)]), options=options)
    rows = engine.submit([engine.request([1 + row] * context, 200, sampling=DRAWN) for row in range(batch)])
    while min(row.answered for row in rows) < 16:
        engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        synchronize()
        start = time.perf_counter()
        for _ in range(16):
            engine.step()
        synchronize()
        wall = (time.perf_counter() - start) / 16 * 1e6
    kernels = [event for event in trace.key_averages() if event.self_device_time_total > 0]
    busy = sum(event.self_device_time_total for event in kernels) / 16
    launches = sum(event.count for event in kernels) / 16
    print(f"profile B{batch} context {context}: {wall:.0f} µs a pass, busy {busy:.0f}, {launches:.0f} kernels")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]:
        print(f"  {event.self_device_time_total / 16:8.1f} µs {event.count / 16:6.1f} x {event.key[:90]}", flush=True)
    engine.cancel(rows)


def first(cfg: ModelConfig, params: P.Params, tp: Axis) -> None:
    """Print the seconds from the start of this process (imports, random weights) to the first token and to 32 more."""
    engine = Engine(cfg, params, max_tokens=4096, options=EngineOptions(tp=tp))
    for new in (1, 32):
        engine.generate([list(range(100, 228))], DRAWN, max_new_tokens=new)
        synchronize()
        started = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        age = float(Path("/proc/uptime").read_text().split()[0]) - started
        print(f"first: {new} token(s) after {age:.1f} s of this process", flush=True)


def least(seconds: Callable[[int], float], new: int) -> float:
    return min(seconds(new) for _ in range(REPEATS))


def peers_on_cpu(cfg: ModelConfig, cases: list[tuple[int, int]]) -> None:
    """Decoding rate of transformers' generate in tokens/s, over as many new tokens as decode_rate measures; prefill is
    not counted."""
    import transformers

    from qwen3f.interop.config import to_hf

    hf_config = transformers.AutoConfig.for_model(**to_hf(cfg, torch.float32))
    hf = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    for batch, context in cases:
        tokens = torch.randint(0, cfg.vocab_size, (batch, max(1, context - 32)))
        for name, way in (
            ("drawn", {"do_sample": True, "temperature": DRAWN.temperature, "top_k": 0, "top_p": 1.0}),
            ("greedy", {"do_sample": False}),
        ):

            def seconds(new: int, tokens: torch.Tensor = tokens, way: dict[str, Any] = way) -> float:
                start = time.perf_counter()
                hf.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, pad_token_id=0, **way)
                return time.perf_counter() - start

            seconds(4)
            rate = batch * 64 / (least(seconds, 80) - least(seconds, 16))
            print(
                f"transformers {transformers.__version__}: B{batch} context {context}: {rate:,.0f} tokens/s {name}",
                flush=True,
            )


def peers(cfg: ModelConfig, cases: list[tuple[int, int]]) -> None:
    """Rates of transformers in tokens/s: generate with a static cache and a compiled forward pass, prefill not counted;
    and continuous batching over paged SDPA, prefill counted."""
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
        rate = batch * 64 / (least(seconds, 96) - least(seconds, 32))
        print(
            f"transformers {transformers.__version__}, static cache: B{batch} context {context}: {rate:,.0f} tokens/s",
            flush=True,
        )
    for batch, context in cases:
        prompts = [[(7 * row + at) % 10_000 for at in range(context)] for row in range(batch)]
        settings = transformers.GenerationConfig(
            max_new_tokens=128, min_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        hf.generate_batch(prompts, settings)
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = hf.generate_batch(prompts, settings)
        seconds_taken = time.perf_counter() - start
        total = sum(len(one.generated_tokens) for one in found.values())
        print(
            f"transformers {transformers.__version__}, continuous batching ({hf.config._attn_implementation}): "
            f"B{batch} context {context} + 128: {total:,} tokens, {total / seconds_taken:,.0f} tokens/s",
            flush=True,
        )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="decode,workload", help=f"of {', '.join(CASES)}")
    parser.add_argument("--model", default="qwen3-0.6b", help="a preset")
    parser.add_argument("--layers", type=int, default=0, help="cut the model to this many layers")
    parser.add_argument("--batches", default="1x128,64x128,64x1024,256x128", help="batch x context, several")
    parser.add_argument("--tp", type=int, default=1, help="devices that the model is split over")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    return parser.parse_args(arguments)


def check_arguments(asked: argparse.Namespace) -> None:
    """Raises UserError for arguments that no case can run with."""
    cases = asked.cases.split(",")
    if not set(cases) <= set(CASES):
        raise UserError(f"--cases={asked.cases}: write some of {', '.join(CASES)}")
    batches_of(asked.batches)
    if asked.tp < 1:
        raise UserError(f"--tp={asked.tp}: write 1 or more")
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: there is no GPU; write --device=cpu and a small model, such as --model=nano")
    if asked.device == "cpu" and "profile" in cases:
        raise UserError("--cases=profile needs a GPU; leave out --device=cpu, or leave profile out of --cases")
    check(model_of(asked), asked.tp)
    if asked.tp > 1 and "peers" in cases:
        raise UserError("--cases=peers runs on one device; leave out --tp")


def batches_of(text: str) -> list[tuple[int, int]]:
    """(batch, context) of each pair, as in 1x128,64x1024. Raises UserError for another text."""
    try:
        pairs = [(int(batch), int(context)) for batch, context in (pair.split("x") for pair in text.split(","))]
    except ValueError:
        pairs = []
    if not pairs or min(map(min, pairs)) < 1:
        raise UserError(f"--batches={text}: write batch x context, as in 1x128,64x1024")
    return pairs


def model_of(asked: argparse.Namespace) -> ModelConfig:
    cfg = presets.get(asked.model)
    return cfg.replace(num_hidden_layers=asked.layers) if asked.layers else cfg


def run_cases(asked: argparse.Namespace, tp: Axis) -> None:
    """Run the cases; all ranks of tp call this."""
    cfg = model_of(asked)
    cases = batches_of(asked.batches)
    dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
    params = init_shards(cfg, 0, generation_layout(cfg, tp), dtype=dtype, device=asked.device)
    todo: dict[str, Callable[[], None]] = {
        "first": lambda: first(cfg, params, tp),
        "decode": lambda: table(cfg, params, cases, tp),
        "workload": lambda: run_workload(cfg, params, tp),
        "profile": lambda: [profile(cfg, params, *case, tp) for case in cases],
        "peers": lambda: (peers if asked.device == "cuda" else peers_on_cpu)(cfg, cases),
    }
    where = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    where += f", tp{tp.size}" if tp.size > 1 else ""
    print(f"{where}, torch {torch.__version__}, {asked.model}, {cfg.num_hidden_layers} layers", flush=True)
    for case in asked.cases.split(","):
        todo[case]()


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    check_arguments(asked)
    command = ["-m", "qwen3f.infer.bench", *arguments]
    decision = ranks.decide(os.environ, asked.tp, ranks.local_devices(asked.device), asked.device, command)
    if decision.mode == "start":
        return ranks.start(decision, command)
    if decision.mode == "single":
        run_cases(asked, ONE.tp)
        return 0
    with ranks.joined(decision, MeshShape(tp=asked.tp), timeout=300) as world:
        run_cases(asked, world.axes.tp)
        gc.collect()  # NCCL only ends when no CUDA graph that contains its kernels is left
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
