"""The loader yields the contract's batches in the sampler's order, passes errors on and always stops."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qwen3f.data.loader import Loader, LoaderOptions, _streamed
from qwen3f.data.packing.concat import PackedDataset
from qwen3f.data.sampler import example_index
from qwen3f.errors import UserError


@pytest.fixture
def dataset(make_cache):
    return PackedDataset(make_cache([7, 5, 9, 4, 8]), seq_len=4)  # 33 tokens, 8 examples


def _loader(dataset, **options):
    place = {"batch_size": 3, "seed": 5, "start": 0, "device": "cpu", "vocab_size": 100}
    place |= {key: options.pop(key) for key in list(options) if key in place}
    return Loader(dataset, **place, options=LoaderOptions(**options))


def _take(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


def _threads():
    return [t for t in threading.enumerate() if t.name == "qwen3f-loader"]


def test_batches_follow_the_data_order(dataset):
    batches = _take(_loader(dataset), 6)  # 18 examples: into the third epoch
    for k, batch in enumerate(batches):
        assert batch["index"].tolist() == [3 * k, 3 * k + 1, 3 * k + 2]
        for row, place in enumerate(batch["index"].tolist()):
            example = dataset[example_index(place, len(dataset), 5)]
            for key in ("tokens", "targets", "loss_weights", "positions", "segments"):
                assert np.array_equal(batch[key][row].numpy(), example[key]), key


def test_keys_shapes_and_dtypes(dataset):
    (batch,) = _take(_loader(dataset), 1)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "tokens": (torch.int64, (3, 4)),
        "targets": (torch.int64, (3, 4)),
        "loss_weights": (torch.float32, (3, 4)),
        "positions": (torch.int64, (3, 4)),
        "segments": (torch.int32, (3, 4)),
        "index": (torch.int64, (3,)),
    }


def test_resuming_continues_the_same_order(dataset):
    whole = _take(_loader(dataset), 5)
    rest = _take(_loader(dataset, start=2 * 3), 3)
    for a, b in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    other = _take(_loader(dataset, seed=6), 5)
    assert any(not torch.equal(a["tokens"], b["tokens"]) for a, b in zip(whole, other, strict=True))


def test_a_batch_larger_than_the_dataset_spans_epochs(dataset):
    (batch,) = _take(_loader(dataset, batch_size=20), 1)
    starts = batch["tokens"][:16, 0]
    assert sorted(starts[:8].tolist()) == sorted(starts[8:].tolist())


@pytest.mark.parametrize("vocab_size", [42, 41, 15])
def test_token_beyond_the_vocabulary(dataset, vocab_size):
    """The largest input is 40 and the largest target 41 (the stream's last token is end-of-text, 1)."""
    loader = _loader(dataset, vocab_size=vocab_size, batch_size=8)
    largest = max(int(dataset[i][key].max()) for i in range(8) for key in ("tokens", "targets"))
    assert largest == 41
    if vocab_size == 42:
        _take(loader, 1)
        return
    with (
        loader,
        pytest.raises(UserError, match=rf"Example \d holds the token id \d+, beyond the vocabulary of {vocab_size}: "),
    ):
        next(loader)


@pytest.mark.parametrize("place, number", [(2, -100), (8, -5)])  # the second is a target alone
def test_negative_token_is_refused(make_cache, place, number):
    cache = make_cache([9])
    (tokens,) = cache.shards
    object.__setattr__(cache, "shards", (tokens.astype(np.int64),))
    cache.shards[0][place] = number
    with (
        _loader(PackedDataset(cache, 4)) as loader,
        pytest.raises(UserError, match=rf"Example \d holds the token id {number}"),
    ):
        next(loader)


class _Failing:
    def __init__(self, dataset):
        self._dataset = dataset

    def __len__(self):
        return len(self._dataset)

    def order(self, places, seed):
        return self._dataset.order(places, seed)

    def __getitem__(self, i):
        return self._fail() if i == example_index(7, len(self), 5) else self._dataset[i]

    def _fail(self):
        raise OSError("the disk is gone")


def test_errors_of_the_thread_reach_the_consumer(dataset):
    loader = _loader(_Failing(dataset))
    assert next(loader)["index"].tolist() == [0, 1, 2]
    assert next(loader)["index"].tolist() == [3, 4, 5]
    with pytest.raises(OSError, match="the disk is gone") as error:
        next(loader)
    assert "_fail" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    with pytest.raises(RuntimeError, match="The loader is closed"):
        next(loader)
    assert _threads() == []


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_close_joins_the_thread(dataset, prefetch):
    loader = _loader(dataset, prefetch=prefetch)
    next(loader)
    time.sleep(0.05)  # the queue is full now and the thread waits in put
    began = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - began < 2
    assert _threads() == []
    with pytest.raises(RuntimeError, match="The loader is closed"):
        next(loader)


def test_close_from_another_thread_ends_a_wait(dataset):
    release = threading.Event()

    class Blocked(_Failing):
        def __getitem__(self, i):
            release.wait(10)
            return self._dataset[i]

    loader = _loader(Blocked(dataset))
    closer = threading.Thread(target=loader.close)
    threading.Timer(0.1, closer.start).start()
    with pytest.raises(RuntimeError, match="The loader is closed"):
        next(loader)
    release.set()
    closer.join(5)
    assert not closer.is_alive()
    assert _threads() == []


def test_builds_no_more_than_prefetch_batches_ahead(dataset):
    asked = []

    class Counting(_Failing):
        def __getitem__(self, i):
            asked.append(i)
            return self._dataset[i]

    with _loader(Counting(dataset), prefetch=2) as loader:
        next(loader)
        time.sleep(0.2)
        assert len(asked) == 3 * (1 + 2 + 1)  # taken, queued, and one waiting for a place


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"start": -1}, {"prefetch": 0}, {"workers": -1}])
def test_bad_arguments(dataset, options):
    with pytest.raises(UserError, match="give batch_size >= 1, start >= 0, prefetch >= 1"):
        _loader(dataset, **options)


