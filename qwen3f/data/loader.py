"""Batches in the data order, built ahead by a background thread and, if options.workers is above 0, by processes."""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from absl import logging

from qwen3f.data.ordered_map import ordered_map
from qwen3f.data.packing.concat import IGNORED_TARGET, Example
from qwen3f.data.stream.dataset import State, StreamDataset
from qwen3f.errors import UserError

_POLL_SECONDS = 0.1
_JOIN_SECONDS = 10.0
_KEYS = frozenset(("tokens", "targets", "loss_weights"))  # that every example has

Batch = dict[str, torch.Tensor]


class Indexed(Protocol):
    """Examples that can be read in any order. order(places, seed) gives the index of the example at each place of the
    data order, int64 [N] -> int64 [N]. All examples are dicts of arrays with the same keys and shapes."""

    def __len__(self) -> int: ...
    def order(self, places: np.ndarray, seed: int) -> np.ndarray: ...
    def __getitem__(self, index: int) -> Example: ...


Dataset = Indexed | StreamDataset


class Share(NamedTuple):
    """Which rows of a batch a rank has: an equal part of each of the `parts` micro-batches.

    A micro-batch has B/M rows (M = parts). Rank r of R has its rows r · B/(M·R) … (r + 1) · B/(M·R) − 1.
    """

    rank: int = 0
    ranks: int = 1
    parts: int = 1

    def rows(self, batch_size: int) -> np.ndarray:
        """The rank's rows: their places in the batch, rising. Raises UserError if the ranks cannot share it equally."""
        if batch_size % (self.ranks * self.parts):
            raise UserError(
                f"batch_size={batch_size} cannot be shared by {self.ranks} ranks in {self.parts} micro-batches: make "
                f"it a multiple of {self.ranks * self.parts}."
            )
        return np.arange(batch_size).reshape(self.parts, self.ranks, -1)[:, self.rank].flatten()


ALL_ROWS = Share()


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How batches are built. No option changes what is in them, except that share selects rows.

    Attributes:
        prefetch: number of batches built ahead.
        workers: processes that build batches, or tokenise a stream; 0: the loader's thread does. Their number changes
            no batch.
        share: which rows of each batch this process builds.
        state: for a stream, the state of another loader at place `start` or before; examples in between are skipped.
    """

    prefetch: int = 2
    workers: int = 0
    share: Share = ALL_ROWS
    state: State | None = None


DEFAULT = LoaderOptions()


class Loader:
    """An endless iterator of batches; a context manager, or call `close()`.

    Batch k holds the places start + k·B … start + (k + 1)·B − 1 of the data order (the dataset's `order`; of a stream,
    its examples as they come), one a row. So two loaders with the same dataset and seed agree wherever they start,
    whatever their ranks and workers, and a run resumes with `start = batches taken · B` and the `state` then.

    Each batch is a dict of what the examples have, with the batch dimension first: tokens, targets, positions int64
    [B, T]; segments int32 [B, T]; loss_weights float32 [B, T]; and index int64 [B], the example's place in the data
    order (over all ranks, one more from row to row; of indexed data the example is `dataset.order([place], seed)`).

    Args:
        dataset: examples to draw from.
        batch_size: rows B a batch, over all ranks.
        seed: the seed of the shuffle.
        start: first place in the data order, in examples.
        device: where the batches go; to CUDA by an asynchronous copy from pinned memory.
        vocab_size: every token id must be below it.
        options: how batches are built.

    Raises:
        UserError: the ranks cannot share a batch equally. While iterating: an example has other keys than the first of
            its batch, or lacks tokens, targets or loss_weights; a token id is beyond the vocabulary; or the data end.
            What the thread or a worker raises, or a worker's death, is raised by `next()`, with the traceback. After
            that, and after `close()`, `next()` raises RuntimeError.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        start: int,
        device: torch.device | str,
        vocab_size: int,
        options: LoaderOptions = DEFAULT,
    ) -> None:
        prefetch, workers, state = options.prefetch, options.workers, options.state
        if batch_size < 1 or start < 0 or prefetch < 1 or workers < 0:
            raise UserError(
                f"The loader got batch_size={batch_size}, start={start}, prefetch={prefetch}, workers={workers}: "
                "give batch_size >= 1, start >= 0, prefetch >= 1 and workers >= 0."
            )
        if isinstance(dataset, StreamDataset) and (state["examples"] if state else 0) > start:
            raise UserError(f"The state of the stream is after place {start}: give one of that place or before.")
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._device, self._vocab_size = torch.device(device), vocab_size
        self._rows = options.share.rows(batch_size)
        self._start, self._workers = start, workers
        self._state = state
        self._queue: queue.Queue[tuple[Batch, State | None] | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="qwen3f-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        item = self._take()
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, self._state = item
        # The caller's thread enqueues the copy on its current CUDA stream; torch keeps the pinned buffer until it ends.
        return {key: value.to(self._device, non_blocking=True) for key, value in batch.items()}

    @property
    def state(self) -> State | None:
        """The state (JSON, a few numbers) for a loader that continues after the batches taken; None for indexed
        data."""
        return self._state

    def _take(self) -> tuple[Batch, State | None] | BaseException:
        while not self._stop.is_set():  # polled, so that close() from another thread ends the wait
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_SECONDS)
        raise RuntimeError("The loader is closed.")

    def close(self) -> None:
        """Stop the thread and the workers and wait for them. May be called more than once."""
        self._stop.set()
        self._thread.join(timeout=_JOIN_SECONDS)
        if self._thread.is_alive():  # a read that hangs, e.g. on a dead network mount; a daemon does not block exit
            logging.warning("The data loader's thread is still reading after %s s; leaving it.", _JOIN_SECONDS)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _produce(self) -> None:
        batches = _batches(
            self._dataset,
            self._rows,
            self._batch_size,
            self._seed,
            self._start,
            self._vocab_size,
            self._workers,
            self._state,
        )
        try:
            with contextlib.closing(batches):  # ends the workers, in the thread that began them
                while not self._stop.is_set():
                    batch, state = next(batches)
                    if self._device.type == "cuda":
                        batch = {key: tensor.pin_memory() for key, tensor in batch.items()}
                    self._put((batch, state))
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[Batch, State | None] | BaseException) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                return self._queue.put(item, timeout=_POLL_SECONDS)


