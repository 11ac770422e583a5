"""Rows come from every file format, the asked split and the Hub (a stand-in); damage is reported; memory is flat."""

import json
import os
import tracemalloc
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from torch.utils.data import DataLoader, IterableDataset

from qwen3f.data.sources.adapters.files import left_out
from qwen3f.data.sources.adapters.opening import rows
from qwen3f.data.sources.adapters.registry import DATASETS, find
from qwen3f.errors import UserError
from tests.data.sources.adapters.damage import DAMAGE, docs
from tests.data.sources.adapters.real_rows import ROWS, write

ALL_FORMATS = ["x.parquet", "x.arrow", "file.arrow", "x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.json", "x.PARQUET"]


def _texts(name, **options):
    return [row.values["text"] for row in rows(name, **options)]


@pytest.mark.parametrize("file", ALL_FORMATS)
def test_every_format_gives_the_same_rows(file, tmp_path):
    path = write(ROWS["ultrafeedback"], tmp_path / file.lower()).rename(tmp_path / file)
    found = list(rows("ultrafeedback", root=str(tmp_path)))
    wanted = [{key: row[key] for key in ("instruction", "completions")} for row in ROWS["ultrafeedback"]]
    for row, want in zip(found, wanted, strict=True):
        assert row.values["instruction"] == want["instruction"]
        for completion, original in zip(row.values["completions"], want["completions"], strict=True):
            assert completion["response"] == original["response"]
            assert completion["annotations"]["honesty"]["Rating"] == original["annotations"]["honesty"]["Rating"]
    assert [row.name for row in found] == [f"{path}:{n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("file", ALL_FORMATS[:-1])
@pytest.mark.parametrize("chunk", [2, 100])
def test_rows_are_numbered_over_batches(file, chunk, tmp_path):
    path = write(docs(150), tmp_path / file, chunk)
    found = [(row.name, row.values["text"]) for row in rows(f"slimpajama@{tmp_path}")]
    assert found == [(f"{path}:{n + 1}", f"document {n}") for n in range(150)]


def test_json_lines_under_the_name_json_and_an_empty_list(tmp_path):
    path = write(docs(3), tmp_path / "x.jsonl").rename(tmp_path / "x.json")
    assert _texts(f"slimpajama@{tmp_path}") == ["document 0", "document 1", "document 2"]
    path.write_text("\n [ ]\n")
    with pytest.raises(UserError, match="x.json holds no row"):
        _texts(f"slimpajama@{tmp_path}")


def test_a_list_with_a_signature_loses_no_row(tmp_path):
    """A byte order mark before a list once sent the file to the reader of JSON lines, which skipped the whole list."""
    records = json.dumps(docs(1000))
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + records.encode())
    counts = Counter()
    found = list(rows(f"slimpajama@{tmp_path}", on_bad_row="skip", counts=counts))
    assert [row.values for row in found] == docs(1000)
    assert not counts


