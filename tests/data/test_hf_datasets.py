"""Every data set from files in its real schema to batches of tensors, checked to the token.

The expected ids come from Hugging Face's tokenizers and the text that a person would write for the row. Which ids are
trained follows from their characters' places in it. DataLoaders with and without workers give each example once.
"""

import os
import re
import resource
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from qwen3f.data import hf_datasets
from qwen3f.data.mixture import parse_weights
from qwen3f.data.sources.adapters.registry import names
from qwen3f.data.sources.registry import open_source
from qwen3f.data.stream import torch_dataset
from qwen3f.data.stream.dataset import StreamDataset
from qwen3f.data.stream.parts import stream_part
from qwen3f.errors import UserError
from tests.data.sources.adapters.real_rows import ROWS, write

FORMATS = ["x.parquet", "x.jsonl"]
T = 400


@pytest.fixture(scope="module")
def theirs(small_qwen):
    return PreTrainedTokenizerFast(tokenizer_file=str(small_qwen.path / "tokenizer.json"))


@pytest.fixture
def copies(tmp_path):
    """copies(file, *names): local copies of those data sets below one directory; returns it."""

    def make(file, *chosen):
        for name in chosen:
            write(ROWS[name], tmp_path / name / file)
        return str(tmp_path)

    return make


def _expected(theirs, text):
    """tokens, targets, loss_weights of a chat's text, unpadded: what stands between ⟦ and ⟧ is trained."""
    before, trained, after = re.split("[⟦⟧]", text)
    start, end = len(before), len(before + trained)
    encoded = theirs(before + trained + after, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    counted = [start <= a and b <= end for a, b in offsets]
    targets = [i if c else -100 for i, c in zip(ids[1:], counted[1:])]
    return ids[:-1], targets, [float(c) for c in counted[1:]]


def _check_chat(theirs, example, text):
    tokens, targets, weights = _expected(theirs, text)
    n, pad = len(tokens), len(example["tokens"]) - len(tokens)
    assert 0 < n < T
    assert sum(weights) > 1
    assert example["tokens"].tolist() == [*tokens, *[theirs.convert_tokens_to_ids("<|endoftext|>")] * pad]
    assert example["targets"].tolist() == [*targets, *[-100] * pad]
    assert example["loss_weights"].tolist() == [*weights, *[0] * pad]
    assert example["positions"].tolist() == [*range(n), *[0] * pad]
    assert example["segments"].tolist() == [*[1] * n, *[0] * pad]


def _chat(user, thinking, answer, before=""):
    return (
        f"{before}<|im_start|>user\n{user}<|im_end|>\n"
        f"<|im_start|>assistant\n⟦<think>\n{thinking}\n</think>\n\n{answer}<|im_end|>⟧"
    )


def _off(user, answer, before=""):
    """A chat without a thought and without a switch: the prompt holds the empty thinking block."""
    header = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    return f"{before}<|im_start|>user\n{user}<|im_end|>\n{header}⟦{answer}<|im_end|>⟧"


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("name", names("pretrain"))
def test_documents_to_tokens(name, file, copies, small_qwen, theirs):
    root = copies(file, name)
    data = hf_datasets.load_pretrain_dataset(1, small_qwen, 8, mixture=f"{name}@{root}/{name}")
    stream = [i for row in ROWS[name] for i in [*theirs.encode(row["text"]), small_qwen.eos_id]]
    (batch,) = DataLoader(data, batch_size=1000)
    windows = -(-(len(stream) - 1) // 8)
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items()} == {
        "tokens": ((windows, 8), torch.int64),
        "targets": ((windows, 8), torch.int64),
        "loss_weights": ((windows, 8), torch.float32),
        "positions": ((windows, 8), torch.int64),
        "segments": ((windows, 8), torch.int32),
        "index": ((windows,), torch.int64),
    }
    real = batch["segments"] > 0
    assert batch["tokens"][real].tolist() == stream[:-1]
    ends = np.array(stream[:-1]) == small_qwen.eos_id
    assert batch["targets"][real].tolist() == np.where(ends, -100, stream[1:]).tolist()
    assert batch["loss_weights"][real].tolist() == (~ends).astype(float).tolist()
    assert not data.counts


def test_stages_name_their_data_sets(copies, small_qwen):
    root = copies("x.parquet", *names("pretrain"))
    for stage, count in ((1, 5), (2, 4), (3, 1)):
        data = hf_datasets.load_pretrain_dataset(stage, small_qwen, 64, root=root)
        ends = [window["targets"][window["segments"] > 0] == small_qwen.eos_id for window in data]
        assert sum(int(end.sum()) for end in ends) == count
        assert ends[-1][-1]
    with pytest.raises(UserError, match="stage is 4: write one of 1, 2, 3"):
        hf_datasets.load_pretrain_dataset(4, small_qwen, 64)
    with pytest.raises(UserError, match="max_seq_len is 0: give at least 1"):
        hf_datasets.load_pretrain_dataset(1, small_qwen, 0)


@pytest.mark.parametrize("file", FORMATS)
def test_cold_start_to_tokens(file, copies, small_qwen, theirs):
    root = copies(file, "openmathinstruct-2", "numinamath-cot")
    data = hf_datasets.load_sft_dataset("cold_start", small_qwen, T, root=root)
    numina = ROWS["numinamath-cot"]
    wanted = {  # by index: rows of the two data sets take turns
        0: _chat(
            "What is $2 + 3$?", "Adding gives $2 + 3 = 5$.\n\nSo $\\boxed{5}$.", "The final answer is $\\boxed{5}$."
        ),
        1: _chat(numina[0]["problem"], numina[0]["solution"], "The final answer is $\\boxed{\\{2\\}}$."),
        2: _chat("Halve 1.", "$\\boxed{\\frac{1}{2}}$", "The final answer is $\\boxed{\\frac{1}{2}}$."),
        4: _chat("Double 4.", "It is $\\boxed{8}$", "The final answer is $\\boxed{8}$."),
    }
    examples = list(data)
    assert [int(example["index"]) for example in examples] == list(wanted)
    for example, text in zip(examples, wanted.values()):
        _check_chat(theirs, example, text)
    assert data.counts == {"no_answer": 1}
    assert len(data) == 4
    assert data.counts == {"no_answer": 1}  # asking for the length counts nothing


@pytest.mark.parametrize("file", FORMATS)
def test_fusion_to_tokens(file, copies, small_qwen, theirs):
    root = copies(file, "ultrachat", "openhermes-2.5")
    data = hf_datasets.load_sft_dataset("fusion", small_qwen, T, mixture="ultrachat", root=f"{root}/ultrachat")
    opening, first, second = data
    assert [int(example["index"]) for example in (opening, first, second)] == [0, 0, 1]
    assert len(data) == 3
    before = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    _check_chat(theirs, opening, _off("Hi there", "Hello!"))
    _check_chat(theirs, first, _chat("And the weather? /no_think", "", "Sunny.\nWarm.", before))
    _check_chat(theirs, second, _chat("Bye /no_think", "", "the end"))

    data = hf_datasets.load_sft_dataset("fusion", small_qwen, T, mixture=f"openhermes-2.5@{root}/openhermes-2.5")
    system = "<|im_start|>system\n{}<|im_end|>\n"
    history = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    for example, text in zip(
        data,
        [
            _chat("Name a bird. /no_think", "", "A robin."),
            _off("Why?", "So.", system.format("Be brief.")),
            _chat("Really? /no_think", "", "Yes.", system.format("Be brief.") + history),
            _chat("Who? /no_think", "", "Me.", system.format("You are Ann.")),
            _chat("One? /no_think", "", "1"),
        ],
        strict=True,
    ):
        _check_chat(theirs, example, text)
    with pytest.raises(UserError, match="variant is 'cold': write one of 'cold_start', 'fusion'"):
        hf_datasets.load_sft_dataset("cold", small_qwen, T)


@pytest.mark.parametrize("file", FORMATS)
def test_preferences_to_tokens(file, copies, small_qwen, theirs):
    data = hf_datasets.load_dpo_dataset(small_qwen, T, root=copies(file, "ultrafeedback") + "/ultrafeedback")
    (batch,) = DataLoader(data, batch_size=8, collate_fn=hf_datasets.collate_pairs)
    assert batch["index"].tolist() == [0, 0, 3, 3]
    assert batch["ratings"].tolist() == [4.75, 1.75, 2.0, 1.0]
    texts = [("Say hi.", "Hi!"), ("Say hi.", "Go away."), ("Two?", "2"), ("Two?", "No.")]
    assert batch["tokens"].shape == (4, T)
    for row, (question, answer) in enumerate(texts):
        _check_chat(theirs, {key: value[row] for key, value in batch.items()}, _chat(question, "", answer) + "\n")
    assert data.counts == {"ties": 1, "unrated": 1}
    assert len(data) == 2
    assert next(iter(DataLoader(data, batch_size=2)))["tokens"].shape == (2, 2, T)


@pytest.mark.parametrize("file", FORMATS)
def test_queries_in_batches(file, copies):
    data = hf_datasets.load_grpo_dataset(root=copies(file, "gsm8k", "math"))
    (batch,) = DataLoader(data, batch_size=8)
    assert batch["question"] == ["Two and two?", "Find $x$.", "A lot?"]
    assert batch["answer"] == ["4", r"\frac{1}{\sqrt{2}}", "1234000"]
    assert batch["index"].tolist() == [0, 1, 2]
    assert data.counts == {"no_answer": 1}
    assert len(hf_datasets.load_grpo_dataset(2, root=copies(file, "gsm8k", "math"))) == 2


def test_images_in_batches(copies, tmp_path):
    root = copies("llava_instruct_150k.json", "llava-instruct-150k") + "/llava-instruct-150k"
    (tmp_path / "images" / "deep").mkdir(parents=True)
    Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / "images" / "000000033471.png")
    data = hf_datasets.load_multimodal_dataset(tmp_path / "images", root=root)
    with pytest.raises(UserError, match=r"150k.json:2 names the image 'deep/2.png', which is not in .*images"):
        list(data)
    skipping = hf_datasets.load_multimodal_dataset(tmp_path / "images", root=root, on_bad_row="skip")
    (batch,) = DataLoader(skipping, batch_size=4, collate_fn=list, num_workers=1)
    assert [example["index"] for example in batch] == [0]
    assert batch[0]["messages"][0] == {"role": "user", "content": "<image>\nWhat colour is it?"}
    assert batch[0]["image"].open().getpixel((0, 0)) == (9, 8, 7)
    assert skipping.counts == {"invalid_rows": 1}
    with pytest.raises(UserError, match=r"no image folder .*absent: give image_root an existing one"):
        hf_datasets.load_multimodal_dataset(tmp_path / "absent", root=root)


