"""From a configuration to batches: shares, resume, long chats, held-out rows, the report, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from qwen3f.data.chat.corpus import ChatDataConfig, prepare_chats
from qwen3f.data.chat.report import render_samples
from qwen3f.data.chat.samples import Sample
from qwen3f.data.chat.sources import ChatSource
from qwen3f.data.loader import Loader, LoaderOptions, Share
from qwen3f.data.mixture import Mixture
from qwen3f.data.packing.best_fit_dataset import BestFitDataset
from qwen3f.errors import UserError
from tests.data.chat.conversations import answer, user
from tests.data.sources.adapters.real_rows import write

T = 400


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    rows = [
        {"messages": [user(f"q{n}"), answer("a" * (n % 50 + 1)), user("and?"), answer(f"b{n}", "t" * (n % 90))]}
        for n in range(300)
    ]
    write(rows, root / "corpus/x.jsonl")
    return ChatDataConfig(mixture=f"chats@{root}/corpus", problems=600, cache=str(root / "cache"))


@pytest.fixture(scope="module")
def mixed(base):
    return replace(base, mixture=f"reasoning=0.5,reasoning-plain=0.2,{base.mixture}=0.3", switches=0.5)


def _rows(batch):
    return [{key: value[row].numpy() for key, value in batch.items()} for row in range(len(batch["index"]))]


def _take(dataset, count, batch_size, start=0, ranks=1, workers=0):
    shares = [LoaderOptions(workers=workers, share=Share(rank, ranks)) for rank in range(ranks)]
    loaders = [Loader(dataset, batch_size, 5, start, "cpu", 266, share) for share in shares]
    try:
        return [row for _ in range(count // batch_size) for loader in loaders for row in _rows(next(loader))]
    finally:
        for loader in loaders:
            loader.close()


@pytest.mark.usefixtures("forked_workers")
def test_a_restart_on_other_ranks_and_workers_goes_on_exactly(mixed, small_qwen):
    first = prepare_chats(mixed, T, small_qwen, progress=False).train
    straight = _take(first, 300, 30)
    again = prepare_chats(mixed, T, small_qwen, progress=False).train  # from the cache
    parts = [*_take(again, 90, 30), *_take(again, 90, 30, 90, ranks=3), *_take(again, 120, 20, 180, workers=2)]
    assert len(parts) == len(straight) == 300
    for found, wanted in zip(parts, straight):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert np.array_equal(found[key], wanted[key]), key


def test_a_mixture_has_its_shares_and_every_row_its_bits(mixed, small_qwen):
    corpus = prepare_chats(mixed, T, small_qwen, progress=False)
    assert isinstance(corpus.train, Mixture)
    assert corpus.shares == (0.5, 0.2, 0.3)
    assert corpus.names == tuple(corpus.sources) == ("reasoning", "reasoning-plain", list(corpus.sources)[2])
    offsets = np.cumsum([0, *map(len, corpus.parts)])
    order = corpus.train.order(np.arange(10_000), 1)
    assert [int(((order >= a) & (order < b)).sum()) for a, b in pairwise(offsets)] == [5000, 2000, 3000]
    # The supervised tokens of all rows of a part are those of its samples.
    for name, part in zip(corpus.names, corpus.parts):
        samples = list(corpus.sources[name].documents("train"))
        ids, trained = Sample.tokenise(samples, small_qwen, 1)
        wanted = sorted(int(i) for own, bits in zip(ids, trained) if len(own) <= T + 1 for i in own[bits])
        targets = np.concatenate([part[i]["targets"] for i in range(len(part))])
        assert sorted(targets[targets != -100].tolist()) == wanted


def test_one_source_without_a_cap_is_packed_alone(base, small_qwen):
    corpus = prepare_chats(base, T, small_qwen, progress=False)
    assert isinstance(corpus.train, BestFitDataset)
    assert corpus.shares == (1.0,)
    corpus.check_covers(10**9, 0)
    capped = prepare_chats(replace(base, max_epochs="2"), T, small_qwen, progress=False)
    assert capped.train.total(0) == 2 * len(corpus.train)
    with pytest.raises(UserError, match=r"data.max_epochs leaves \d+ rows and the run needs 1000"):
        capped.check_covers(1000, 0)


def test_limits_of_samples(base, small_qwen):
    name = base.mixture
    whole = prepare_chats(base, T, small_qwen, progress=False)
    few = prepare_chats(replace(base, max_samples=7, max_heldout=3), T, small_qwen, progress=False)
    assert few.report[0].samples == 7
    assert few.heldout[name].cache.num_docs == 3
    assert whole.heldout[name].cache.num_docs > 10
    start, stop = few.heldout[name].cache.doc_offsets[[0, -1]]
    assert (few.heldout[name].cache.read(start, stop) == whole.heldout[name].cache.read(start, stop)).all()


def test_the_report_counts_what_is_in_the_rows(base, small_qwen):
    corpus = prepare_chats(replace(base, turns="all"), 120, small_qwen, progress=False)
    (report,), (part,) = corpus.report, corpus.parts
    rows = [part[i] for i in range(len(part))]
    assert report.rows == len(rows)
    assert report.places == 120 * len(rows)
    assert report.tokens == sum(int((row["segments"] > 0).sum()) for row in rows)
    assert report.supervised == sum(int(row["loss_weights"].sum()) for row in rows)
    assert report.packed == sum(int(row["segments"].max()) for row in rows)
    assert report.packed + report.too_long == report.samples
    assert report.too_long > 0
    assert report.padding == pytest.approx(part.padding)
    lines = corpus.describe()
    assert f"{report.packed:,} samples to train on in {report.rows:,} rows; {report.tokens:,} tokens" in lines[0]
    assert f"{report.too_long:,} of {report.samples:,} samples are longer than seq_len and dropped" in lines[1]
    assert lines[-1].endswith("held out")


@pytest.mark.parametrize("turns", ["last", "all"])
def test_long_chats(base, small_qwen, turns):
    def prepared(policy):
        config = replace(base, turns=turns, long_chats=policy)
        return prepare_chats(config, 120, small_qwen, progress=False)

    dropped, cut = prepared("drop").report[0], prepared("cut_end").report[0]
    assert cut.samples == dropped.samples
    assert dropped.shortened == 0
    if turns == "last":  # a sample trains one answer: there is no earlier answer to end at
        assert (cut.too_long, cut.shortened) == (dropped.too_long, 0)
    else:
        assert cut.shortened == dropped.too_long - cut.too_long > 0
        assert any("samples are cut after the last answer that fits" in line for line in prepared("cut_end").describe())
    with pytest.raises(
        UserError, match=r"x.jsonl:\d+ has \d+ tokens, more than seq_len=120 takes, and so have"
    ) as error:
        prepared("error")
    name = str(error.value).split(" has ")[0]
    source = ChatSource.documents(prepared("drop").sources[base.mixture], "heldout")
    assert name in {sample.name for sample in source}  # the held-out split is read first


def test_samples_that_all_fall_out(base, small_qwen, tmp_path):
    with pytest.raises(
        UserError, match=r"chats@.*: None of the corpus's \d+ documents fits into seq_len=9 .*raise --config.seq_le"
    ):
        prepare_chats(base, 9, small_qwen, progress=False)
    write([{"messages": [user("q"), answer("a")]}], tmp_path / "c/x.jsonl")
    with pytest.raises(
        UserError, match=r"has no sample to train on \(left out: 1 no_answer\): .*write --config.data.judge=''"
    ):
        prepare_chats(replace(base, mixture=f"chats@{tmp_path}/c", judge="reasoning"), T, small_qwen, progress=False)
    write([{"messages": [user("q")]}], tmp_path / "d/x.jsonl")
    config = replace(base, mixture=f"chats@{tmp_path}/d", on_bad_row="skip")
    with pytest.raises(UserError, match=r"has no sample to train on \(left out: 1 unanswered\): give other rows\.$"):
        prepare_chats(config, T, small_qwen, progress=False)


def test_no_sample_may_be_held_out(base, small_qwen, tmp_path, monkeypatch):
    """A corpus may have no held-out sample, for instance if its answers were sampled for training questions."""
    write([{"messages": [user("q"), answer("a")]}], tmp_path / "c/x.jsonl")
    config = replace(base, mixture=f"chats@{tmp_path}/c")
    corpus = prepare_chats(config, T, small_qwen, progress=False)
    assert corpus.heldout == {}
    assert corpus.describe()[-1].endswith("no sample that fits held out")
    assert len(corpus.train) == 1


def test_a_cache_is_opened_without_its_rows(base, small_qwen, monkeypatch):
    first = prepare_chats(base, T, small_qwen, progress=False)

    def fail(*arguments):
        raise AssertionError("rows were read again")

    monkeypatch.setattr(ChatSource, "documents", fail)
    again = prepare_chats(base, T, small_qwen, progress=False)
    assert again.report == first.report


def test_rendered_samples_show_what_is_trained(mixed, small_qwen):
    corpus = prepare_chats(mixed, T, small_qwen, progress=False)
    with Loader(corpus.train, 8, 0, 0, "cpu", 266) as loader:
        batch = next(loader)
    shown = render_samples(batch, small_qwen, 6)
    assert len(shown) == 6
    known = {
        f"{text.removesuffix(written)}⟦{written}⟧"
        for name in corpus.names
        for sample in corpus.sources[name].documents("train")
        for text, written in [_written(sample)]
    }
    assert set(shown) <= known
    assert len(render_samples(batch, small_qwen, 10**6)) == sum(int(row.max()) for row in batch["segments"])
    # The marks come from the batch that the training step gets, not from the source.
    silent = {**batch, "loss_weights": torch.zeros_like(batch["loss_weights"])}
    assert "⟦" not in "".join(render_samples(silent, small_qwen, 6))
    metrics = corpus.train_metrics(batch)
    assert metrics["padding"] == (batch["segments"] == 0).float().mean()
    assert metrics["supervised"] == (batch["targets"] != -100).float().mean()


def _written(sample):
    text = sample.text.removesuffix("\n")
    start = text.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
    if not sample.enable_thinking:
        start += len("<think>\n\n</think>\n\n")
    return text, text[start:]


def test_all_turns_are_shown_with_every_answer_marked(base, small_qwen):
    corpus = prepare_chats(replace(base, turns="all"), T, small_qwen, progress=False)
    with Loader(corpus.train, 2, 0, 0, "cpu", 266) as loader:
        shown = render_samples(next(loader), small_qwen, 3)
    assert all(text.count("⟦") == text.count("⟧") == text.count("assistant\n") == 2 for text in shown)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"turns": "first"}, "config.data.turns is 'first': write one of last, all"),
        ({"long_chats": "cut"}, "data.long_chats is 'cut': write one of drop, cut_end, error"),
        ({"on_bad_row": "warn"}, "on_bad_row is 'warn'"),
        ({"switches": 1.5}, "data.switches is 1.5: give a share from 0 to 1"),
        ({"switches": 0.5, "turns": "all"}, "data.switches is for one answer a sample: write --config.data.turns=last"),
        ({"problems": 0}, "data.problems is 0: give 1 or more"),
        ({"max_heldout": 0}, "data.max_heldout is 0: give 1 or more"),
        ({"num_threads": 0}, "data.num_threads is 0: give 1 or more"),
        ({"kinds": "maths"}, "data.kinds is 'maths': write different ones of arithmetic, algebra"),
        ({"kinds": "logic,logic"}, "data.kinds is 'logic,logic': write different ones"),
        ({"difficulties": "0"}, "data.difficulties is '0': write different ones of 1, 2, 3, 4, 5"),
        ({"judge": "maths"}, "--config.data.judge=maths: there is no such task; write one of reasoning"),
        ({"mixture": "reasoning=0"}, "has the weight '0'"),
        ({"mixture": "reasoning,reasoning-plain", "root": "x"}, "data.root is the directory of one source"),
        ({"mixture": "", "root": ""}, "--config.data.mixture= must name one or more different ones"),
    ],
)
def test_settings_that_cannot_work(base, small_qwen, changes, message):
    with pytest.raises(UserError, match=message):
        prepare_chats(replace(base, **changes), T, small_qwen, progress=False)


def test_a_length_that_cannot_work(base, small_qwen):
    with pytest.raises(UserError, match="seq_len is 0: give at least 1"):
        prepare_chats(base, 0, small_qwen, progress=False)


def test_kinds_and_difficulties_are_chosen(base, small_qwen):
    config = replace(base, mixture="reasoning", kinds="number_theory, sequence", difficulties="1")
    corpus = prepare_chats(config, T, small_qwen, progress=False)
    names = {sample.name.split(",")[1].strip() for sample in corpus.sources["reasoning"].documents("train")}
    assert names == {"number_theory 1", "sequence 1"}
