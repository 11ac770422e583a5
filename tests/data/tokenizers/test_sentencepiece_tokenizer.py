"""The tokenizer is lossless and deterministic, reads names of special tokens as text, and explains what it refuses."""

import hashlib

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3f.data.tokenizers import sentencepiece_tokenizer as module
from qwen3f.data.tokenizers.sentencepiece_tokenizer import SPECIAL_TOKENS, SentencePieceTokenizer, train_sentencepiece
from qwen3f.errors import UserError

# All of Unicode without surrogates, with what SentencePiece treats specially made frequent.
_HARD = st.sampled_from(
    ["▁", " ", "  ", "\n", "\t", "\r\n", "\0", "▅", "\ufffd", "é", "👩‍👧", "<unk>", "<0x0A>", "<s>", "⁇"]
)
_TEXTS = st.lists(st.one_of(_HARD, st.text(st.characters(exclude_categories=["Cs"]), max_size=5))).map("".join)


@settings(max_examples=300, deadline=None)
@given(_TEXTS)
@example("▁ ▁▁a▁")
@example("\0\r\n\t \u2028\u0085\ufeff")
@example("<|im_start|>user\n<think></think><|endoftext|>")
def test_round_trip_is_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    specials = {tokenizer.special_id(name) for name in SPECIAL_TOKENS}
    assert not specials.intersection(ids), "plain text reached a special token"
    batch = tokenizer.encode_batch([text, "x", text], num_threads=2)
    assert [each.tolist() for each in batch] == [ids, tokenizer.encode("x"), ids]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), st.sampled_from(["a b", "▁", "\n", "<|im_", "|>"]))))
