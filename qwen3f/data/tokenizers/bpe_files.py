"""A byte-level BPE vocabulary in the three forms that Qwen's comes in.

* `tokenizer.json` (Hugging Face's fast tokenizer): vocabulary, merges, added tokens, and the pattern that cuts text;
* `vocab.json` + `merges.txt` (GPT-2's form), with the added tokens in `tokenizer_config.json`;
* `qwen.tiktoken`: a line a token, its bytes in base64 and its rank.

The first two write bytes as printable characters (GPT-2's alphabet). tiktoken knows no list of merges: it merges
first the pair whose result has the lowest id. So a file is refused unless its k-th merge makes the token of id 256 + k.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3f.errors import UserError
from qwen3f.files import decode_text, read_bounded
from qwen3f.strict_json import read_object

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Cuts text into the pieces that are merged on their own; part of Qwen's tokenizer.json."""

TOKENIZER_JSON, VOCAB, MERGES, TIKTOKEN = "tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken"
TOKENIZER_CONFIG = "tokenizer_config.json"

_BASE_SIZE = 151_643
_CONTROLS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_VISIBLE = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_WORKINGS: Mapping[str, tuple[Any, ...]] = {
    "model": ("BPE",),
    "normalizer": ("NFC",),
    "pre_tokenizers": (["Split", "ByteLevel"],),
    "pattern": (PATTERN,),
    "behavior": ("Isolated",),
    "post_processor": (None, "ByteLevel"),  # ByteLevel's moves offsets only
}
"""The values that each key of `_workings` may have. Any other key must be off: None, False or ""."""

_DIGITS = 10  # of an id; more than any vocabulary needs
_NEEDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class AddedToken:
    """A token outside the merges. One that is not `special` stays visible when special tokens are skipped."""

    id: int
    special: bool


ADDED_TOKENS: Mapping[str, AddedToken] = {
    name: AddedToken(_BASE_SIZE + n, n < len(_CONTROLS)) for n, name in enumerate(_CONTROLS + _VISIBLE)
}
"""Qwen3's 26, for files that do not list them."""


@dataclass(frozen=True)
class Vocabulary:
    """What the files hold, whatever their form.

    Attributes:
        tokens: bytes by id: 256 single bytes, then the result of each merge, first merge first.
        added: the added tokens by name; their ids follow those of `tokens` without a gap.
    """

    tokens: tuple[bytes, ...]
    added: Mapping[str, AddedToken]


def find_form(path: Path) -> tuple[Path, ...] | None:
    """The files to read for `path`, a directory or one of the files; None if there is no vocabulary.

    Of several forms in a directory the first of tokenizer.json, vocab.json + merges.txt, qwen.tiktoken is taken.

    Raises:
        UserError: one of vocab.json and merges.txt is there without the other.
    """
    place = path if path.is_dir() else path.parent
    forms = [(place / TOKENIZER_JSON,), (place / VOCAB, place / MERGES), (place / TIKTOKEN,)]
    if not path.is_dir():
        forms = [(path,)] if path.suffix == ".tiktoken" else [form for form in forms if path in form]
    for form in forms:
        there = [file for file in form if file.is_file()]
        if len(there) == len(form):
            return form
        if there:
            missing = next(file for file in form if file not in there)
            raise UserError(f"There is {there[0]} but no {missing}: copy both into one directory.")
    return None


def read_vocabulary(form: tuple[Path, ...]) -> Vocabulary:
    """Read what `find_form` found.

    Raises:
        UserError: a file is damaged, or not of a tokenizer that works as Qwen's does; the message names the file.
    """
    if form[0].name == TOKENIZER_JSON:
        return _read_tokenizer_json(form[0])
    if len(form) == 2:
        return _read_vocab_and_merges(*form)
    return _read_tiktoken(form[0])


def _read_tokenizer_json(path: Path) -> Vocabulary:
    content = read_object(path)
    try:
        found = _workings(content)
        vocab, listed = content["model"]["vocab"], content["added_tokens"]
        pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in content["model"]["merges"]]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} is not Qwen's tokenizer.json ({error!r}): copy or download it again, or give a SentencePiece "
            ".model file."
        ) from error
    if odd := {key: value for key, value in found.items() if value not in _WORKINGS.get(key, (None, False, ""))}:
        raise UserError(f"{path} works otherwise than Qwen's tokenizer ({odd}): give the tokenizer of a Qwen3 model.")
    tokens = _tokens_by_id(path, vocab)
    _check_merges(path, tokens, pairs)
    return _complete(path, tokens, _added(path, listed))


def _workings(content: dict[str, Any]) -> dict[str, Any]:
    """The settings of a tokenizer.json that decide the ids, besides its vocabulary; to be compared with `_WORKINGS`.

    Raises KeyError, TypeError, IndexError or AttributeError for a file of another form.
    """
    model, steps, post = content["model"], content["pre_tokenizer"]["pretokenizers"], content.get("post_processor")
    options = ("unk_token", "dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix")
    return {
        "model": model.get("type"),
        **{key: model.get(key) for key in (*options, "end_of_word_suffix")},
        "normalizer": content["normalizer"]["type"],
        "pre_tokenizers": [step["type"] for step in steps],
        "pattern": steps[0]["pattern"]["Regex"],
        "behavior": steps[0].get("behavior"),
        # Both are on where a file does not say.
        "add_prefix_space": steps[-1].get("add_prefix_space", True),
        "use_regex": steps[-1].get("use_regex", True),
        "post_processor": None if post is None else post["type"],
    }