def build_batch(dataset: Indexed, place: int, rows: np.ndarray, seed: int, vocab_size: int) -> Batch:
    """The examples at the places place + rows of the data order as a batch, on the CPU; keys as in `Loader`."""
    places = place + rows
    return _stacked([dataset[i] for i in dataset.order(places, seed).tolist()], places, vocab_size)


def _batches(
    dataset: Dataset,
    rows: np.ndarray,
    batch_size: int,
    seed: int,
    start: int,
    vocab_size: int,
    workers: int,
    state: State | None,
) -> Iterator[tuple[Batch, State | None]]:
    """`rows` of each batch; for a stream also the state after it."""
    if isinstance(dataset, StreamDataset):
        yield from _streamed(dataset, rows, batch_size, seed, start, vocab_size, workers, state)
        return
    build = partial(build_batch, dataset, rows=rows, seed=seed, vocab_size=vocab_size)
    for batch in ordered_map(build, count(start, batch_size), workers):
        yield batch, None


def _streamed(
    dataset: StreamDataset,
    rows: np.ndarray,
    batch_size: int,
    seed: int,
    start: int,
    vocab_size: int,
    workers: int,
    state: State | None,
) -> Iterator[tuple[Batch, State | None]]:
    passed, own = start - (state["examples"] if state else 0), set(rows.tolist())
    with contextlib.closing(dataset.examples(seed, workers, state)) as stream:
        for _, state in islice(stream, passed):  # noqa: B007 (state is used if the stream ends in the first batch)
            pass
        for place in count(start, batch_size):
            examples = []
            for row in range(batch_size):
                make, state = next(stream, (None, state))
                if make is None:
                    raise UserError(
                        f"The stream ends after {place + row} examples: every source has been read "
                        "config.data.max_epochs times. Raise it, or lower --config.steps."
                    )
                if row in own:
                    examples.append(make(place + row))
            yield _stacked(examples, place + rows, vocab_size), state


def _stacked(examples: list[Example], places: np.ndarray, vocab_size: int) -> Batch:
    for place, example in zip(places, examples):
        if example.keys() != examples[0].keys() or not example.keys() >= _KEYS:
            raise UserError(
                f"The example at place {int(place)} of the data order has the keys {sorted(example)}, the "
                f"first of its batch {sorted(examples[0])}; all examples need the same, and {sorted(_KEYS)} among them."
            )
    arrays = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    ids = {"tokens": arrays["tokens"], "targets": np.where(arrays["targets"] == IGNORED_TARGET, 0, arrays["targets"])}
    for known in ids.values():
        if known.min() < 0 or known.max() >= vocab_size:
            _report_id(known, arrays.get("index", places), vocab_size)
    arrays["index"] = places
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def _report_id(ids: np.ndarray, index: np.ndarray, vocab_size: int) -> None:
    row, column = np.argwhere((ids < 0) | (ids >= vocab_size))[0]
    raise UserError(
        f"Example {int(index[row])} holds the token id {int(ids[row, column])}, beyond the vocabulary of {vocab_size}: "
        "set model.vocab_size to the tokenizer's, or tokenise the data again."
    )
