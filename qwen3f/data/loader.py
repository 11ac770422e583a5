"""Batches in the shuffled order, built ahead by one background thread."""

import contextlib
import queue
import threading
from types import TracebackType

import numpy as np
import torch
from absl import logging

from qwen3f.data.mixture import Mixture
from qwen3f.data.packing import IGNORED_TARGET, Example, PackedDataset
from qwen3f.errors import UserError

_POLL_SECONDS = 0.1
_JOIN_SECONDS = 10.0

Batch = dict[str, torch.Tensor]


class Loader:
    """An endless iterator of batches; a context manager, or call `close()`.

    Batch k holds the places start + k·B … start + (k + 1)·B − 1 of the data order (the dataset's `order`), one a
    row. So two loaders with the same dataset and seed agree wherever they start, and a run resumes with
    `start = batches taken · B`.

    Each batch is a dict with the batch dimension first: tokens, targets, positions int64 [B, T]; segments int32 [B, T];
    loss_weights float32 [B, T]; index int64 [B], the example's place in the data order (rising by one a row; the
    example itself is `dataset.order([place], seed)`).

    Args:
        dataset: examples to draw from.
        batch_size: rows B a batch.
        seed: of the shuffle.
        start: first place in the data order, in examples.
        device: where the batches go; to CUDA by an asynchronous copy from pinned memory.
        vocab_size: every token id must be below.
        prefetch: batches built ahead.

    Raises:
        UserError: while iterating, a token id beyond the vocabulary. Whatever the thread raises is raised again by
            `next()`, with the thread's traceback; after that, and after `close()`, `next()` raises RuntimeError.
    """

    def __init__(
        self,
        dataset: PackedDataset | Mixture,
        batch_size: int,
        seed: int,
        start: int,
        device: torch.device | str,
        vocab_size: int,
        prefetch: int = 2,
    ) -> None:
        if batch_size < 1 or start < 0 or prefetch < 1:
            raise UserError(
                f"The loader got batch_size={batch_size}, start={start}, prefetch={prefetch}: "
                "give batch_size >= 1, start >= 0 and prefetch >= 1."
            )
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._start = start
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
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
        # The consumer enqueues the copy, on its current stream; torch keeps the pinned buffer until it has ended.
        return {key: value.to(self._device, non_blocking=True) for key, value in item.items()}

    def _take(self) -> Batch | BaseException:
        while not self._stop.is_set():  # polled, so that close() from another thread ends the wait
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_SECONDS)
        raise RuntimeError("The loader is closed.")

    def close(self) -> None:
        """Stop the thread and wait for it. May be called more than once."""
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
        try:
            place = self._start
            while not self._stop.is_set():
                self._put(self._build(place))
                place += self._batch_size
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                return self._queue.put(item, timeout=_POLL_SECONDS)

    def _build(self, place: int) -> Batch:
        batch = build_batch(self._dataset, place, self._batch_size, self._seed, self._vocab_size)
        if self._device.type == "cuda":
            batch = {key: tensor.pin_memory() for key, tensor in batch.items()}
        return batch


def build_batch(dataset: PackedDataset | Mixture, place: int, rows: int, seed: int, vocab_size: int) -> Batch:
    """The batch of places place … place + rows − 1, on the CPU; keys as in `Loader`, which iterates over these."""
    places = np.arange(place, place + rows)
    examples = [dataset[i] for i in dataset.order(places, seed).tolist()]
    _check_vocabulary(examples, vocab_size)
    arrays = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    arrays["index"] = places
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def _check_vocabulary(examples: list[Example], vocab_size: int) -> None:
    for example in examples:
        for key in ("tokens", "targets"):
            ids = example[key]
            bad = ids[((ids < 0) & ((key == "tokens") | (ids != IGNORED_TARGET))) | (ids >= vocab_size)]
            if bad.size:
                raise UserError(
                    f"Example {int(example['index'])} holds the token id {int(bad[0])}, beyond the vocabulary of "
                    f"{vocab_size}: set model.vocab_size to the tokenizer's, or tokenise the data again."
                )