def test_a_pipe_among_the_files_is_not_opened(tmp_path):
    write(docs(2), tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    assert _texts(f"slimpajama@{tmp_path}") == ["document 0", "document 1"]


def test_a_json_list_over_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen3f.data.sources.adapters.readers._CHUNK_BYTES", 7)
    made = [{"text": f'{"é" * (i % 40)} ] , [ {{"}} \\ {i}', "n": [i, {"a": None}]} for i in range(60)]
    path = tmp_path / "x.json"
    for indent in (None, 2):
        path.write_text(json.dumps(made, indent=indent, ensure_ascii=indent is None))
        assert [row.values for row in rows(f"slimpajama@{tmp_path}")] == made


def test_files_in_order_and_max_samples(tmp_path):
    for n, file in enumerate(["a/2.jsonl", "a/10.parquet", "b.jsonl.zst", "c/d/e.arrow"]):
        write(docs(3, 10 * n), tmp_path / file)
    for file in (".hidden.jsonl", ".cache/x.jsonl", "dataset_info.json", "a/state.json", "notes.txt"):
        write(docs(1, 99), tmp_path / "spare.jsonl").rename(_parent(tmp_path / file))
    order = ["document 20", "document 21", "document 22"]  # files of a directory come before its subdirectories
    order += [f"document {n}" for n in (10, 11, 12, 0, 1, 2, 30, 31, 32)]
    assert _texts(f"slimpajama@{tmp_path}") == order
    assert _texts(f"slimpajama@{tmp_path}", max_samples=5) == order[:5]
    with pytest.raises(UserError, match="max_samples is 0: give at least 1"):
        _texts(f"slimpajama@{tmp_path}", max_samples=0)


def _parent(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_splits_configurations_and_lists_of_files(tmp_path):
    gsm8k = [{"question": name, "answer": "#### 1"} for name in ("main", "test", "socratic")]
    write(gsm8k[:1], tmp_path / "g/main/train-00000-of-00001.parquet")
    write(gsm8k[1:2], tmp_path / "g/main/test-00000-of-00001.parquet")
    write(gsm8k[2:], tmp_path / "g/socratic/train-00000-of-00001.parquet")
    ask = [row.values["question"] for row in rows(f"gsm8k@{tmp_path}/g")]
    assert ask == ["main"]
    assert [row.values["question"] for row in rows(f"gsm8k@{tmp_path}/g", split="test")] == ["test"]
    with pytest.raises(UserError, match="of the split 'validation'; there are test, train"):
        list(rows(f"gsm8k@{tmp_path}/g", split="validation"))

    chats = ROWS["ultrachat"]
    for n, split in enumerate(["train_sft", "train_gen", "test_sft"]):
        write(chats[n % 2 : n % 2 + 1], tmp_path / f"u/data/{split}-00000-of-00001-abc.parquet")
    assert [row.values["messages"] for row in rows(f"ultrachat@{tmp_path}/u")] == [chats[0]["messages"]]

    for part in ("arxiv", "algebraic-stack", "open-web-math"):
        for split in ("train", "test", "validation"):
            write([{"text": f"{part} {split}", "meta": {}}], tmp_path / f"p/{part}/{split}/{part}.jsonl.zst")
    assert _texts(f"proof-pile-2-arxiv@{tmp_path}/p") == ["arxiv train"]
    assert _texts(f"proof-pile-2-algebraic-stack@{tmp_path}/p", split="test") == ["algebraic-stack test"]

    by_name = {dataset.name: dataset for dataset in DATASETS}
    assert left_out(by_name["gsm8k"], f"{tmp_path}/g", "train") == {"of test": 1}
    llava = ROWS["llava-instruct-150k"]
    write(llava[:1], tmp_path / "l/llava_instruct_150k.json")
    write(llava, tmp_path / "l/detail_23k.json")
    assert len(list(rows(f"llava-instruct-150k@{tmp_path}/l"))) == 1
    others = left_out(by_name["llava-instruct-150k"], f"{tmp_path}/l", "train")
    assert others == {"besides llava_instruct_150k.json": 1}

    write(docs(1), tmp_path / "one/part.jsonl")
    with pytest.raises(UserError, match="No file below .*one names the split 'test'"):
        _texts(f"slimpajama@{tmp_path}/one", split="test")


def test_what_datasets_saves_to_disk(tmp_path):
    made = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(docs(3, n)) for split, n in (("train", 0), ("test", 50))}
    )
    made.save_to_disk(str(tmp_path / "saved"))
    assert _texts(f"slimpajama@{tmp_path / 'saved'}") == ["document 0", "document 1", "document 2"]


def test_directories_at_fault(tmp_path):
    with pytest.raises(UserError, match=r"no directory .*absent for gsm8k: .* gsm8k@DIR or --config.data.root=DIR"):
        list(rows(f"gsm8k@{tmp_path / 'absent'}"))
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(UserError, match=r"No .parquet, .* file lies below .*: put the files of openai/gsm8k there"):
        list(rows(f"gsm8k@{tmp_path}"))
    with pytest.raises(UserError, match="on_bad_row is 'ignore': write 'error' or 'skip'"):
        list(rows(f"gsm8k@{tmp_path}", on_bad_row="ignore"))


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_an_error_or_counted(case, tmp_path):
    file, make, message, counted = DAMAGE[case]
    write(docs(2), tmp_path / "a.jsonl")
    make(tmp_path / file)
    write(docs(2, 10), tmp_path / "z.jsonl")
    name = f"slimpajama@{tmp_path}"
    with pytest.raises(UserError, match=message) as error:
        _texts(name)
    assert "\n" not in str(error.value)
    counts = Counter()
    kept = _texts(name, on_bad_row="skip", counts=counts)
    assert counts == counted
    # What lies before and behind the damage is read.
    assert kept[:2] == ["document 0", "document 1"]
    assert kept[-2:] == ["document 10", "document 11"]
    if "UTF-8" in case and file != "x.json":
        assert kept[2:-2] == (["fine", "good"] if file == "x.parquet" else ["fine", "fine"])


