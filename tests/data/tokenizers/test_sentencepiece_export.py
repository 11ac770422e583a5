"""A sentencepiece tokenizer in Hugging Face's form: the same ids and text for every text. All comparisons are exact."""

import glob
import json
import os
import random

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3f.data.tokenizers import sentencepiece_tokenizer as module
from qwen3f.data.tokenizers.sentencepiece_export import last_pair, tokenizer_json
from qwen3f.data.tokenizers.sentencepiece_proto import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, read_model
from qwen3f.data.tokenizers.sentencepiece_tokenizer import (
    AS_TEXT,
    SPECIAL_TOKENS,
    SentencePieceTokenizer,
    train_sentencepiece,
)
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError

_WORDS = [
    "中文の漢字", "かなカナ", "한국어", "Жуковский", "naïve", "Straße", "Ελλάδα", "हिन्दी", "ไทย", "עברית", "العربية",
    "👩\u200d👧", "😀🏽", "🇫🇷", "∑∫", "½",
]  # fmt: skip
_ODD = [
    "▁", " ", "  ", "       ", "\n", "\n\n    ", "\n\n\n\n", "\t", "\t\t", "\r\n", "\r", "\0", "▅", "\ufffd",
    "<unk>", "<0x0A>", "<s>", "⁇", "\u2028", "\x85", "\u00a0", "\u200b", "\x1f", "\x7f", "e\u0301", "\ufeff",
    "<|im_", "end|>", "0", "42", "3.14",
]  # fmt: skip


def source_files(most: int) -> list[str]:
    """Texts of Python's standard library, in the same order each time, until they have `most` characters together."""
    texts: list[str] = []
    for path in sorted(glob.glob(os.path.dirname(os.__file__) + "/*.py")):
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            texts.append(file.read())
        if sum(map(len, texts)) >= most:
            break
    return texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SentencePieceTokenizer:
    """3,000 pieces of code and of words in many scripts."""
    place = tmp_path_factory.mktemp("trained")
    return train_sentencepiece([*source_files(600_000), " ".join(_WORDS * 60)], 3000, place / "code.model")


@pytest.fixture(scope="module")
def across_words(tmp_path_factory) -> SentencePieceTokenizer:
    """A model of other training options: pieces cross spaces, digits and line ends; user-defined symbols are words."""
    place = tmp_path_factory.mktemp("across") / "other.model"
    options = {
        "split_by_whitespace": False,
        "split_digits": False,
        "user_defined_symbols": ["self", "self.", "\n\n", "▁▁▁", "ab"],
    }
    with place.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in source_files(100_000) for line in text.split("\n")),
            model_writer=file,
            vocab_size=1500,
            minloglevel=2,
            **{**module.TRAINER_OPTIONS, **options},
        )
    return SentencePieceTokenizer.load(place)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    trained.export(directory)
    return directory


@pytest.fixture(scope="module")
def theirs(exported):
    return transformers.AutoTokenizer.from_pretrained(exported)


def in_tokenizers(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    ids = {name: tokenizer.special_id(name) for name in SPECIAL_TOKENS}
    content = tokenizer_json(read_model(tokenizer.path.read_bytes()), tokenizer.path, ids, AS_TEXT)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def mixed_text(size: int) -> str:
    """Code, words of many scripts, white space, control characters and any others, of at least `size` bytes."""
    rand = random.Random(0)
    parts = source_files(size // 2)
    total = sum(len(part.encode()) for part in parts)
    while total < size:
        kind = rand.random()
        if kind < 0.5:
            part = rand.choice(_ODD) * rand.choice([1, 1, 1, 2, 9])
        elif kind < 0.8:
            part = rand.choice(_WORDS) + rand.choice(["", " "])
        else:
            part = chr(rand.choice([rand.randrange(0x20), rand.randrange(0xD800), rand.randrange(0xE000, 0x110000)]))
        parts.append(part)
        total += len(part.encode())
    return "".join(parts)


def test_a_megabyte_of_mixed_text(trained, theirs):
    text = mixed_text(1 << 20)
    assert len(text.encode()) >= 1 << 20
    ids = trained.encode(text)
    assert len(set(ids)) > 2500, "the text is to reach most of the vocabulary"
    assert theirs(text, split_special_tokens=True)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs("def f7(x):\n    return x + 7")["input_ids"] == trained.encode("def f7(x):\n    return x + 7")


_TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*_ODD, *_WORDS, *SPECIAL_TOKENS, "def ", "self.", "return", "        ", "ab", "selfself.x"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    ),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("name", ["tokenizer", "trained", "across_words"])
def test_every_text(name, request):
    ours = request.getfixturevalue(name)
    other = in_tokenizers(ours)

    @settings(max_examples=300, deadline=None)
    @given(_TEXTS)
    @example(" " * 41 + "x" + " " * 7 + "\n" + " " * 41)
    @example("a" * 300)
    @example("")
    def equal(text):
        ids = other.encode(text).ids
        assert ids == ours.encode(text, allow_special=True)
        assert other.decode(ids, skip_special_tokens=False) == text
        assert other.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special=True)

    equal()


