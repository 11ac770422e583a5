"""Timing on a CUDA device: medians of runs with a cold L2 cache; the card's copy bandwidth and matrix rate."""

import math
import statistics
from collections.abc import Callable

import torch

_SLEEP_CYCLES = 1_000_000  # about 0.5 ms: the device waits while the host queues the run, so launch gaps are not timed


def milliseconds(fn: Callable[[], object], budget_ms: float = 150.0, warmup: int = 3) -> float:
    """Median device time of one call, from as many calls as fit into `budget_ms` (8 to 100).

    Before each call the L2 cache is filled with other data, as in a training step. It is filled by reads, because
    written lines would go to memory during the timed call.
    """
    for _ in range(warmup):
        fn()
    first = _runs(fn, 3)
    count = max(8, min(100, int(budget_ms / max(statistics.median(first), 1e-3))))
    return statistics.median(_runs(fn, count))


def milliseconds_in_a_graph(calls: list[Callable[[], object]], replays: int = 20) -> float:
    """Median time per call, over replays of a CUDA graph that makes the calls in turn, at least 50 in total."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    rounds = math.ceil(50 / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(replays)] for _ in range(2))
    for start, end in zip(starts, ends):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends)) / (rounds * len(calls))


def _runs(fn: Callable[[], object], count: int) -> list[float]:
    flush = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
    for start, end in zip(starts, ends):
        flush.sum()
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends)]


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a 1 GiB device-to-device copy."""
    source = torch.randint(0, 1 << 30, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def matrix_rate(size: int = 8192) -> float:
    """FLOP/s of a square bf16 matrix product on random data."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: a @ b) * 1e-3)


def peak_extra_bytes(fn: Callable[[], object]) -> int:
    """Peak memory of one call in addition to what was allocated before it; its results are included."""
    fn()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