# -- the Hub -----------------------------------------------------------------------------------------------------------


def _made(shard):
    for n in shard:
        yield {"text": f"document {n}", "meta": "x"}


@pytest.fixture
def hub(monkeypatch):
    """Replace `load_dataset`: it gives a stream of 300 rows that can be cut anywhere. Return the list of its calls."""
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.IterableDataset.from_generator(_made, gen_kwargs={"shard": list(range(300))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_arguments(hub):
    found = list(rows("fineweb"))
    assert [row.values["text"] for row in found] == [f"document {n}" for n in range(300)]
    assert found[-1].name == "hub:HuggingFaceFW/fineweb/train:300"
    list(rows("slimpajama", split="test", streaming=False, max_samples=1))
    list(rows("proof-pile-2-arxiv", max_samples=1))
    assert hub == [
        (("HuggingFaceFW/fineweb", "sample-10BT"), {"split": "train", "streaming": True}),
        (("cerebras/SlimPajama-627B", None), {"split": "test", "streaming": False}),
        (
            ("json",),
            {
                "data_files": {"train": "hf://datasets/EleutherAI/proof-pile-2/arxiv/train/*.jsonl.zst"},
                "split": "train",
                "streaming": True,
            },
        ),
    ]


def test_hub_with_other_columns(hub):
    with pytest.raises(UserError, match=r"^hub:openai/gsm8k/train:1 has no column 'question', 'answer'; it has 'text'"):
        list(rows("gsm8k"))


class _Everything(IterableDataset):
    def __iter__(self):
        return (row.values["text"] for row in rows("fineweb"))


def test_a_worker_reads_the_whole_hub_stream(hub):
    """`datasets` gives a worker of a DataLoader only some files. Our callers divide rows themselves and need all."""
    for workers in (0, 2):
        seen = Counter(DataLoader(_Everything(), batch_size=None, num_workers=workers))
        assert seen == {f"document {n}": max(workers, 1) for n in range(300)}


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), FileNotFoundError("gone"), ValueError("bad")])
def test_no_network_names_the_flag(monkeypatch, error):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        list(rows("fineweb"))
    message = str(caught.value)
    assert message.startswith(
        f"HuggingFaceFW/fineweb cannot be read from the Hub, after row 0 ({type(error).__name__}: "
    )
    assert message.endswith("copy it to a directory and write fineweb@DIR, or --config.data.root=DIR.")
    assert "\n" not in message


def test_offline_for_real(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in ("fineweb", "openhermes-2.5"):
        with pytest.raises(UserError, match=rf"{find(name).hub_id} cannot be read from the Hub.*write {name}@DIR"):
            list(rows(name))


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl", ".jsonl.zst", ".json"])
def test_memory_does_not_grow_with_the_data(suffix, tmp_path):
    """From 4 to 32 shards of 2 MB of text, the peaks of Python and Arrow grow by a quarter and 256 KiB at most."""
    shard = [{"text": f"{n} " * 1000} for n in range(1000, 1400)]
    first = write(shard, tmp_path / "few" / f"0{suffix}")
    for folder, count in (("few", 4), ("many", 32)):
        for n in range(count):
            path = _parent(tmp_path / folder / f"{n}{suffix}")
            if not path.exists():
                path.hardlink_to(first)

    def peak(folder):
        highest = 0
        tracemalloc.reset_peak()
        for n, _ in enumerate(rows(f"slimpajama@{tmp_path / folder}")):
            if n % 50 == 0:
                highest = max(highest, pyarrow.total_allocated_bytes())
        return tracemalloc.get_traced_memory()[1], highest, n + 1

    tracemalloc.start()
    try:
        peak("few")  # imports and caches
        (small, small_arrow, few), (large, large_arrow, many) = peak("few"), peak("many")
    finally:
        tracemalloc.stop()
    assert (few, many) == (1600, 12800)
    assert large < 1.25 * small + 2**18
    assert large_arrow < 1.25 * small_arrow + 2**18
