"""The generation engine: many requests at once over one paged KV cache; each gets the answer that it would get alone.

The loop has three parts. The scheduler plans the next pass, on the host. The pass computes it: pure functions of
parameters and cache. Its tokens are added to their rows. On a GPU the next pass is launched before the tokens of the
last one are read, so that the GPU never waits for the host. So the host learns one pass late that a row has ended, and
drops the extra token.
"""

import contextlib
import dataclasses
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qwen3f import model, rng
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers.token_text import StreamDecoder
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.device import Device, Pending
from qwen3f.infer.pages import PagePool
from qwen3f.infer.pictures import Pictures, place
from qwen3f.infer.request import Completion, Request, Row, check_request
from qwen3f.infer.sampling import GREEDY, SamplingParams, stream_of
from qwen3f.infer.scheduler import Limits, Scheduler
from qwen3f.infer.thinking import still_thinks
from sharding.axes import ONE, Axis


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Settings that change speed and memory, never results.

    Attributes:
      rows: answers computed at a time, at most.
      chunk: tokens of a prefill pass, at most, padding included.
      page_size: tokens of a page. 0: 64 on a GPU; on a CPU the length of the longest request, so that a row has one
        page and attention reads the cache without a copy.
      tp: the ranks that share the model, as World.axes.tp. params are then this rank's shards (of
        sharding.state.cut_params, or of source.read_params on a mesh), and all ranks must call the same methods with
        the same arguments in the same order.
      room: the name of max_tokens in error messages, such as config.max_tokens.
    Raises UserError for a number that is too small.
    """

    rows: int = 256
    chunk: int = 4096
    page_size: int = 0
    tp: Axis = ONE.tp
    room: str = "max_tokens"

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("chunk", 1), ("page_size", 0)):
            if getattr(self, name) < least:
                raise UserError(f"EngineOptions.{name} must be at least {least}, got {getattr(self, name)}")


DEFAULT = EngineOptions()


class Engine:
    """Answers requests. `generate` answers many and returns; `submit` and `step` let the caller add requests meanwhile.

    Args:
      cfg, params: as for qwen3f.model.apply; computation and cache have the dtype of params.
      max_tokens: tokens that the cache can hold, of all rows together. 0: as many as the requests need, at most 85% of
        a GPU's free memory, or 2 GiB on a CPU.
      seed: of the random streams.
      execution: how the model runs; its `compile` has no effect.
      tokenizer: needed for stop texts. Its stop ids are the default stop_ids; ids that it lacks are never drawn.
      num_ids: only ids below this are drawn (Qwen3's embedding has rows that its tokenizer does not use). 0: the size
        of the tokenizer, or of the vocabulary if there is no tokenizer.
    Raises UserError for a reward model, for a model that tp does not divide, and for numbers that cannot work.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: P.Params,
        *,
        max_tokens: int = 0,
        seed: int = 0,
        execution: model.Execution = model.EAGER,
        tokenizer: Tokenizer | None = None,
        num_ids: int = 0,
        options: EngineOptions = DEFAULT,
    ) -> None:
        if cfg.scalar_head:
            raise UserError(
                "this is a reward model (model.scalar_head=True): it scores answers and writes no text; name another "
                "model by --config.init_from=W"
            )
        self.cfg, self.tokenizer, self.seed = cfg, tokenizer, rng.check_seed(seed)
        if max_tokens < 0:
            raise UserError(f"max_tokens must be a number of tokens, or 0 for what fits, got {max_tokens}")
        num_ids = num_ids or (min(tokenizer.vocab_size, cfg.vocab_size) if tokenizer else cfg.vocab_size)
        if not 1 <= num_ids <= cfg.vocab_size:
            raise UserError(f"num_ids must lie in 1..vocab_size ({cfg.vocab_size}), got {num_ids}; see the tokenizer")
        room = options.page_size, max_tokens, options.rows
        self._device = Device(cfg, params, execution, num_ids, *room, options.tp)
        self._pool = PagePool(0, self._device.page_size)
        self._scheduler = Scheduler(self._pool, Limits(options.rows, options.chunk))
        self._rows, self._room = options.rows, options.room
        self._pending: Pending | None = None
        self._open: dict[int, Row] = {}  # rows that have not ended, by number
        self._calls: deque[tuple[Row, int, float]] = deque()  # calls of on_token to make before the next pass
        self._calling = False
        self._decoders: dict[int, tuple[StreamDecoder, str]] = {}
        self._number = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        max_new_tokens: int | Sequence[int],
        n: int = 1,
        streams: Sequence[int] | None = None,
        pictures: Sequence[Pictures | None] | None = None,
        **request: Any,
    ) -> list[Completion]:
        """n answers to each prompt, in the order of the prompts.

        Args:
          prompts: token ids.
          sampling, max_new_tokens: one for all, or one for each prompt.
          streams: Request.stream of each answer, prompts · n numbers; default 0, 1, 2, …
          pictures: Request.pictures of each prompt.
          request: further fields of Request, the same for all. stop_ids are the tokenizer's by default.
        Raises UserError for a request that cannot run, before anything is computed. If anything else ends it early,
        such as Ctrl-C, the engine drops these requests and can be used again.
        """
        if n < 1:
            raise UserError(f"n must be at least 1 answer to a prompt, got {n}")
        ways = sampling if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        lengths = max_new_tokens if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * len(prompts)
        names = range(len(prompts) * n) if streams is None else streams
        seen = [None] * len(prompts) if pictures is None else pictures
        given = ("sampling", ways, 1), ("max_new_tokens", lengths, 1), ("streams", names, n), ("pictures", seen, 1)
        for what, values, count in given:
            if len(values) != len(prompts) * count:
                raise UserError(f"{what} has {len(values)} values for {len(prompts)} prompts with {n} answers each")
        requests = [
            self.request(
                prompts[i // n],
                lengths[i // n],
                sampling=ways[i // n],
                stream=names[i],
                pictures=seen[i // n],
                **request,
            )
            for i in range(len(prompts) * n)
        ]
        rows = self.submit(requests)
        try:
            self.run(rows)
        except BaseException:
            self._abandon(rows)
            raise
        return [completion(row, i // n, i % n) for i, row in enumerate(rows)]

    def request(self, prompt: Sequence[int], max_new_tokens: int, **fields: Any) -> Request:
        """A request, checked against the model. stop_ids are the tokenizer's by default.

        Raises UserError for a request that the model cannot answer, see check_request.
        """
        if "stop_ids" not in fields and self.tokenizer is not None:
            fields["stop_ids"] = tuple(self.tokenizer.stop_ids)
        try:
            ids = tuple(map(operator.index, prompt))
        except TypeError:
            raise UserError("a prompt must be token ids; give integers, as a tokenizer's encode returns them") from None
        asked = Request(ids, max_new_tokens, **fields)
        check_request(asked, self.cfg, self.tokenizer)
        return asked

    def submit(self, requests: Iterable[Request]) -> list[Row]:
        """Add requests to the queue; `step` computes them.

        Raises UserError for a request that the cache can never hold.
        """
        rows = []
        for asked in requests:
            places = place(asked.prompt, asked.pictures, self.cfg) if self.cfg.vision_enabled else None
            seed = self.seed if asked.seed is None else asked.seed
            rows.append(Row(asked, self._number, stream_of(seed, asked.stream), places))
            self._number += 1
        self._make_room(rows)
        for row in rows:
            if row.request.max_new_tokens:
                self._open[row.number] = row
                self._scheduler.add(row)
            else:
                row.finish_reason = "length"
        return rows

    def _make_room(self, rows: Sequence[Row]) -> None:
        longest = _longest(rows)
        if longest > (most := self._device.longest):
            raise UserError(
                f"a request of {longest} tokens, its answer included, does not fit the cache of {most}; raise "
                f"{self._room} or shorten it"
            )
        count = min(len(rows) + len(self._open), self._rows)
        if self._device.outgrown(count, longest) or (
            count > self._pool.count and self._device.wasteful(count, _longest([*rows, *self._open.values()]))
        ):
            self._start_over()
            longest = _longest([*rows, *self._open.values()])
        self._pool.grow(*self._device.make_room(count, longest))

    def step(self) -> bool:
        """Compute the next pass; False if nothing was left to do.

        After an error or Ctrl-C no row has lost a token, and the next call continues. Raises what an on_token raises.
        """
        with self._whole():
            found = self._compute()
        self._call()
        return found

    def _compute(self) -> bool:
        in_flight = self._pending is not None
        if self._must_know():
            self._collect()
        plan = self._scheduler.plan()
        before, self._pending = self._pending, None
        if plan:
            self._pending = self._device.launch(plan, before)
            self._scheduler.advance(plan)
        if before is not None:
            self._hand_out(before)
        if self._pending is not None and not self._device.overlaps:
            self._collect()
        return in_flight or bool(plan)

    def run(self, rows: Sequence[Row]) -> None:
        """Compute until these rows have ended."""
        for row in rows:
            while not row.finish_reason:
                if not self.step():
                    raise RuntimeError("rows are left, but none can be computed; they are not this engine's")

    def cancel(self, rows: Iterable[Row]) -> None:
        """End rows that have not ended, with finish_reason "cancelled"."""
        try:
            self._settle()
        finally:
            self._abandon(list(rows))

    def _abandon(self, rows: Sequence[Row]) -> None:
        numbers = {row.number for row in rows}
        self._calls = deque(call for call in self._calls if call[0].number not in numbers)
        for row in rows:
            if not row.finish_reason:
                self._end(row, "cancelled")

    def update(self, params: P.Params) -> None:
        """Use new weights, of the same shapes, from the next pass on.

        The contents of all pages are dropped. Rows that have not ended keep their tokens and continue under the new
        weights.
        """
        self._settle()
        for row in self._open.values():
            row.features = None
        self._device.erase(self._scheduler.restart())
        self._pool.clear()
        self._device.update(params)

    def _start_over(self) -> None:
        """Drop the cache and begin with an empty one; rows go back to the queue and keep the tokens that they have."""
        self._settle()
        self._scheduler.restart()
        self._device.drop_cache()
        self._pool = self._scheduler.pool = PagePool(0, self._device.page_size)

    def _must_know(self) -> bool:
        """Whether the next pass depends on tokens that have not been read yet."""
        return self._pending is not None and any(
            row.request.sampling.presence_penalty
            or (row.thinks and row.answered < row.request.budget.tokens <= row.launched)
            for row in self._pending.rows
        )

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """If the body raises: drop the pass in flight, erase the cache and put all rows back into the queue. They keep
        their tokens."""
        try:
            yield
        except BaseException:
            self._pending = None
            self._pool = PagePool(self._pool.count, self._pool.size)
            self._scheduler = Scheduler(self._pool, self._scheduler.limits)
            self._open = {number: row for number, row in self._open.items() if not row.finish_reason}
            for row in self._open.values():
                row.pages, row.cached, row.launched = [], 0, row.answered
                self._scheduler.add(row)
            self._device.erase_all()
            raise

    def _settle(self) -> None:
        """Read the pass in flight."""
        with self._whole():
            self._collect()
        self._call()

    def _call(self) -> None:
        """Make all calls of on_token that are due, then raise the first error that one of them raised. A call that
        cancels rows comes back here; then the calls that are left are made when it has returned."""
        if self._calling:
            return
        self._calling, failure = True, None
        while self._calls:
            try:
                row, token, log_prob = self._calls.popleft()
                row.request.on_token(token, log_prob)
            except BaseException as error:
                failure = failure or error
        self._calling = False
        if failure is not None:
            raise failure

    def _collect(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._hand_out(pending)

    def _hand_out(self, pending: Pending) -> None:
        for row, (token, log_prob, finite) in zip(pending.rows, pending.read()):
            if row.finish_reason:
                continue
            row.checked = finite
            if not finite:
                number = row.answered + 1
                self._end(row, f"error: the model's logits are not finite at new token {number}; check its weights")
                continue
            row.tokens.append(token)
            row.logprobs.append(log_prob)
            row.thinks = row.thinks and still_thinks(row.request.budget, row.answered - 1, token)
            if row.request.on_token is not None:
                self._calls.append((row, token, log_prob))
            if token in row.request.stop_ids or self._completes_stop_text(row, token):
                self._end(row, "stop")
            elif row.answered >= row.request.max_new_tokens:
                self._end(row, "length")

    def _completes_stop_text(self, row: Row, token: int) -> bool:
        if not row.request.stop_texts:
            return False
        decoder, text = self._decoders.get(row.number) or (StreamDecoder(self.tokenizer), "")
        text += decoder.push(token)
        begun = max(0, len(text) - max(map(len, row.request.stop_texts)) + 1)  # no stop text can begin before this
        self._decoders[row.number] = (decoder, text[begun:])
        return any(stop in text for stop in row.request.stop_texts)

    def _end(self, row: Row, reason: str) -> None:
        row.finish_reason, row.features = reason, None
        self._open.pop(row.number, None)
        self._decoders.pop(row.number, None)
        self._device.erase(self._scheduler.finish(row))


def _longest(rows: Iterable[Row]) -> int:
    return max((len(row.request.prompt) + row.request.max_new_tokens for row in rows), default=0)


def completion(row: Row, prompt_index: int = 0, sample_index: int = 0) -> Completion:
    """The row's answer so far."""
    return Completion(
        row.tokens[len(row.request.prompt) :], list(row.logprobs), row.finish_reason, prompt_index, sample_index
    )