# -- worker processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def forked(forked_workers, dataset):
    """The dataset, with forked workers: a cache in memory and classes of a test cannot be sent to spawned ones."""
    return dataset


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(forked, workers):
    dataset = forked
    before = torch.random.get_rng_state()
    for a, b in zip(_take(_loader(dataset), 12), _take(_loader(dataset, workers=workers), 12), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert multiprocessing.active_children() == []


def test_an_error_in_a_worker_ends_with_its_traceback(forked):
    dataset = forked
    loader = _loader(_Failing(dataset), workers=2)
    assert [next(loader)["index"][0] for _ in range(2)] == [0, 3]
    with pytest.raises(OSError, match=r"(?s)in _fail\n.*the disk is gone"):
        next(loader)
    with pytest.raises(RuntimeError, match="The loader is closed"):
        next(loader)
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_ends_the_run(forked):
    dataset = forked

    class Dying(_Failing):
        def _fail(self):
            os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    with (
        _loader(Dying(dataset), workers=2) as loader,
        pytest.raises(RuntimeError, match=r"DataLoader worker .* (exited|killed)"),
    ):
        list(loader)
    assert time.monotonic() - began < 20


def test_workers_build_no_more_than_their_share_ahead(forked):
    """At most: 2 batches for each of 2 workers, 2 in the queue, one that waits for a place there, and one taken."""
    dataset, asked = forked, multiprocessing.get_context("fork").Value("q", 0)

    class Counting(_Failing):
        def __getitem__(self, i):
            with asked.get_lock():
                asked.value += 1
            return self._dataset[i]

    with _loader(Counting(dataset), workers=2, prefetch=2) as loader:
        next(loader)
        time.sleep(1)
        assert asked.value == 3 * (2 * 2 + 2 + 1 + 1)


@pytest.mark.gpu
def test_batches_on_cuda_equal_those_on_the_host(make_cache):
    dataset = PackedDataset(make_cache([300] * 50), seq_len=256)
    host = _take(_loader(dataset, vocab_size=100_000), 40)
    device = _take(_loader(dataset, vocab_size=100_000, device="cuda"), 40)
    for a, b in zip(host, device, strict=True):
        assert all(b[key].is_cuda and torch.equal(a[key], b[key].cpu()) for key in a)


def test_of_a_streams_batch_each_row_is_looked_up_once():
    """Searching all of this rank's rows for each row would be slow, so `in` is forbidden here."""

    class Searched(np.ndarray):
        def __contains__(self, row):
            raise AssertionError("searched")

    def examples(seed, workers, state):
        for number in range(8):
            nothing = np.zeros(1, np.int64)
            example = {"tokens": nothing, "targets": nothing, "loss_weights": np.zeros(1, np.float32)}
            yield (lambda index, example=example: {**example, "index": index}), number

    rows = np.array([1, 3]).view(Searched)
    batch, state = next(_streamed(SimpleNamespace(examples=examples), rows, 4, 0, 0, 9, 0, None))
    assert (batch["index"].tolist(), state) == ([1, 3], 3)