def test_every_id_and_special_token(trained, theirs):
    assert len(theirs) == theirs.vocab_size == trained.vocab_size
    assert [theirs.decode([i]) for i in range(3000)] == [trained.decode([i]) for i in range(3000)]
    for name in SPECIAL_TOKENS:
        i = trained.special_id(name)
        assert theirs.convert_tokens_to_ids(name) == i
        assert theirs(f"a {name}\n    {name}b")["input_ids"] == trained.encode(f"a {name}\n    {name}b", True)
        assert theirs(name)["input_ids"] == [i]
        assert theirs.decode([i], skip_special_tokens=True) == (name if name in AS_TEXT else "")
        if name not in AS_TEXT:
            assert theirs(name, split_special_tokens=True)["input_ids"] == trained.encode(name) != [i]
    assert set(theirs.all_special_ids) == {trained.special_id(name) for name in SPECIAL_TOKENS if name not in AS_TEXT}
    assert (theirs.eos_token_id, theirs.pad_token_id) == (trained.eos_id, trained.pad_id)
    assert theirs.unk_token is theirs.bos_token is None


def test_there_and_back(trained, exported, theirs, tmp_path):
    """Our own loader opens what is exported; what transformers saves again still gives the same ids."""
    text = mixed_text(20_000)
    again = load_tokenizer(exported)
    assert again.fingerprint == trained.fingerprint
    assert again.encode(text) == trained.encode(text)
    theirs.save_pretrained(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert saved(text)["input_ids"] == trained.encode(text, allow_special=True)
    with pytest.raises(UserError, match=r"is not Qwen's tokenizer.json .* or give a SentencePiece .model file"):
        load_tokenizer(tmp_path)  # tokenizer.model is gone: an error, not other ids


def test_the_last_pair_is_sentencepiece_s(across_words):
    """For each piece's text: sentencepiece gives the piece itself exactly if `last_pair` finds a pair, else parts."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(across_words.path))
    pieces = read_model(across_words.path.read_bytes()).pieces
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    assert sum(" " in piece.text.strip("▁").replace("▁", " ") for piece in pieces) > 50
    for text in (text for text in scores if len(text) > 1):
        pair = last_pair(text, scores)
        assert (processor.encode(text.replace("▁", " "), out_type=str) == [text]) == (pair is not None)
        if pair is not None:
            assert "".join(pair) == text


def test_the_model_file_is_read_whole(tokenizer):
    model = read_model(tokenizer.path.read_bytes())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert (model.algorithm, model.has_chars_map, model.escapes_spaces) == (BPE, False, True)
    assert len(model.pieces) == processor.get_piece_size()
    kinds = {UNKNOWN: processor.is_unknown, CONTROL: processor.is_control, BYTE: processor.is_byte}
    for i, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (processor.id_to_piece(i), processor.get_score(i))
        assert all((piece.kind == kind) == tells(i) for kind, tells in kinds.items())
    for content in (tokenizer.path.read_bytes()[:-1], b"\x0a\xff", b"\x0b"):
        with pytest.raises(ValueError, match="cut short|unknown kind"):
            read_model(content)


@pytest.mark.parametrize(
    "field", [b"\x08\x05", b"\x0dabcd", b"\x10\x01", b"\x0a\x02\x08\x05", b"\x0a\x05\x0a\x01z\x10\x05"]
)
def test_a_field_of_another_kind_is_damage(field, tokenizer, tmp_path):
    """Each is an error, although the sentencepiece library itself ignores some of them."""
    (tmp_path / "m.model").write_bytes(tokenizer.path.read_bytes() + field)
    with pytest.raises(UserError, match=r"m\.model"):
        SentencePieceTokenizer.load(tmp_path / "m.model").export(tmp_path / "out")


def test_a_piece_that_is_no_text_is_damage(tokenizer, tmp_path):
    (tmp_path / "m.model").write_bytes(tokenizer.path.read_bytes() + b"\x0a\x04\x0a\x02\xff\xfe")
    with pytest.raises(UserError, match=r"m.model has a piece that is not UTF-8"):
        SentencePieceTokenizer.load(tmp_path / "m.model")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model_type": "unigram"}, "its model_type is not bpe"),
        ({"user_defined_symbols": ["<|"]}, r"its user-defined symbol '<\|' overlaps the special token '<\|endoftext"),
        ({"user_defined_symbols": ["   "]}, "its piece '   ' holds a space"),
        ({"user_defined_symbols": ["x<", "k>y"]}, r"its user-defined symbol 'x<' overlaps"),
    ],
)
def test_what_has_no_such_form_is_refused(options, words, tmp_path):
    merged = {**module.TRAINER_OPTIONS, "hard_vocab_limit": False, **options}
    with (tmp_path / "foreign.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f"] * 9), model_writer=file, vocab_size=320, minloglevel=2, **merged
        )
    foreign = SentencePieceTokenizer.load(tmp_path / "foreign.model")
    with pytest.raises(UserError, match=rf"foreign.model cannot be written as tokenizer.json: {words}"):
        foreign.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    foreign.save(tmp_path / "kept")  # a run can keep a copy of it all the same
    assert load_tokenizer(tmp_path / "kept").fingerprint == foreign.fingerprint
