"""The device side of the engine: holds parameters and cache, and runs a plan as passes over tensors.

B places of a batch · T tokens of a chunk · P pages of a row
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.infer import fused, lean, pictures
from qwen3f.infer.graphs import DecodeGraphs
from qwen3f.infer.passes import (
    Choice,
    Drawn,
    Inputs,
    Table,
    draw,
    force,
    logits_of,
    make_decode,
    make_prefill,
    training_log_probs,
)
from qwen3f.infer.request import Row
from qwen3f.infer.sampling import SamplingParams, streams_at, uniform
from qwen3f.infer.scheduler import Chunk, Plan
from qwen3f.infer.sight import Sight
from qwen3f.infer.tensor_parallel import agreed, generation_layout, smallest, whole_logits
from qwen3f.infer.thinking import forced_token
from qwen3f.model.kv_cache import bytes_of_token, copy_pages, erase_pages, grow_cache, init_cache
from sharding.axes import ONE, Axis

# Size of the cache where max_tokens is 0: at most CPU_CACHE bytes on a CPU; on a GPU GPU_LEAST bytes at first, and at
# most GPU_SHARE of the free memory.
CPU_CACHE = 2 << 30
GPU_LEAST, GPU_SHARE = 2 << 30, 0.85
GPU_PAGE = 64  # tokens of a page
CPU_ROUNDING = 64  # the size of a CPU's pages is a multiple of this


@dataclasses.dataclass
class Pending:
    """A pass in flight.

    rows: its rows. places: the place of each row in the batch. The drawn tokens are in one of two forms. drawn: tensors
    on the device, by place. packed: the same in the form of fused.Result.packed, on the host once `ready` has occurred.
    """

    rows: list[Row]
    places: list[int]
    drawn: Drawn | None = None
    packed: Tensor | None = None
    ready: torch.cuda.Event | None = None

    def read(self) -> Iterator[tuple[int, float, bool]]:
        """(token, log-probability, finite) of each row; waits for the pass."""
        if self.packed is not None:
            self.ready.synchronize()
            ids, log_probs, finite = self.packed.tolist()
            return ((int(ids[place]), log_probs[place], finite[place] > 0) for place in self.places)
        if self.drawn is None:
            return iter(())
        ids, log_probs, finite = (x.tolist() for x in self.drawn)
        return ((ids[place], log_probs[place], finite[place]) for place in self.places)


class Device:
    """Runs plans. Holds parameters and cache; with tp, this rank's shards of both.

    overlaps: whether a pass may be launched before the tokens of the pass before are read.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: P.Params,
        execution: model.Execution,
        num_ids: int,
        page_size: int,
        max_tokens: int,
        rows: int,
        tp: Axis = ONE.tp,
    ) -> None:
        execution, layout = dataclasses.replace(execution, compile="off"), generation_layout(cfg, tp)
        self.cfg, self.num_ids, self._tp = cfg, num_ids, tp
        self._params = unstacked(cfg, params)
        self.device = params[P.EMBED].device
        self.overlaps = self.device.type == "cuda"
        self._prefill = make_prefill(cfg, execution, layout)
        if tp.size == 1 and not self.overlaps and lean.fits(cfg, execution, params[P.EMBED].dtype):
            self._decode = lean.make_lean_decode(cfg, execution)
        else:
            self._decode = make_decode(cfg, execution, layout)
        self._allowed_V = None  # bool [V], the ids to draw from; None: all
        if vision_ids := pictures.vision_ids(cfg):
            self._allowed_V = torch.ones(cfg.vocab_size, dtype=torch.bool, device=self.device)
            self._allowed_V[list(vision_ids)] = False
        self._sight = Sight(cfg, execution) if cfg.vision_enabled else None
        self._own_pages = not page_size and not self.overlaps  # each row has one page of its own
        self.page_size = page_size or (GPU_PAGE if self.overlaps else CPU_ROUNDING)
        self.max_tokens = max_tokens or self._room()
        # pages of the first cache, if max_tokens does not set its size; a larger cache replaces it when needed
        few = max(1, GPU_LEAST // bytes_of_token(cfg, self._params) // GPU_PAGE)
        self._least = 0 if max_tokens or self._own_pages else few
        self._cache, self._graphs = None, None
        self._fused = self.overlaps and not execution.invariant and fused.fits(cfg, params[P.EMBED].dtype)
        if self._fused and not (16 <= self.page_size <= 256 and self.page_size & (self.page_size - 1) == 0):
            raise UserError(f"EngineOptions.page_size={self.page_size}: on a GPU write a power of two from 16 to 256")
        self._rows, self._execution, self._expected = rows, execution, 0

    def _room(self) -> int:
        memory = GPU_SHARE * torch.cuda.mem_get_info(self.device)[0] if self.overlaps else CPU_CACHE
        return smallest(int(memory) // bytes_of_token(self.cfg, self._params), self._tp, self.device)

    @property
    def longest(self) -> int:
        """The largest number of tokens that a row can have."""
        if self._own_pages:
            return _rounded(self.max_tokens)
        return max(1, self.max_tokens // self.page_size) * self.page_size

    def outgrown(self, rows: int, longest: int) -> bool:
        """Whether the cache must be replaced to hold `rows` rows of `longest` tokens each.

        Shared pages: it has fewer pages than these rows should have. Own pages: the rows need a larger page size, and
        the present number of pages at that size would exceed max_tokens.
        """
        if self._cache is None:
            return False
        if not self._own_pages:
            return self._pages(rows, longest) > self._cache.pages - 1
        if self._own_size(longest) == self.page_size:
            return False
        return (self._cache.pages - 1) * self._own_size(longest) > self.max_tokens

    def wasteful(self, rows: int, longest: int) -> bool:
        """Whether pages that just fit `longest` tokens would let at least twice as many of the rows run at once."""
        if self._cache is None or not self._own_pages:
            return False
        now, then = (min(rows, max(1, self.max_tokens // size)) for size in (self.page_size, _rounded(longest)))
        return 2 * now <= then

    def drop_cache(self) -> None:
        """Free the cache and drop its contents; `make_room` allocates a new one."""
        if self._least:
            self._least = max(self._least, 2 * (self._cache.pages - 1))
        if self._own_pages:
            self.page_size = CPU_ROUNDING
        self._cache, self._graphs = None, None  # graphs read the cache where it lies

    def _pages(self, rows: int, longest: int) -> int:
        """Number of pages for `rows` rows of `longest` tokens, in a cache whose pages rows share."""
        most = max(1, self.max_tokens // self.page_size)
        return min(most, max(self._least, rows * -(-longest // self.page_size))) if self._least else most

    def make_room(self, rows: int, longest: int) -> tuple[int, int]:
        """Make room for `rows` rows of `longest` tokens each, as far as max_tokens allows. Returns (pages, page size).

        If each row has one page of its own, there is one page more than rows, so that a new row can copy the beginning
        that it shares with a row that has ended. The number of pages then doubles when it grows, since growing copies
        the cache.
        """
        self._expected = rows
        size = self._own_size(longest) if self._own_pages else self.page_size
        most = max(1, self.max_tokens // size)
        count = min(most, rows + 1) if self._own_pages else self._pages(rows, longest)
        if self._cache is None:
            self._cache = init_cache(self.cfg, self._params, count, size)
        elif count > self._cache.pages - 1 or size > self.page_size:
            now = self._cache.pages - 1
            count = max(count, min(most, self._rows + 1, 2 * now)) if count > now else now
            self._cache = grow_cache(self._cache, count, size)
        self.page_size = size
        return self._cache.pages - 1, size

    def _own_size(self, longest: int) -> int:
        """Size of a page that holds a row of `longest` tokens."""
        return max(self.page_size, _rounded(min(longest, self.max_tokens)))

    def update(self, params: P.Params) -> None:
        fresh = unstacked(self.cfg, params)
        for path, leaf in self._params.items():
            olds, news = (x if isinstance(x, tuple) else (x,) for x in (leaf, fresh.get(path, ())))
            if len(news) != len(olds):
                raise UserError(
                    f"update: {path} has {len(news)} tensors, the engine {len(olds)}; make a new engine for another "
                    "model"
                )
            for old, new in zip(olds, news):
                if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
                    raise UserError(
                        f"update: {path} is {new.dtype} {list(new.shape)} on {new.device}, the engine has {old.dtype} "
                        f"{list(old.shape)} on {old.device}; make a new engine for another model"
                    )
        if self._graphs is not None:
            self._graphs.update(fresh)
            fresh = self._graphs.params
        self._params = fresh

    def erase(self, pages: Sequence[int]) -> None:
        """Set pages to 0. They may hold NaN, and attention multiplies even masked values, by probability 0."""
        if pages:
            erase_pages(self._cache, pages)

    def erase_all(self) -> None:
        if self._cache is not None:
            erase_pages(self._cache)

    def launch(self, plan: Plan, before: Pending | None) -> Pending:
        """Start the plan's passes. before: the pass launched before them, whose tokens they may need."""
        if plan.copies:
            self._cache = copy_pages(self._cache, plan.copies)
        self.erase(plan.erase)  # after the copies, which may read these pages
        if plan.chunks:
            self._launch_prefill(plan.chunks)
        if not plan.decode:
            return Pending([], [])
        return self._launch_decode(plan.decode, before)

    def _launch_prefill(self, chunks: Sequence[Chunk]) -> None:
        if self._own_pages:
            chunks = sorted(chunks, key=lambda chunk: chunk.row.pages[0])
        rows = [chunk.row for chunk in chunks]
        width = max(chunk.count for chunk in chunks)
        tokens, positions, slots = (np.zeros((len(chunks), width), np.int64) for _ in range(3))
        for place, (row, start, count) in enumerate((c.row, c.start, c.count) for c in chunks):
            own = np.arange(start, start + count)
            tokens[place, :count] = row.tokens[start : start + count]
            positions[place, :count] = own
            slots[place, :count] = np.asarray(row.pages)[own // self.page_size] * self.page_size + own % self.page_size
        batch, features = {"tokens": tokens, "positions": positions, "slots": slots}, None
        if self._sight is not None:
            batch, features = self._sight.look(self._params, batch, chunks)
        self._cache = self._prefill(
            self._params,
            self._cache,
            {key: torch.from_numpy(x).to(self.device) for key, x in batch.items()},
            table=self._table(rows),
            span=self._span(max(chunk.start + chunk.count for chunk in chunks)),
            features=features,
        )

    def _launch_decode(self, rows: Sequence[Row], before: Pending | None) -> Pending:
        places, table, count = list(range(len(rows))), None, len(rows)
        if self._own_pages:
            numbers = [row.pages[0] for row in rows]
            first, last = min(numbers), max(numbers)
            if last - first < 2 * len(rows):
                places, table, count = [number - first for number in numbers], first, last - first + 1
        known = {} if before is None else {row.number: place for row, place in zip(before.rows, before.places)}
        numbers = np.zeros((len(Inputs._fields), count), np.int64)
        numbers[4] = -1
        numbers[:, places] = self._numbers(rows, known)
        if self._fused:
            return self._replay(rows, numbers)  # it makes its own table; making one here would wait for the GPU
        if table is None:
            table = self._table(rows)
        inputs = Inputs(*torch.from_numpy(numbers).to(self.device))
        none = inputs.tokens.new_zeros(1)
        hidden, self._cache = self._decode(
            self._params,
            self._cache,
            inputs,
            none if before is None or before.drawn is None else before.drawn.ids,
            table=table,
            span=1 + max(row.cached for row in rows),
        )
        head = model.head_weight(self.cfg, self._params)
        logits = whole_logits(logits_of(hidden, head, self._execution), self._tp)
        drawn = draw(logits, inputs, self._choices(rows, places), self.num_ids, self._allowed_V)
        if (numbers[4] >= 0).any():
            drawn = force(drawn, logits, inputs.forced, self.num_ids, self._allowed_V)
        if self._execution.invariant:
            drawn = self._as_training(drawn, hidden, rows, places)
        return Pending(list(rows), places, agreed(drawn, self._tp))

    def _as_training(self, drawn: Drawn, hidden_BD: Tensor, rows: Sequence[Row], places: Sequence[int]) -> Drawn:
        """`drawn` with the training step's log-probabilities, for rows without filters, penalty or forced token."""
        temperature, exact = torch.ones(len(hidden_BD)), torch.zeros(len(hidden_BD), dtype=torch.bool)
        for row, place in zip(rows, places):
            way = row.request.sampling
            temperature[place] = min(way.temperature or 1.0, torch.finfo(temperature.dtype).max)
            exact[place] = row.plain and _forced(row) < 0
        head = model.head_weight(self.cfg, self._params)[: self.num_ids]
        log_probs = training_log_probs(drawn.ids, hidden_BD, head, temperature.to(self.device))
        return drawn._replace(log_probs=torch.where(exact.to(self.device), log_probs, drawn.log_probs))

    def _replay(self, rows: Sequence[Row], numbers: np.ndarray) -> Pending:
        """Decode by a CUDA graph. Rows whose sampling the graph does not know draw again from the graph's logits."""
        if self._graphs is None:
            model_and_cache, ids = (self.cfg, self._params, self._cache), (self.num_ids, self._allowed_V)
            self._graphs = DecodeGraphs(*model_and_cache, self._execution, *ids, self._rows, self._tp)
        chances = np.empty((2, len(rows)))
        chances[0] = uniform(streams_at(*torch.from_numpy(numbers[[3, 1]] + [[0], [1]])))
        chances[1] = [row.inverse_temperature for row in rows]
        own = np.stack([numbers[0], numbers[1], numbers[1] + numbers[5]])
        result = self._graphs.run(own, chances, [row.pages for row in rows], self._expected)
        count, packed = len(rows), result.packed
        special = [i for i, row in enumerate(rows) if not row.plain]
        if special or (numbers[4] >= 0).any():
            inputs = Inputs(*torch.from_numpy(numbers).to(self.device))
            drawn = Drawn(result.ids[:count], result.log_probs[:count], result.finite[:count])
            logits = whole_logits(result.logits[:count], self._tp)
            if special:
                choices = self._choices(rows, range(count), special)
                again = draw(logits, inputs, choices, self.num_ids, self._allowed_V)
                which = torch.zeros(count, dtype=torch.bool)
                which[special] = True
                which = which.to(self.device)
                drawn = Drawn(*(torch.where(which, new, old) for new, old in zip(again, drawn)))
            drawn = force(drawn, logits, inputs.forced, self.num_ids, self._allowed_V)
            drawn = agreed(drawn, self._tp)
            self._graphs.last[:count] = drawn.ids
            packed = fused.pack(*drawn)
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True).copy_(packed, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Pending(list(rows), list(range(count)), packed=host, ready=ready)

    def _numbers(self, rows: Sequence[Row], known: Mapping[int, int]) -> np.ndarray:
        """int64 [fields of Inputs, rows]. known: row number -> its place in the pass before.

        Every pass does this for every row, and a GPU may wait for it, so it is one list for each field.
        """
        cached = [row.cached for row in rows]
        found = np.zeros((len(Inputs._fields), len(rows)), np.int64)
        found[0] = [row.tokens[at] if at < len(row.tokens) else -1 - known[row.number] for row, at in zip(rows, cached)]
        found[1] = cached
        pages = np.array([row.pages[at // self.page_size] for row, at in zip(rows, cached)])
        found[2] = pages * self.page_size + found[1] % self.page_size
        found[3] = [row.stream for row in rows]
        found[4] = [_forced(row) for row in rows]
        if self._sight is not None:
            found[5] = [0 if row.places is None else row.places.offset for row in rows]
        return found

    def _table(self, rows: Sequence[Row]) -> Table:
        if self._own_pages and [row.pages[0] for row in rows] == list(
            range(rows[0].pages[0], rows[0].pages[0] + len(rows))
        ):
            return rows[0].pages[0]
        most = max(len(row.pages) for row in rows)
        # fill up with one of the row's own pages: padding of any row writes to page 0, so it may not be finite
        return torch.tensor([row.pages + row.pages[-1:] * (most - len(row.pages)) for row in rows], device=self.device)

    def _span(self, longest: int) -> int:
        return min(_rounded(longest), max(longest, self.page_size)) if self._own_pages else longest

    def _choices(self, rows: Sequence[Row], places: Sequence[int], only: Sequence[int] | None = None) -> list[Choice]:
        """Groups of rows with the same sampling parameters. only: indices into `rows` to include; None: all."""
        groups: dict[SamplingParams, list[int]] = {}
        for number in range(len(rows)) if only is None else only:
            groups.setdefault(rows[number].request.sampling, []).append(number)
        choices = []
        for sampling, members in groups.items():
            seen = None
            if sampling.presence_penalty:
                answers = [rows[i].different for i in members]
                seen = np.full((len(answers), max(map(len, answers))), -1, np.int64)
                for line, answer in zip(seen, answers):
                    line[: len(answer)] = answer
                seen = torch.from_numpy(seen).to(self.device)
            whole = len(groups) == 1 and seen is None and only is None
            own = None if whole else torch.tensor([places[i] for i in members], device=self.device)
            choices.append(Choice(sampling, own, seen))
        return choices


def _rounded(tokens: int) -> int:
    """`tokens` rounded up to the size of a CPU's page."""
    return -(-tokens // CPU_ROUNDING) * CPU_ROUNDING


def unstacked(cfg: ModelConfig, params: P.Params) -> P.Params:
    """params with each stack of layers as a tuple of its layers, which are views."""
    stacked = {path for path, spec in P.abstract_params(cfg).items() if spec.stack}
    return {
        path: leaf.unbind(0) if path in stacked and isinstance(leaf, Tensor) else leaf for path, leaf in params.items()
    }


def _forced(row: Row) -> int:
    """The token that the thinking budget forces next, or −1."""
    token = forced_token(row.request.budget, row.launched) if row.thinks else None
    return -1 if token is None else token
