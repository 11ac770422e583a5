"""Which files of a Qwen tokenizer are read, and what is said about damaged ones and those of other tokenizers."""

import base64
import json

import pytest

from qwen3f.data.tokenizers.bpe_export import recover_merges
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.errors import UserError
from tests.data.tokenizers.small_bpe import small_files, small_tokenizer_json


def test_the_first_form_is_read_and_a_file_chooses_its_own(tmp_path):
    small_files(tmp_path)
    content = small_tokenizer_json()
    content["added_tokens"].pop()  # to tell the forms apart
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert QwenTokenizer.load(tmp_path).vocab_size == 265
    for name in ("vocab.json", "merges.txt"):
        assert QwenTokenizer.load(tmp_path / name).vocab_size == 266
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "qwen.tiktoken").write_text("no token")
    assert QwenTokenizer.load(tmp_path).vocab_size == 266
    with pytest.raises(UserError, match="qwen.tiktoken line 1"):
        QwenTokenizer.load(tmp_path / "qwen.tiktoken")


def test_older_files_write_merges_as_text(small_qwen, tmp_path):
    content = small_tokenizer_json()
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert QwenTokenizer.load(tmp_path).fingerprint == small_qwen.fingerprint


def test_a_file_needs_no_post_processor(small_qwen, tmp_path):
    content = small_tokenizer_json() | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert QwenTokenizer.load(tmp_path).fingerprint == small_qwen.fingerprint


def _steps(content: dict) -> list[dict]:
    return content["pre_tokenizer"]["pretokenizers"]


def _swap(vocab: dict, one: str, other: str) -> None:
    vocab[one], vocab[other] = vocab[other], vocab[one]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("model"), r"is not Qwen's tokenizer.json \(KeyError\('model'\)\)"),
        (lambda c: c.update(normalizer=None), "is not Qwen's tokenizer.json"),
        (lambda c: c["model"].update(merges=7), "is not Qwen's tokenizer.json"),
        (lambda c: c["normalizer"].update(type="NFKC"), "works otherwise than Qwen's tokenizer .*NFKC"),
        (lambda c: c["model"].update(type="Unigram"), "works otherwise"),
        (lambda c: c["model"].update(byte_fallback=True), "works otherwise .*'byte_fallback': True"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"), "works otherwise"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "works otherwise .*'end_of_word_suffix': '</w>'"),
        (lambda c: _steps(c)[0].update(behavior="Removed"), "works otherwise .*'behavior': 'Removed'"),
        (lambda c: _steps(c)[1].update(add_prefix_space=True), "works otherwise .*'add_prefix_space': True"),
        (lambda c: _steps(c)[1].pop("add_prefix_space"), "works otherwise .*'add_prefix_space': True"),
        (lambda c: _steps(c)[1].pop("use_regex"), "works otherwise .*'use_regex': True"),
        (lambda c: c.update(post_processor={"type": "TemplateProcessing"}), "works otherwise .*'TemplateProcessing'"),
        (lambda c: c.update(post_processor=3), "is not Qwen's tokenizer.json"),
        (lambda c: c["model"].update(vocab=["a"]), "does not map tokens to integer ids"),
        (lambda c: c["model"]["vocab"].update({"the": 9}), "does not give each id from 0 to 260 once"),
        (lambda c: c["model"]["vocab"].update({"中": 261}), "token '中', which GPT-2's byte alphabet cannot spell"),
        (lambda c: c["model"]["vocab"].update({"a b": 261}), "token 'a b', which GPT-2's byte alphabet cannot spell"),
        (lambda c: _swap(c["model"]["vocab"], "a", "th"), "does not begin with the 256 single bytes"),
        (lambda c: _swap(c["model"]["vocab"], "the", "ĠĠĠĠ"), "merge 'th e' at place 2, which does not make token 258"),
        (lambda c: c["model"]["merges"].reverse(), "merge 'Ġ the' at place 0, .*tiktoken needs ids in the order"),
        (lambda c: c["model"]["merges"].__setitem__(1, ["th"]), "merge 'th' at place 1"),
        (lambda c: c["model"]["merges"].__setitem__(2, ["the", ""]), "merge 'the ' at place 2"),
        (lambda c: c["model"]["merges"].pop(), "has 4 merges for 261 tokens, not 5"),
        (lambda c: c.update(added_tokens=None), "lists an added token in an unknown form"),
        (lambda c: c["added_tokens"][0].pop("special"), "lists an added token in an unknown form"),
        (lambda c: c["added_tokens"][0].update(id="x"), "lists an added token in an unknown form"),
        (lambda c: c["added_tokens"][4].update(lstrip=True), "'</think>' has lstrip=true"),
        (lambda c: c["added_tokens"].pop(2), r"lists no added token <\|im_end\|>"),
        (lambda c: c["added_tokens"].pop(3), "has 261 tokens before the added ones, whose ids must be 261 to 264"),
        (lambda c: c["added_tokens"][0].update(id=260), "whose ids must be 261 to 265 but go from 260 to 265"),
    ],
)  # fmt: skip
def test_unsuited_tokenizer_json_is_refused(change, message, tmp_path):
    content = small_tokenizer_json()
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"tokenizer.json.* {message}"):
        QwenTokenizer.load(tmp_path)