def _read_vocab_and_merges(vocab_file: Path, merges_file: Path) -> Vocabulary:
    tokens = _tokens_by_id(vocab_file, read_object(vocab_file))
    try:
        lines = decode_text(read_bounded(merges_file)).split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{merges_file} is not UTF-8 ({error}): copy or download it again.") from error
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    _check_merges(merges_file, tokens, [tuple(line.split(" ")) for line in lines if line])
    config = vocab_file.with_name(TOKENIZER_CONFIG)
    listed = read_object(config).get("added_tokens_decoder") if config.is_file() else None
    if listed is None:
        return _complete(vocab_file, tokens, ADDED_TOKENS)
    numbered = isinstance(listed, dict) and all(i.isdecimal() and len(i) < _DIGITS for i in listed)
    if not numbered or not all(isinstance(token, dict) for token in listed.values()):
        raise UserError(f"{config} has added_tokens_decoder in an unknown form: copy or download it again.")
    return _complete(config, tokens, _added(config, [{**token, "id": int(i)} for i, token in listed.items()]))


def _read_tiktoken(path: Path) -> Vocabulary:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bounded(path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path} line {number} is no token in base64 and rank ({error}): copy or download it again."
            ) from error
    tokens = _in_order(path, ranks)
    for i, token in enumerate(tokens[256:], 256):
        if len(token) < 2:
            raise UserError(f"{path} has {token!r} as token {i}, where no single byte belongs: download it again.")
    return _complete(path, tokens, ADDED_TOKENS)


def _tokens_by_id(path: Path, vocab: Any) -> tuple[bytes, ...]:
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise UserError(f"{path} does not map tokens to integer ids: copy or download it again.")
    return _in_order(path, {to_bytes(path, token): i for token, i in vocab.items()})


def _in_order(path: Path, ids: Mapping[bytes, int]) -> tuple[bytes, ...]:
    tokens = tuple(sorted(ids, key=ids.__getitem__))
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise UserError(f"{path} does not give each id from 0 to {len(tokens) - 1} once: copy or download it again.")
    if {bytes([value]) for value in range(256)} != set(tokens[:256]):
        raise UserError(f"{path} does not begin with the 256 single bytes: give the tokenizer of a Qwen3 model.")
    return tokens


def _check_merges(path: Path, tokens: tuple[bytes, ...], pairs: list[tuple[str, ...]]) -> None:
    """Merge k must make token 256 + k out of earlier ones: then the order of ids is the order of merges."""
    if len(pairs) != len(tokens) - 256:
        raise UserError(
            f"{path} has {len(pairs)} merges for {len(tokens)} tokens, not {len(tokens) - 256}: download it again."
        )
    ids = {token: i for i, token in enumerate(tokens)}
    for k, pair in enumerate(pairs):
        parts = [to_bytes(path, part) for part in pair]
        made = 256 + k
        if len(parts) != 2 or b"".join(parts) != tokens[made] or any(ids.get(part, made) >= made for part in parts):
            raise UserError(
                f"{path} has the merge {' '.join(map(str, pair))!r} at place {k}, which does not make token {made} out "
                "of earlier ones: tiktoken needs ids in the order of merges, as in the tokenizer of a Qwen3 model."
            )


def _added(path: Path, listed: Any) -> dict[str, AddedToken]:
    added: dict[str, AddedToken] = {}
    try:
        for token in listed:
            odd = [key for key in ("lstrip", "rstrip", "single_word", "normalized") if token.get(key)]
            if odd:
                raise UserError(
                    f"{path}: the added token {token['content']!r} has {odd[0]}=true, which Qwen3's never do."
                )
            name, number = token["content"], token["id"]
            if type(name) is not str or not name or type(number) is not int:
                raise TypeError(f"{name!r}: {number!r}")
            name.encode()
            added[name] = AddedToken(number, bool(token["special"]))
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise UserError(f"{path} lists an added token in an unknown form ({error!r}): download it again.") from error
    return added


def _complete(path: Path, tokens: tuple[bytes, ...], added: Mapping[str, AddedToken]) -> Vocabulary:
    if missing := [name for name in _NEEDED if name not in added]:
        raise UserError(f"{path} lists no added token {missing[0]}: give the tokenizer of a Qwen3 model.")
    first, last = len(tokens), len(tokens) + len(added) - 1
    if sorted(token.id for token in added.values()) != list(range(first, last + 1)):
        raise UserError(
            f"{path} has {first} tokens before the added ones, whose ids must be {first} to {last} but go from "
            f"{min(t.id for t in added.values())} to {max(t.id for t in added.values())}: copy or download it again."
        )
    return Vocabulary(tokens, dict(added))


# -- GPT-2's byte alphabet, in which the files spell tokens: one character a byte --------------------------------------


def _alphabet() -> dict[int, int]:
    """GPT-2's character (a code point) for each byte: itself if printable in Latin-1, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {value: value for value in printable} | {value: 0x100 + n for n, value in enumerate(others)}


_CHARACTERS = _alphabet()
_BYTES: dict[int, int | None] = {i: None for i in _CHARACTERS} | {char: value for value, char in _CHARACTERS.items()}


def to_text(token: bytes) -> str:
    """How the files spell a token."""
    return token.decode("latin-1").translate(_CHARACTERS)


def to_bytes(path: Path, token: Any) -> bytes:
    """The bytes that a spelling in `path` stands for. Raises UserError if it is none."""
    try:
        content = token.translate(_BYTES).encode("latin-1")
    except (AttributeError, UnicodeEncodeError) as error:
        raise UserError(f"{path} has the token {token!r}, which GPT-2's byte alphabet cannot spell.") from error
    if len(content) != len(token):
        raise UserError(f"{path} has the token {token!r}, which GPT-2's byte alphabet cannot spell.")
    return content
