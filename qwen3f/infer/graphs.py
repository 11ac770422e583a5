"""CUDA graphs of the fused decoding pass: one for each size of batch and of table, over the same buffers.

A launch constant of a kernel follows from shapes alone, so a graph is keyed by its shapes: places B, and pages P of the
table. Both are rounded up, and what is idle writes to page 0. To capture a graph takes as long as tens of passes, and
as thousands where its kernels must be compiled: a pass that fits a larger graph takes that, until its own size has come
WORTH times.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.infer.fused import Places, Result, make_fused_decode
from qwen3f.model.kv_cache import KVCache
from qwen3f.model.rope import rope_tables
from sharding.axes import ONE, Axis

SMALL = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # places; above multiples of 32
LEAST_WIDTH = 4
WORTH = 64  # passes of a size that a larger graph runs before the size has its own


@dataclasses.dataclass
class _Graph:
    """numbers: int64 [4, B], what `run` is given, chances as their bits. pages: of each row, as table has them."""

    graph: torch.cuda.CUDAGraph
    angles: tuple[Tensor, ...]
    numbers: Tensor
    table: Tensor
    result: Result
    pages: list[list[int]]


class DecodeGraphs:
    """Runs decoding passes for parameters and a cache that stay where they are.

    rows: places at most. tp: its ranks capture and run the same graphs in the same order; which ones follows from
    `run`'s arguments.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: P.Params,
        cache: KVCache,
        execution: model.Execution,
        num_ids: int,
        rows: int,
        tp: Axis = ONE.tp,
    ) -> None:
        self._decode = make_fused_decode(cfg, execution, num_ids, tp)
        # Over ranks NCCL's own threads talk to the card meanwhile, which would end a capture that watches all threads
        self._watched = "global" if tp.size == 1 else "thread_local"
        self._cfg, self.params, self._cache = cfg, params, cache
        self._own = False  # whether params are this object's copy
        device = cache.keys[0].device
        self.last = torch.zeros(_places(rows), dtype=torch.int64, device=device)  # ids that the pass before has drawn
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._asked: dict[tuple[int, int], int] = {}  # passes of each size that has no graph
        self._pool = None

    def run(self, numbers: np.ndarray, chances: np.ndarray, pages: Sequence[Sequence[int]], expected: int) -> Result:
        """One pass. Its result is overwritten by the next one; `last` has its ids.

        numbers: int64 [2, B], tokens and positions as in Places. chances: float64 [2, B], uniform and inv_temperature.
        pages: of each row. expected: rows that will soon be computed at a time; a first graph has places for them.
        """
        graph = self._fitting(_places(numbers.shape[1]), _width(max(map(len, pages))), _places(expected))
        host = torch.zeros(graph.numbers.shape, dtype=torch.int64, pin_memory=True)
        filled = host.numpy()[:, : numbers.shape[1]]
        filled[:2], filled[2:] = numbers, chances.view(np.int64)
        graph.numbers.copy_(host, non_blocking=True)
        if graph.pages != pages:
            table = torch.zeros(graph.table.shape, dtype=torch.int32, pin_memory=True)
            for row, own in zip(table.numpy(), pages):
                row[: len(own)] = own
            graph.pages = []  # unknown, should the copy be interrupted
            graph.table.copy_(table, non_blocking=True)
            graph.pages = [list(own) for own in pages]
        graph.graph.replay()
        return graph.result

    def update(self, params: P.Params) -> None:
        """Other weights. They are copied into those that the graphs read; these belong to the caller the first time."""
        if not self._own:
            self._graphs.clear()
            self._asked.clear()
            self._pool = None  # ends with its graphs; torch refuses it to others while a tensor in it is held
            self.params = {path: _each(torch.clone, leaf) for path, leaf in params.items()}
            self._own = True
            return
        for path, leaf in params.items():
            _each(Tensor.copy_, self.params[path], leaf)

    def _fitting(self, count: int, width: int, expected: int) -> "_Graph":
        """The graph of that size, or a larger one while the size is rare."""
        if (count, width) in self._graphs:
            return self._graphs[count, width]
        larger = [size for size in self._graphs if size[0] >= count and size[1] >= width]
        self._asked[count, width] = self._asked.get((count, width), 0) + 1
        if larger and self._asked[count, width] <= WORTH:
            return self._graphs[min(larger)]
        if not larger:
            count = max(count, expected)
        self._graphs[count, width] = self._capture(count, width)
        return self._graphs[count, width]

    def _capture(self, count: int, width: int) -> "_Graph":
        device = self.last.device
        numbers_4B = torch.zeros(4, count, dtype=torch.int64, device=device)
        table_BP = torch.zeros(count, width, dtype=torch.int32, device=device)

        longest = torch.arange(width * self._cache.page_size, device=device)[None]
        angles = tuple(x[0] for x in rope_tables(self._cfg, longest, self._cache.keys[0].dtype))

        def work() -> Result:
            uniform_B, inv_temperature_B = numbers_4B[2:].view(torch.float64)
            places = Places(*numbers_4B[:2], uniform_B, inv_temperature_B.float(), table_BP)
            result, _ = self._decode(self.params, self._cache, places, self.last, angles)
            self.last[:count] = result.ids
            return result

        kept = self.last.clone()  # an idle pass compiles the kernels and wakes NCCL; it draws for nobody
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=self._watched):
            result = work()
        self._pool = self._pool or graph.pool()
        self.last.copy_(kept)
        return _Graph(graph, angles, numbers_4B, table_BP, result, [])


def _each(function: Callable[..., Tensor], *leaves: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """function of leaves that are tensors, or tuples of layers."""
    if isinstance(leaves[0], Tensor):
        return function(*leaves)
    return tuple(function(*layer) for layer in zip(*leaves, strict=True))


def _places(rows: int) -> int:
    return next((size for size in SMALL if size >= rows), -(-rows // 32) * 32)


def _width(pages: int) -> int:
    return max(LEAST_WIDTH, 1 << (pages - 1).bit_length())
