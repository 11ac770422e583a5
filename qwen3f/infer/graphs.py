"""CUDA graphs of the fused decoding pass: one for each size of batch and page table.

The launch parameters of kernels depend only on shapes, so the key of a graph is (places B, pages P of the table). Both
are rounded up; idle places write to page 0. Capturing a graph takes as long as tens of passes, or thousands if its
kernels must be compiled first. So a pass uses a larger graph that exists, until its own size has occurred WORTH times.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.infer.fused import Constants, Places, Result, make_fused_decode
from qwen3f.model.kv_cache import KVCache
from qwen3f.model.rope import rope_tables
from sharding.axes import ONE, Axis

SMALL = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # numbers of places of a graph; above these, multiples of 32
LEAST_WIDTH = 4  # pages of a graph's table, at least
WORTH = 64  # after this many passes of a size in a larger graph, the size gets its own graph


@dataclasses.dataclass
class _Graph:
    """A captured graph and the buffers that it reads.

    numbers: int64 [5, B], the arguments `numbers` and `chances` of `run`; chances as the bits of their float64. table:
    int32 [B, P], a copy of `pages` on the device.
    """

    graph: torch.cuda.CUDAGraph
    constants: Constants
    numbers: Tensor
    table: Tensor
    result: Result
    pages: "PageTable"


class PageTable:
    """The pages of each place on the host, int32 [places, width], 0 where there is none. Most places keep their pages
    from one pass to the next, so only others are written.

    copied: whether the device has the same table; the caller sets it.
    """

    def __init__(self, places: int, width: int) -> None:
        self.array, self.copied = np.zeros((places, width), np.int32), False
        self._pages: list[list[int] | None] = [[] for _ in range(places)]

    def fill(self, pages: Sequence[Sequence[int]]) -> None:
        """Places beyond `pages` have none."""
        idle = [[]] * (len(self._pages) - len(pages))
        for place, (old, own) in enumerate(zip(self._pages, [*pages, *idle])):
            if old != own:
                self.copied, self._pages[place] = False, None  # None: unknown, if this is interrupted
                self.array[place, : len(own)], self.array[place, len(own) :] = own, 0
                self._pages[place] = list(own)


class DecodeGraphs:
    """Runs decoding passes. Parameters and cache must stay at the same addresses.

    allowed_V: as in fused.Constants. rows: places of a batch, at most. tp: its ranks capture and run the same graphs in
    the same order; the arguments of `run` determine which.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: P.Params,
        cache: KVCache,
        execution: model.Execution,
        num_ids: int,
        allowed_V: Tensor | None,
        rows: int,
        tp: Axis = ONE.tp,
    ) -> None:
        self._decode = make_fused_decode(cfg, execution, num_ids, tp)
        # With tp, NCCL's threads call CUDA during a capture; a capture in mode "global" would fail because of them
        self._watched = "global" if tp.size == 1 else "thread_local"
        self._cfg, self.params, self._cache = cfg, params, cache
        self._allowed_V = allowed_V
        self._own = False  # whether params are this object's copy
        device = cache.keys[0].device
        self.last = torch.zeros(_places(rows), dtype=torch.int64, device=device)  # ids that the pass before has drawn
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._asked: dict[tuple[int, int], int] = {}  # passes of each size that has no graph
        self._pool = None

    def run(self, numbers: np.ndarray, chances: np.ndarray, pages: Sequence[Sequence[int]], expected: int) -> Result:
        """Run one pass. The next pass overwrites its result; `last` has its ids.

        numbers: int64 [3, B], tokens, positions and rotary as in Places. chances: float64 [2, B], uniform and
        inv_temperature. pages: the pages of each row. expected: number of rows that will soon run together; if a new
        graph is needed and no larger one exists, it gets `expected` places.
        """
        graph = self._fitting(_places(numbers.shape[1]), _width(max(map(len, pages))), _places(expected))
        host = torch.zeros(graph.numbers.shape, dtype=torch.int64, pin_memory=True)
        filled = host.numpy()[:, : numbers.shape[1]]
        filled[:3], filled[3:] = numbers, chances.view(np.int64)
        graph.numbers.copy_(host, non_blocking=True)
        graph.pages.fill(pages)
        if not graph.pages.copied:
            graph.table.copy_(torch.from_numpy(graph.pages.array).pin_memory(), non_blocking=True)
            graph.pages.copied = True
        graph.graph.replay()
        return graph.result

    def update(self, params: P.Params) -> None:
        """Use other weights. They are copied into the tensors that the graphs read.

        The first time these tensors still belong to the caller: the weights are cloned and all graphs captured anew.
        """
        if not self._own:
            self._graphs.clear()
            self._asked.clear()
            self._pool = None  # the pool ends with its graphs; torch does not reuse it while a tensor in it is alive
            self.params = {path: _each(torch.clone, leaf) for path, leaf in params.items()}
            self._own = True
            return
        for path, leaf in params.items():
            _each(Tensor.copy_, self.params[path], leaf)

    def _fitting(self, count: int, width: int, expected: int) -> "_Graph":
        """The graph of this size, or a larger one while passes of this size are rare."""
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

    def _program(self, count: int, width: int) -> tuple[Tensor, Tensor, Constants, Callable[[], Result]]:
        """(numbers, table, constants, a function that computes a pass from them); see _Graph."""
        device = self.last.device
        numbers_5B = torch.zeros(5, count, dtype=torch.int64, device=device)
        table_BP = torch.zeros(count, width, dtype=torch.int32, device=device)

        longest = torch.arange(width * self._cache.page_size, device=device)[None]
        angles = (x[0] for x in rope_tables(self._cfg, longest, self._cache.keys[0].dtype))
        constants = Constants(*angles, self._allowed_V)

        def work() -> Result:
            uniform_B, inv_temperature_B = numbers_5B[3:].view(torch.float64)
            places = Places(*numbers_5B[:3], uniform_B, inv_temperature_B.float(), table_BP)
            result, _ = self._decode(self.params, self._cache, places, self.last, constants)
            self.last[:count] = result.ids
            return result

        return numbers_5B, table_BP, constants, work

    def _capture(self, count: int, width: int) -> "_Graph":
        numbers_5B, table_BP, constants, work = self._program(count, width)
        kept = self.last.clone()  # the warm-up pass below compiles kernels and starts NCCL; its ids are not used
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
        return _Graph(graph, constants, numbers_5B, table_BP, result, PageTable(count, width))


def _each(function: Callable[..., Tensor], *leaves: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Apply `function` to leaves: tensors, or tuples with a tensor for each layer."""
    if isinstance(leaves[0], Tensor):
        return function(*leaves)
    return tuple(function(*layer) for layer in zip(*leaves, strict=True))


def _places(rows: int) -> int:
    return next((size for size in SMALL if size >= rows), -(-rows // 32) * 32)


def _width(pages: int) -> int:
    return max(LEAST_WIDTH, 1 << (pages - 1).bit_length())