# -- workers, policies, memory -----------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """60 rows for SFT in four files of two formats: row 7 is null, row 11 has no answer, row 13 is long."""
    rows = [
        {"source": "s", "problem": f"Problem {n}?", "solution": f"the \\boxed{{{n}}}", "messages": []}
        for n in range(60)
    ]
    rows[7]["problem"] = None
    rows[11]["solution"] = "It is clear."
    rows[13]["solution"] = "the " * 100 + "\\boxed{13}"
    for n, suffix in enumerate(["jsonl", "parquet", "jsonl.zst", "parquet"]):
        write(rows[15 * n : 15 * n + 15], tmp_path / f"numina/{n}.{suffix}")
    return str(tmp_path / "numina")


SKIPPED = {"null_values": 1, "no_answer": 1, "too_long": 1}


@pytest.mark.parametrize("workers, context", [(0, None), (1, "fork"), (2, "fork"), (2, "spawn")])
def test_workers_give_each_example_once(many, small_qwen, workers, context):
    data = hf_datasets.load_sft_dataset(
        "cold_start", small_qwen, 150, mixture=f"numinamath-cot@{many}", on_bad_row="skip"
    )
    seen = {}
    for batch in DataLoader(data, batch_size=4, num_workers=workers, multiprocessing_context=context):
        for index, tokens in zip(batch["index"].tolist(), batch["tokens"]):
            assert index not in seen
            seen[index] = small_qwen.decode(tokens)
    assert sorted(seen) == [n for n in range(60) if n not in (7, 11, 13)]
    assert all(f"Problem {n}?" in text and f"boxed{{{n}}}" in text for n, text in seen.items())
    assert data.counts == SKIPPED