def test_added_tokens_come_from_the_config(small_qwen, tmp_path):
    files = small_files(tmp_path)
    assert QwenTokenizer.load(tmp_path)._vocabulary == small_qwen._vocabulary
    files["tokenizer_config.json"].unlink()
    with pytest.raises(
        UserError, match="vocab.json has 261 tokens before the added ones, whose ids must be 261 to 286"
    ):
        QwenTokenizer.load(tmp_path)


def _added(name):
    return f'{{"added_tokens_decoder": {{"261": {{"content": "{name}", "special": true}}}}}}'.encode()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.json", b'{"a": 0', "vocab.json is not JSON"),
        ("vocab.json", b"[]", "vocab.json holds a JSON list"),
        ("vocab.json", b'{"a": 0, "a": 1}', "vocab.json has the key 'a' twice"),
        ("merges.txt", b"\xff\xfe", "merges.txt is not UTF-8"),
        ("merges.txt", b"", "merges.txt has 0 merges for 261 tokens"),
        ("merges.txt", b"a b\n" * 5, "merges.txt has the merge 'a b' at place 0"),
        ("merges.txt", None, "There is .*vocab.json but no .*merges.txt"),
        ("vocab.json", None, "There is .*merges.txt but no .*vocab.json"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "_config.json has added_tokens_decoder in"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": {}}}', "_config.json lists an added token in"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"%s": {}}}' % (b"9" * 5000), "added_tokens_decoder in"),
        ("tokenizer_config.json", _added(r"\ud800"), "_config.json lists an added token in"),
        ("tokenizer_config.json", _added(""), "_config.json lists an added token in"),
    ],
)  # fmt: skip
def test_damaged_vocab_and_merges_are_named(name, content, message, tmp_path):
    path = small_files(tmp_path)[name]
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        QwenTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: lines.__setitem__(2, b"AA=="), "qwen.tiktoken line 3 is no token in base64 and rank"),
        (lambda lines: lines.__setitem__(2, b"A* 2"), "qwen.tiktoken line 3 is no token"),
        (lambda lines: lines.__setitem__(2, b"AA== two"), "qwen.tiktoken line 3 is no token"),
        (lambda lines: lines.pop(2), "qwen.tiktoken does not give each id from 0 to 254 once"),
        (lambda lines: lines.append(lines[0]), "qwen.tiktoken has 256 tokens before the added ones, .* 256 to 281"),
        (lambda lines: lines.append(b"AAA= 257"), "qwen.tiktoken does not give each id from 0 to 256 once"),
        (lambda lines: lines.append(b" 256"), "line 257 is no token"),
        (lambda lines: lines.clear(), "does not begin with the 256 single bytes"),
    ],
)
def test_damaged_tiktoken_files_are_named(change, message, tmp_path):
    lines = [base64.b64encode(bytes([value])) + b" %d" % value for value in range(256)]
    change(lines)
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=message):
        QwenTokenizer.load(tmp_path)


def as_some_editors_save(path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_a_signature_and_windows_line_ends_are_no_part_of_the_files(form, tmp_path):
    if form == "vocab.json":
        files = list(small_files(tmp_path).values())
    else:
        files = [tmp_path / form]
        files[0].write_text(json.dumps(small_tokenizer_json(), indent=1))
    plain = QwenTokenizer.load(tmp_path).encode("the 7 cats\r\n")
    for path in files:
        as_some_editors_save(path)
    assert QwenTokenizer.load(tmp_path).encode("the 7 cats\r\n") == plain


def test_a_signature_is_no_part_of_the_first_token_for_tiktoken(tmp_path):
    lines = [base64.b64encode(bytes([value])) + b" %d\n" % value for value in range(256)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    as_some_editors_save(tmp_path / "qwen.tiktoken")
    with pytest.raises(UserError, match="has 256 tokens before the added ones"):  # all of them were read
        QwenTokenizer.load(tmp_path)


def test_merges_that_cannot_be_recovered_are_refused():
    single = [bytes([value]) for value in range(256)]
    assert recover_merges([*single, b"ab", b"abab"]) == [(b"a", b"b"), (b"ab", b"ab")]
    with pytest.raises(UserError, match="Token 257 .*is not the merge of two earlier"):
        recover_merges([*single, b"ab", b"abc" + b"d"])


def test_absent_files(tmp_path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match=f"no Qwen tokenizer at {path}: give a directory with tokenizer.json"):
            QwenTokenizer.load(path)