def test_allow_special_encodes_each_special_as_one_id(tokenizer, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(ids) == text
    for name in SPECIAL_TOKENS:
        assert ids.count(tokenizer.special_id(name)) == text.count(name)


def test_special_ids(tokenizer):
    ids = [tokenizer.special_id(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(1, 11))  # after <unk>, in this order
    assert tokenizer.eos_id == tokenizer.pad_id == ids[0]
    text = "<|im_start|>hi<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True), skip_special=True) == "hi"
    thought = "<think>\nhm\n</think>\n\n4"
    assert tokenizer.decode(tokenizer.encode(thought, allow_special=True), skip_special=True) == thought
    with pytest.raises(UserError, match=r"'<\|nope\|>' is no special token: choose one of <\|endoftext\|>"):
        tokenizer.special_id("<|nope|>")


def test_digits_stay_apart(tmp_path):
    trained = train_sentencepiece(["released in 2024, changed in 2024"] * 50, 330, tmp_path / "x.model")
    assert len(trained.encode("released")) < 4
    assert trained.encode("2024") == [i for digit in "2024" for i in trained.encode(digit)]


@pytest.mark.parametrize("texts", [["愛知県" * 40], ["愛知県" * 4000 + " "]])
def test_text_without_spaces_still_yields_a_lossless_tokenizer(texts, tmp_path):
    trained = train_sentencepiece(texts, 308, tmp_path / "x.model")
    assert trained.decode(trained.encode(" a  ▁ 愛\n")) == " a  ▁ 愛\n"
    assert len(trained.encode(" ")) == 1


def test_letters_and_punctuation_merge(tmp_path):
    trained = train_sentencepiece(["self.value(self.other)"] * 50, 345, tmp_path / "x.model")
    assert len(trained.encode("self.")) == 1


@pytest.mark.parametrize("odd", [*"▁▅\0\x1f\t\r\x0b\x85\ufeff\ufffd\uffff⁇", "\u2028", "<unk>", "<0x41>", "</s>"])
def test_no_character_keeps_its_line_from_being_learnt(odd, code_texts, tmp_path):
    """Half of the corpus has the character in every line. The words around it must be learnt all the same."""
    plain, marked = ["alphabet\n"] * 300, [f"gamma{odd} delta{odd}\n"] * 300
    trained = train_sentencepiece([*plain, *marked, *code_texts], 360, tmp_path / "x.model")
    for word in ("alphabet", "gamma", " delta"):
        assert len(trained.encode(word)) <= 3, word
    text = f"gamma{odd} delta{odd}\n"
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("odd", "▁▅")
def test_text_is_cut_at_what_sentencepiece_reserves(odd, tmp_path):
    """The model equals that of text cut by hand. Text after a cut is no line start, so its leading spaces count."""
    whole = [f"    alpha{odd}    beta gamma{odd}{odd}delta\n"] * 200
    cut = ["alpha", "    beta gamma", "delta"] * 200
    a = train_sentencepiece(whole, 320, tmp_path / "a.model")
    options = {**module.TRAINER_OPTIONS, "vocab_size": 320, "minloglevel": 2}
    with (tmp_path / "b.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([" ", *cut]), model_writer=file, **options)
    assert a.path.read_bytes() == (tmp_path / "b.model").read_bytes()


@pytest.mark.parametrize("start", ["\n", "\n    ", "\n\n", "\n\n        ", "\n\n\n" + 32 * " "])
def test_a_line_end_takes_its_indentation_along(tokenizer, start):
    assert len(tokenizer.encode(start)) == 1
    apart = tokenizer.encode("alpha") + tokenizer.encode(start) + tokenizer.encode("beta")
    assert tokenizer.encode(f"alpha{start}beta") == apart  # no other piece crosses a line end


def test_other_indentation_is_lossless(tokenizer):
    text = "a\n  b\n     c\n\n\n\n      d\n" + " " * 41 + "e\n    \n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_invalid_bytes_and_ids(tokenizer):
    first_byte_of_two = tokenizer.encode("\u0416")[0]
    assert tokenizer.decode([first_byte_of_two]) == "\ufffd"
    with pytest.raises(UserError, match=r"Token id 340 is outside the vocabulary of .*code.model: ids are 0 to 339"):
        tokenizer.decode([340])
    with pytest.raises(UserError, match="Token id -1 "):
        tokenizer.decode([-1])


@pytest.mark.parametrize("encode", ["encode", "encode_batch"])
def test_surrogate_is_refused(tokenizer, encode):
    text = "ab\ud800"
    with pytest.raises(UserError, match=r"Character 2 of the text is the lone surrogate U\+D800"):
        getattr(tokenizer, encode)(text if encode == "encode" else ["fine", text])


def test_training_is_deterministic_and_atomic(tokenizer, code_texts, tmp_path):
    again = train_sentencepiece(iter(code_texts), 340, tmp_path / "sub" / "again.model")
    assert again.path.read_bytes() == tokenizer.path.read_bytes()
    assert again.fingerprint == tokenizer.fingerprint == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    assert [p.name for p in again.path.parent.iterdir()] == ["again.model"]  # no temporary file is left
    assert again.vocab_size == 340
    assert SentencePieceTokenizer.load(again.path).encode("return") == tokenizer.encode("return")


def test_vocabulary_size_errors_name_a_bound_that_works(code_texts, tmp_path):
    path = tmp_path / "x.model"
    with pytest.raises(UserError, match=r"100000 is too large for this corpus: set model.vocab_size to (\d+)") as error:
        train_sentencepiece(code_texts, 100_000, path)
    assert not path.exists()
    bound = int(str(error.value).split("vocab_size to ")[1].split()[0])
    assert train_sentencepiece(code_texts, bound, path).vocab_size == bound
    with pytest.raises(UserError, match=rf"{bound + 1} is too large"):
        train_sentencepiece(code_texts, bound + 1, path)

    with pytest.raises(UserError, match=r"200 is too small for this corpus: set model.vocab_size to (\d+)") as error:
        train_sentencepiece(code_texts, 200, path)
    bound = int(str(error.value).split("vocab_size to ")[1].split()[0])
    assert train_sentencepiece(code_texts, bound, path).vocab_size == bound


@pytest.mark.parametrize("texts", [[], ["", ""], [" \n\t"]])
def test_training_without_text_is_refused(texts, tmp_path):
    with pytest.raises(UserError, match="no text to train on"):
        train_sentencepiece(texts, 300, tmp_path / "x.model")


def test_training_sample_is_bounded_deterministic_and_spread():
    texts = [f"{i:04d}" * 1024 for i in range(500)]  # one chunk of 4,096 characters each
    chunks = module._sample_chunks(iter(texts), 100 * 4096)
    assert 50 <= len(chunks) <= 100
    assert chunks == module._sample_chunks(iter(texts), 100 * 4096)
    assert set(chunks) <= set(texts)
    numbers = [int(chunk[:4]) for chunk in chunks]
    assert numbers == sorted(numbers)
    assert min(numbers) < 50
    assert max(numbers) > 450
    assert module._sample_chunks(texts, 500 * 4096) == texts
    assert "".join(module._sample_chunks(["ab" * 5000], 10**6)) == "ab" * 5000


def _foreign_model(path, **options):
    merged = {**module.TRAINER_OPTIONS, "hard_vocab_limit": False, **options}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f"] * 9), model_writer=file, vocab_size=320, minloglevel=2, **merged
        )
    return path


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"control_symbols": list(SPECIAL_TOKENS[2:])},
            r"lacks the control symbol.*<\|endoftext\|>, <\|im_start\|>: train",
        ),
        ({"control_symbols": [], "user_defined_symbols": list(SPECIAL_TOKENS)}, "lacks the control symbol"),
        ({"normalization_rule_name": "nfkc"}, "normalises text"),
        ({"add_dummy_prefix": True}, "normalises text"),
        ({"remove_extra_whitespaces": True}, "normalises text"),
        ({"byte_fallback": False}, "has no byte pieces: train it with byte_fallback=True"),
    ],
)
def test_foreign_models_that_would_be_lossy_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        SentencePieceTokenizer.load(_foreign_model(tmp_path / "foreign.model", **options))


def test_load_errors(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*absent.model: give --config.data.tokenizer the path"):
        SentencePieceTokenizer.load(tmp_path / "absent.model")
    (tmp_path / "broken.model").write_bytes(b"\xff\xfe nonsense")
    with pytest.raises(UserError, match=r"broken.model is not a SentencePiece model"):
        SentencePieceTokenizer.load(tmp_path / "broken.model")
