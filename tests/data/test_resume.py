"""1,000 examples in one run equal 337 and, after restarts on other numbers of ranks and workers, the rest.

This holds for every kind of data: indexed, indexed mixtures (with caps, lengths, best fit), streams, and mixtures of
streams. The states go through JSON, as in a checkpoint. Whole examples are compared, with their place in the order.
"""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from qwen3f.data.corpus import DataConfig, prepare
from qwen3f.data.loader import Loader, LoaderOptions, Share
from qwen3f.errors import UserError
from tests.data.sources.adapters.real_rows import write

T, SEED, TOTAL, FIRST = 24, 3, 1000, 337


@pytest.fixture(scope="module")
def base(tmp_path_factory, small_qwen):
    """Two sources of some 1,900 examples a reading: web text in four files of three formats, and JSON lines."""
    root = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(0)
    texts = [f"<{n}> " + "ab " * int(k) for n, k in enumerate(rng.geometric(0.05, 600))]
    for number, suffix in enumerate(["jsonl", "parquet", "jsonl.zst", "arrow"]):
        rows = [{"text": text, "meta": "m"} for text in texts[150 * number : 150 * number + 150]]
        rows[7]["text"] = ""  # left out
        write(rows, root / f"web/{number}.{suffix}")
    (root / "notes").mkdir()
    lines = [json.dumps({"text": f"({n})" + " the" * (n % 40)}) for n in range(150)]
    (root / "notes/x.jsonl").write_text("\n".join(lines))
    return DataConfig(
        mixture=f"slimpajama@{root}/web",
        holdout=0.05,
        tokenizer=str(small_qwen.path),
        cache=str(root / "cache"),
        num_threads=1,
    )


KINDS = {
    "indexed": {},
    "indexed, best fit": {"packing": "best_fit"},
    "mixture": {"both": 1},
    "mixture with caps, lengths, temperature": {
        "both": 1,
        "max_epochs": "slimpajama=0.2",
        "length_mix": "long=3,medium=1",
        "temperature": 2.0,
    },
    "stream": {"streaming": True},
    "shuffled stream": {"streaming": True, "shuffle_buffer": 100},
    "shuffled stream, best fit": {"streaming": True, "shuffle_buffer": 100, "packing": "best_fit"},
    "mixture of streams": {"streaming": True, "both": 1, "shuffle_buffer": 64, "max_epochs": "notes=2"},
    "mixture of streams, best fit": {"streaming": True, "both": 1, "packing": "best_fit", "long_documents": "drop"},
}


@pytest.fixture
def dataset(base, request):
    options = dict(request.param)
    other = f"files@{base.mixture.rpartition('/')[0].partition('@')[2]}/notes"
    if options.pop("both", 0):
        options["mixture"] = f"{base.mixture}=0.7,{other}=0.3"
    if "max_epochs" in options:
        options["max_epochs"] = options["max_epochs"].replace("notes", "files")
    return prepare(replace(base, **options), T, progress=False).train