@pytest.mark.parametrize("workers", [0, 2])
def test_max_samples_takes_the_same_rows_with_any_number_of_workers(many, small_qwen, workers):
    data = hf_datasets.load_sft_dataset(
        "cold_start", small_qwen, 150, 9, mixture=f"numinamath-cot@{many}", on_bad_row="skip"
    )
    found = [i for batch in DataLoader(data, batch_size=3, num_workers=workers) for i in batch["index"].tolist()]
    assert sorted(found) == [0, 1, 2, 3, 4, 5, 6, 8]
    assert len(data) == 8
    assert data.counts == {"null_values": 1}
    with pytest.raises(UserError, match="max_samples is -1"):
        hf_datasets.load_sft_dataset("cold_start", small_qwen, 150, -1)


@pytest.fixture
def as_worker(monkeypatch):
    """as_worker(n, count): iterate as in worker n of a DataLoader (a real one takes 5 s to stop after an error)."""

    def pretend(n, count):
        monkeypatch.setattr(torch_dataset, "get_worker_info", lambda: SimpleNamespace(id=n, num_workers=count))

    return pretend


def test_a_bad_row_stops_by_default(many, small_qwen, as_worker):
    data = hf_datasets.load_sft_dataset("cold_start", small_qwen, 150, mixture=f"numinamath-cot@{many}")
    with pytest.raises(UserError, match=r"numina/0.jsonl:8 has null under 'problem'"):
        list(data)
    as_worker(1, 2)  # has row 7, the eighth
    with pytest.raises(UserError, match=r"numina/0.jsonl:8 has null under 'problem'"):
        for _ in data:
            pass
    as_worker(0, 2)
    assert [int(example["index"]) for example in iter(data)] == list(range(0, 60, 2))
    with pytest.raises(UserError, match="on_bad_row is 'warn'"):
        hf_datasets.load_sft_dataset("cold_start", small_qwen, 150, on_bad_row="warn")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_pack_each_document_once(tmp_path, small_qwen, workers):
    texts = [f"<{n}>" * (n % 5 + 1) for n in range(40)]
    for n in range(4):
        write([{"text": text, "meta": "m"} for text in texts[10 * n : 10 * n + 10]], tmp_path / f"{n}.parquet")
    data = hf_datasets.load_pretrain_dataset(1, small_qwen, 32, mixture=f"slimpajama@{tmp_path}")
    windows = {}
    for batch in DataLoader(data, batch_size=3, num_workers=workers):
        for n, index in enumerate(batch["index"].tolist()):
            assert index not in windows
            windows[index] = {key: value[n] for key, value in batch.items()}
    streams = Counter()
    share = max(workers, 1)
    for worker in range(share):  # each worker's windows in order are one stream of documents
        ordered = [windows[i] for i in sorted(windows) if i % share == worker]
        ids = [i for w in ordered for i in w["tokens"][w["segments"] > 0].tolist()]
        assert ordered[-1]["targets"][ordered[-1]["segments"] > 0][-1] == small_qwen.eos_id
        streams.update(small_qwen.decode(ids).split("<|endoftext|>"))
    assert streams == Counter(texts)


