"""Rows that a stream cannot use give an error with file and row, or are counted; also in the thread of a loader."""

import pytest

from qwen3f.data.corpus import DataConfig, prepare
from qwen3f.data.loader import Loader
from qwen3f.errors import UserError
from tests.data.sources.adapters.real_rows import write


@pytest.fixture
def stream(tmp_path, small_qwen):
    """stream(files) writes files, each given as rows or as bytes, and returns the dataset that streams them."""

    def make(files, **options):
        write([{"text": f"fine {n}", "meta": "m"} for n in range(20)], tmp_path / "web/a.jsonl")
        for name, content in files.items():
            if isinstance(content, bytes):
                (tmp_path / "web" / name).write_bytes(content)
            else:
                write(content, tmp_path / "web" / name)
        options = {"mixture": f"slimpajama@{tmp_path}/web", "holdout": 0.2, **options}
        config = DataConfig(streaming=True, tokenizer=str(small_qwen.path), cache=str(tmp_path / "cache"), **options)
        return prepare(config, 16, progress=False).train

    return make


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("b.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"b.jsonl:2 is not UTF-8 at byte 10"),
        ("b.jsonl", b'{"body": "x"}\n', r"b.jsonl:1 has no column 'text'; it has 'body'"),
        ("b.parquet", b"PAR1 and no more", r"b.parquet cannot be read after row 0"),
        ("b.jsonl", b'{"text": 5}\n', r"b.jsonl:1 has a int under 'text': write a string"),
    ],
)
def test_faults_name_file_and_row(stream, monkeypatch, name, content, message):
    # Held-out documents are read first. Hold out one, so that they end before the fault, as in a stream of many shards.
    monkeypatch.setattr("qwen3f.data.corpus.STREAM_HELDOUT_DOCUMENTS", 1)
    dataset = stream({name: content})
    with Loader(dataset, 2, 0, 0, "cpu", 300) as loader, pytest.raises(UserError, match=message):
        list(loader)


def test_what_a_policy_leaves_out_is_counted(stream):
    rows = [{"text": text, "meta": "m"} for text in (None, "", "word " * 60, "end")]
    dataset = stream({"b.parquet": rows, "c.jsonl": b""}, max_epochs="1", packing="best_fit", long_documents="drop")
    assert sum(1 for _ in dataset.examples(0)) > 3
    assert dataset.counts == {"null_values": 1, "empty_texts": 1, "empty_shards": 1, "too_long": 1}


def test_no_network_names_the_flag(stream, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"fineweb cannot be read from the Hub.*write fineweb@DIR, or --config.data.root"
    ):
        stream({}, mixture="fineweb")
