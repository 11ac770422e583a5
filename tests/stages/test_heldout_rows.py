"""If only some held-out rows are measured, they have all lengths. Each evaluation reads the same ones, in order."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qwen3f.data.cache.token_cache import TokenCache
from qwen3f.data.chat.heldout import measured_rows
from qwen3f.data.packing.best_fit_dataset import BestFitDataset
from qwen3f.data.packing.pair_dataset import PairDataset
from qwen3f.data.sampler import example_index
from qwen3f.params import init_params
from qwen3f.preference.passes import passes
from qwen3f.processes.world import ALONE
from qwen3f.stages import multimodal, sft
from qwen3f.train.setup import make_setup
from qwen3f.train.stage import Run
from tests.stages import toy_chats, toy_pairs

T, SOME = 256, 24
LENGTHS = np.random.default_rng(0).integers(20, 120, 800)


@pytest.fixture(scope="module")
def datasets():
    """Two datasets of the same documents, of 20 to 119 tokens. All tokens have one id, and all are trained."""
    offsets = np.cumsum([0, *LENGTHS])
    tokens, trained = np.full(offsets[-1], 5, np.uint32), np.packbits(np.ones(offsets[-1], bool), bitorder="little")
    cache = TokenCache(Path("in-memory"), (tokens,), offsets, LENGTHS, 266, {}, trained=(trained,))
    return BestFitDataset(cache, T, long_documents="drop"), PairDataset(cache, T)


class Topics:
    """A dataset of rows with one to three chats, each with a topic. The patch of a row is never used."""

    documents = tuple(
        SimpleNamespace(group="abc"[n % 3], ids=np.arange(3), trained=np.arange(3) > 0) for n in range(40)
    )

    def __len__(self):
        return 20

    def order(self, places, seed):
        return example_index(places, len(self), seed)

    def members(self, i):
        return self.documents[i : i + 1 + i % 3]

    def __getitem__(self, i):
        grids, pixels = np.ones((1, 3), np.int32), np.zeros((1, 2), np.float32)
        return {"targets": np.zeros(4), "index": np.array(i), "grids": grids, "pixel_values": pixels}


class Watched:
    """A dataset that records the indices of the rows that are read."""

    def __init__(self, dataset):
        self.dataset, self.read = dataset, []

    def __len__(self):
        return len(self.dataset)

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __getitem__(self, i):
        self.read.append(i)
        return self.dataset[i]


def mean_length(dataset, rows):
    return np.mean([places for i in rows for _, _, places in dataset.rows.pieces(i)])


def test_some_rows_are_of_all_lengths(datasets):
    for dataset in datasets:
        count, whole = len(dataset), mean_length(dataset, range(len(dataset)))
        assert mean_length(dataset, range(SOME)) > 1.15 * whole  # the longest come first
        some = measured_rows(dataset, SOME)
        assert some == measured_rows(dataset, SOME)
        assert len(set(some)) == SOME
        assert set(some) <= set(range(count))
        # lengths deviate by 29, so the mean of about 80 documents deviates by 3.2
        assert mean_length(dataset, some) == pytest.approx(whole, abs=10)
        for most in (0, count, count + 1):
            assert measured_rows(dataset, most) == list(range(count))


def toy_run(config, tmp_path):
    return Run(make_setup(config), tmp_path, ALONE, False, lambda: False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("heldout")


@pytest.mark.parametrize("most", [SOME, 0])
def test_losses_and_rankings_read_them(most, datasets, root, tmp_path):
    for config, dataset in zip((toy_chats.make_config(root), toy_pairs.make_config(root)), map(Watched, datasets)):
        config.eval.max_rows, config.seq_len = most, T
        run = toy_run(config, tmp_path)
        if isinstance(dataset.dataset, PairDataset):
            found = list(passes(run, dataset, most, lambda batch: batch["index"]))
            assert torch.cat([index for _, index in found])[: len(dataset.read)].tolist() == dataset.read
        else:
            sft.make_heldout_loss(run, {"a": dataset})(init_params(run.setup.model, 0, dtype=torch.float64))
        assert dataset.read == measured_rows(dataset, most)


def test_marks_of_pictures_are_those_of_the_rows_that_were_read(root, tmp_path, monkeypatch):
    """A stub marks each chat with the index of its row, so the marks show which rows were read, and their order."""
    config = toy_chats.make_config(root)
    config.eval.update(max_rows=5, batch_size=4)
    dataset = Watched(Topics())
    marks = lambda params, batch: batch["index"][:, None].expand(-1, 3).double()  # noqa: E731
    monkeypatch.setattr(multimodal, "make_exact", lambda *_: marks)
    answered = multimodal._make_answered(toy_run(config, tmp_path), SimpleNamespace(heldout={"a": dataset}))
    _, lines = answered({})
    expected = measured_rows(dataset, 5)
    assert dataset.read == [*expected, *expected]
    wanted = defaultdict(list)
    for i in expected:
        for chat in dataset.members(i):
            wanted[chat.group].append(float(i))
    assert [line["mark"] for line in lines] == [mark for of in wanted.values() for mark in of]