def test_too_many_workers(many, small_qwen, as_worker):
    data = hf_datasets.load_sft_dataset("cold_start", small_qwen, 150, mixture=f"numinamath-cot@{many}")
    as_worker(0, torch_dataset.MAX_WORKERS + 1)
    with pytest.raises(UserError, match=f"num_workers is 65: give at most {torch_dataset.MAX_WORKERS}"):
        next(iter(data))


def test_weights_share_out_characters(tmp_path, small_qwen):
    for name, letter, length in (("fineweb", "a", 10), ("slimpajama", "b", 40)):
        write([{"text": letter * length}] * 200, tmp_path / name / "x.parquet")
    data = hf_datasets.load_pretrain_dataset(
        1, small_qwen, 100, mixture="fineweb=0.75,slimpajama=0.25", root=str(tmp_path)
    )
    text = "".join(small_qwen.decode(example["tokens"], skip_special=True) for _, example in zip(range(15), data))
    assert abs(text.count("a") / (text.count("a") + text.count("b")) - 0.75) < 0.04


def test_memory_stays_flat(tmp_path, small_qwen):
    """Packing 24 shards takes at most 8 MB more than packing 3; their text is 9 MB more, their ids as a list 40 MB."""
    first = write([{"text": f"{n} the " * 150} for n in range(1000, 1320)], tmp_path / "few/0.parquet")
    for folder, count in (("few", 3), ("many", 24)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for n in range(count):
            if not (tmp_path / folder / f"{n}.parquet").exists():
                (tmp_path / folder / f"{n}.parquet").hardlink_to(first)

    def peak(folder):
        data = hf_datasets.load_pretrain_dataset(1, small_qwen, 4096, mixture=f"slimpajama@{tmp_path / folder}")
        reader, writer = os.pipe()
        child = os.fork()  # a process of its own: the peak of this one belongs to all tests
        if child == 0:
            windows = sum(1 for _ in data)
            os.write(writer, f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss} {windows}".encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            return map(int, pipe.read().split())

    (few, few_windows), (many, many_windows) = peak("few"), peak("many")
    assert many_windows > 7 * few_windows
    assert many - few < 8 * 1024  # kB


# -- equal to what runs read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross, reset", [(False, True), (True, False)])
def test_windows_are_those_of_a_streamed_run(tmp_path, small_qwen, cross, reset):
    for name, texts in (("fineweb", 90), ("slimpajama", 50)):
        write([{"text": f"{name} {n} " * (n % 7 + 1)} for n in range(texts)], tmp_path / name / "x.jsonl")
    mixture = f"fineweb@{tmp_path}/fineweb=0.7,slimpajama@{tmp_path}/slimpajama=0.3"
    options = {"mixture": mixture, "cross_documents": cross, "reset_positions": reset}
    loaded = list(hf_datasets.load_pretrain_dataset(1, small_qwen, 16, **options))
    sources = [open_source(part, holdout=0.0, streaming=True) for part, _ in parse_weights(mixture)]
    run = StreamDataset(
        tuple(map(stream_part, sources)),
        (0.7, 0.3),
        (1, 1),
        small_qwen,
        16,
        cross_documents=cross,
        reset_positions=reset,
    )
    examples = [make(index) for index, (make, _) in enumerate(run.examples(0))]
    assert len(loaded) == len(examples) > 100
    for ours, theirs in zip(loaded, examples):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_left_out_is_counted_once(tmp_path, small_qwen, workers):
    rows = [{"text": text} for text in ("one", None, "", "two", 7, "three")]
    write(rows, tmp_path / "data" / "train.jsonl")
    for name in ("test.jsonl", "README.md", ".hidden"):
        (tmp_path / "data" / name).write_text("{}\n")
    mixture = f"slimpajama@{tmp_path / 'data'}"
    data = hf_datasets.load_pretrain_dataset(1, small_qwen, 4, mixture=mixture, on_bad_row="skip")
    text = ""
    for batch in DataLoader(data, num_workers=workers):
        text += small_qwen.decode(batch["tokens"][0][batch["segments"][0] > 0])
    assert sorted(text.replace("<|endoftext|>", "")) == sorted("onetwothree")  # the order depends on workers
    assert data.counts == {"other_files": 3, "null_values": 1, "empty_texts": 1, "invalid_rows": 1}
    with pytest.raises(UserError, match=r"train.jsonl:5 has a int under 'text'"):
        list(hf_datasets.load_pretrain_dataset(1, small_qwen, 4, mixture=mixture))
