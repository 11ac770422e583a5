"""Shared parts of the benchmarks: clock, peak memory, and a table of results in which peers may fail."""

import contextlib
import gc
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

PEERS = ("transformers", "trl", "lm_eval")
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def version_of(package: str) -> str:
    """The version of a package; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def device_of(name: str) -> torch.device:
    """The device that a flag names; "auto": CUDA if there is a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(fn: Callable[[], Any], device: torch.device, repeats: int = 5, warm: int = 2) -> float:
    """Median time of fn in seconds, by the host's clock, until the device has finished."""
    for _ in range(warm):
        fn()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        fn()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """The peak of allocated GPU memory since reset_peak in GiB; None without a GPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


@contextlib.contextmanager
def cudnn_first(device: torch.device) -> Iterator[None]:
    """scaled_dot_product_attention prefers cuDNN, the fastest on Hopper, then torch's usual order."""
    if device.type != "cuda":
        yield
        return
    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    with sdpa_kernel(list(order), set_priority=True):
        yield


def busy_share(fn: Callable[[], Any], device: torch.device) -> float | None:
    """The share of fn's time in which a kernel or copy was running; None without a GPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        begin = time.perf_counter()
        fn()
        synchronize(device)
        seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as place:
        # through a trace file: as Python objects the events would take 0.1 ms each, and a rollout has 10⁵
        profile.export_chrome_trace(f"{place}/trace.json")
        events = json.loads(Path(f"{place}/trace.json").read_text())["traceEvents"]
    return busy_microseconds(events) * 1e-6 / seconds


def busy_microseconds(events: Sequence[Mapping[str, Any]]) -> float:
    """The length of the union of a trace's kernels, copies and fills."""
    spans = sorted((one["ts"], one["ts"] + one["dur"]) for one in events if one.get("cat") in _ON_GPU)
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Report:
    """Rows of results. Each is printed as JSON at once, and all as a table at the end.

    Attributes:
      rows: all rows so far. failed: whether a peer has failed.
    """

    def __init__(self, title: str, device: torch.device) -> None:
        self.rows: list[dict[str, Any]] = []
        self.failed = False
        on_gpu = device.type == "cuda"
        where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        versions = [f"{name} {version_of(name) or 'not installed'}" for name in PEERS]
        self._title = f"{title}: {where}, torch {torch.__version__}, {', '.join(versions)}"
        print(self._title, flush=True)

    def add(self, **figures: Any) -> dict[str, Any]:
        """Add a row; figures that are None are left out."""
        row = {key: value for key, value in figures.items() if value is not None}
        self.rows.append(row)
        print(json.dumps(row, ensure_ascii=False), flush=True)
        return row

    def peer(self, names: dict[str, str], package: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Add a row of `names` and the figures of run(). If the peer is missing, does not fit or fails, it says so."""
        try:
            return self.add(**names, **run())
        except ImportError as error:
            note = f"{package} not installed" if not version_of(package) else f"cannot import: {error}"
        except torch.OutOfMemoryError:
            note = "does not fit"
        except Exception as error:  # a peer may raise anything; the results so far must not be lost
            traceback.print_exc()
            self.failed, note = True, f"failed: {type(error).__name__}"
        print(f"{names}: {note}", file=sys.stderr, flush=True)
        return self.add(**names, note=note)

    def finish(self) -> int:
        """Prints the table. Returns the exit code: 1 if a peer has failed."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        print(f"\n{self._title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for row in self.rows:
            print("| " + " | ".join(_shown(row.get(column, "")) for column in columns) + " |")
        sys.stdout.flush()
        return int(self.failed)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