def _take(dataset, count, batch_size, ranks, workers, start=0, state=None):
    """(examples, state): all ranks' rows in the order of the batches; the ranks' states are one and the same."""
    shares = [Share(rank, ranks) for rank in range(ranks)]
    place = (dataset, batch_size, SEED, start, "cpu", 300)
    loaders = [Loader(*place, LoaderOptions(workers=workers, share=share, state=state)) for share in shares]
    examples = []
    try:
        for _ in range(-(-count // batch_size)):
            for loader in loaders:
                batch = next(loader)
                examples += [
                    {key: value[row].numpy() for key, value in batch.items()} for row in range(len(batch["index"]))
                ]
        states = [json.dumps(loader.state) for loader in loaders]
    finally:
        for loader in loaders:
            loader.close()
    assert len(set(states)) == 1
    assert len(states[0]) < 1000  # bytes
    return examples, json.loads(states[0])


def _assert_same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        for key in b:
            assert np.array_equal(a[key], b[key]), (int(b["index"]), key)


@pytest.mark.parametrize("dataset", KINDS.values(), ids=KINDS, indirect=True)
@pytest.mark.usefixtures("forked_workers")
def test_straight_equals_a_restart_on_other_ranks_and_workers(dataset):
    straight, _ = _take(dataset, TOTAL, 50, 1, 0)
    assert [int(example["index"]) for example in straight] == list(range(TOTAL))
    first, state = _take(dataset, FIRST, FIRST, 1, 0)
    _assert_same(first, straight[:FIRST])
    middle, state = _take(dataset, 300, 30, 3, 0, FIRST, state)
    _assert_same(middle, straight[FIRST : FIRST + 300])
    rest, state = _take(dataset, 363, 33, 1, 2, FIRST + 300, state)
    _assert_same(rest, straight[FIRST + 300 :])
    if state is not None:  # from an older state the loader skips the examples in between
        _, old = _take(dataset, 50, 10, 1, 0)
        again, later = _take(dataset, 20, 20, 1, 0, TOTAL - 20, old)
        _assert_same(again, straight[-20:])
        assert later == state


@pytest.mark.parametrize("dataset", [KINDS["mixture"], KINDS["shuffled stream"]], indirect=True)
def test_spawned_workers_give_the_same(dataset):
    """Training runs spawn workers too. Each worker opens the memory-mapped cache and the tokenizer itself."""
    wanted, _ = _take(dataset, 60, 20, 1, 0)
    found, _ = _take(dataset, 60, 20, 1, 1)
    _assert_same(found, wanted)


@pytest.mark.parametrize("dataset", [KINDS["indexed"], KINDS["shuffled stream"]], indirect=True)
def test_one_reading_gives_every_token_once(dataset, base, small_qwen):
    """A stream's first epoch has the cache's documents, each whole and once."""
    source = prepare(base, T, progress=False)
    documents = [
        source.train.cache.read(a, b)
        for a, b in zip(source.train.cache.doc_offsets, source.train.cache.doc_offsets[1:])
    ]
    wanted = sorted(tuple(document.tolist()) for document in documents)
    if dataset is source.train or not hasattr(dataset, "buffer"):
        examples = [dataset[i] for i in range(len(dataset))]
    else:
        examples = [make(n) for n, (make, _) in enumerate(replace(dataset, max_epochs=(1,)).examples(SEED))]
    stream = [t for example in examples for t in example["tokens"][example["segments"] > 0].tolist()]
    found, own = [], []
    for token in stream:
        own.append(token)
        if token == small_qwen.eos_id:
            found.append(tuple(own))
            own = []
    if not hasattr(dataset, "buffer"):  # the cache's last window is incomplete, and not an example
        assert tuple(found) == tuple(tuple(document.tolist()) for document in documents)[: len(found)]
        assert len(wanted) - len(found) < 8
        return
    found.append((*own, small_qwen.eos_id))  # the last token is only a target
    assert sorted(found) == wanted
    assert tuple(found) != tuple(tuple(document.tolist()) for document in documents)


@pytest.mark.parametrize("dataset", [KINDS["mixture of streams"]], indirect=True)
def test_a_state_of_other_data_is_refused(dataset):
    _, state = _take(dataset, 5, 5, 1, 0)
    for other in (
        replace(dataset, buffer=65),
        replace(dataset, weights=(0.6, 0.4)),
        replace(dataset, packing="best_fit"),
        replace(dataset, parts=dataset.parts[::-1]),
    ):
        with (
            Loader(other, 5, SEED, 5, "cpu", 300, LoaderOptions(state=state)) as loader,
            pytest.raises(UserError, match="place in the data is of other files or settings"),
        ):
            next(loader)
    with (
        Loader(dataset, 5, SEED + 1, 5, "cpu", 300, LoaderOptions(state=state)) as loader,
        pytest.raises(UserError, match="seed"),
    ):
        next(loader)
    with pytest.raises(UserError, match="The state of the stream is after place 4"):
        Loader(dataset, 5, SEED, 4, "cpu", 300, LoaderOptions(state=state))
    with pytest.raises(UserError, match="batch_size=5 cannot be shared by 2 ranks"):
        Loader(dataset, 5, SEED, 0, "cpu", 300, LoaderOptions(share=Share(0, 2)))


def test_a_rank_has_its_part_of_every_micro_batch():
    rows = [Share(rank, 3, 2).rows(12).tolist() for rank in range(3)]
    assert rows == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


@pytest.mark.parametrize("dataset", [KINDS["stream"]], indirect=True)
def test_a_stream_that_ends_says_so(dataset):
    dataset = replace(dataset, max_epochs=(1,), counts=Counter())
    message = r"stream ends after \d+ examples: every source has been read config.data.max_epochs"
    with Loader(dataset, 100, SEED, 0, "cpu", 300) as loader, pytest.raises(UserError, match=message):
        list(loader)
    assert dataset.counts == {"empty_texts": 4}
