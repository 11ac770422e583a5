"""A SentencePiece BPE model written for Hugging Face: tokenizer.json and tokenizer_config.json.

The ids are the same for every text, not only nearly:

* Pieces are spelled with spaces, not U+2581, and text is not normalised. So a literal U+2581 falls back to its bytes,
  as in `sentencepiece_tokenizer`.
* User-defined symbols are added tokens: both libraries cut them out first, the longest of those that begin leftmost.
* SentencePiece merges the two neighbours whose joined text has the best score, the leftmost of equals; the library
  tokenizers has ranked pairs. Until a stretch of text has become one piece, no merge crosses its ends; so it is merged
  as if it stood alone. Each piece therefore has exactly one last pair, which `last_pair` finds.
"""

import itertools
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qwen3f.data.tokenizers.bpe_files import TOKENIZER_CONFIG, TOKENIZER_JSON
from qwen3f.data.tokenizers.sentencepiece_proto import BPE, NORMAL, UNUSED, USER_DEFINED, Model
from qwen3f.errors import UserError
from qwen3f.files import write_atomically

_SPACE = "\u2581"
_PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def write_tokenizer_json(
    model: Model, path: Path, special_ids: Mapping[str, int], as_text: Collection[str], directory: Path
) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers loads as a PreTrainedTokenizerFast.

    Special tokens are read in text, as transformers does with any model's, unless `split_special_tokens=True`.

    Args:
        model: the content of the file `path`, which errors name.
        special_ids: id by name, `<|endoftext|>` among them.
        as_text: names that stay in the text when special tokens are left out.

    Raises:
        UserError: the model works in a way that tokenizer.json cannot express.
    """
    content = tokenizer_json(model, path, special_ids, as_text)
    config = {
        "additional_special_tokens": [name for name in special_ids if name not in ("<|endoftext|>", *as_text)],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    write_atomically(directory / TOKENIZER_JSON, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())
    write_atomically(directory / TOKENIZER_CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def tokenizer_json(
    model: Model, path: Path, special_ids: Mapping[str, int], as_text: Collection[str]
) -> dict[str, Any]:
    """The content of tokenizer.json. Args and errors as `write_tokenizer_json`."""
    vocab = {_spell(piece.text): i for i, piece in enumerate(model.pieces)}
    symbols = {text: i for text, i in vocab.items() if model.pieces[i].kind == USER_DEFINED}
    scores = {text: model.pieces[i].score for text, i in vocab.items() if model.pieces[i].kind == NORMAL}
    pairs = {text: pair for text in scores if (pair := last_pair(text, scores))}
    if obstacle := _obstacle(model, vocab, symbols, special_ids) or _odd_merge(pairs, scores):
        raise UserError(
            f"{path} cannot be written as tokenizer.json: {obstacle}. Train it with the options of "
            "train_sentencepiece, or export without it (--config.tokenizer=False)."
        )
    added = {i: text for text, i in [*symbols.items(), *special_ids.items()]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": added[i], **_PLAIN, "special": added[i] in special_ids and added[i] not in as_text}
            for i in sorted(added)
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pairs[text]) for text in sorted(pairs, key=lambda text: -scores[text])],
        },
    }


def last_pair(text: str, scores: Mapping[str, float]) -> tuple[str, str] | None:
    """The two parts that SentencePiece joins last to make the piece `text`; None if its merges never make it.

    Args:
        scores: text of each normal piece -> its score.
    """
    parts = list(text)
    while len(parts) > 2:
        joined = [left + right for left, right in itertools.pairwise(parts)]
        at = max(range(len(joined)), key=lambda n: scores.get(joined[n], -math.inf))  # the first of equals
        if joined[at] not in scores:
            return None
        parts[at : at + 2] = [joined[at]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _obstacle(
    model: Model, vocab: Mapping[str, int], symbols: Mapping[str, int], special_ids: Mapping[str, int]
) -> str | None:
    """What in the model the library tokenizers cannot express, in words; None if there is nothing."""
    if model.algorithm != BPE:
        return "its model_type is not bpe"
    if model.has_chars_map or not model.escapes_spaces:
        return "it normalises text"
    if any(piece.kind == UNUSED for piece in model.pieces):
        return "it has pieces that are marked as unused"
    if odd := next((piece.text for piece in model.pieces if " " in piece.text), None):
        return f"its piece {odd!r} holds a space, which no text reaches (U+2581 stands for one)"
    if len(vocab) < len(model.pieces):
        return "two of its pieces are the same text"
    for symbol in symbols:
        if special := next((name for name in special_ids if _overlap(symbol, name)), None):
            return f"its user-defined symbol {symbol!r} overlaps the special token {special!r}"
    return None


def _odd_merge(pairs: Mapping[str, tuple[str, str]], scores: Mapping[str, float]) -> str | None:
    """A merge that shares its score with another, or has a part that is no piece, in words; None if there is none."""
    by_score: dict[float, str] = {}
    for text, pair in pairs.items():
        if by_score.setdefault(scores[text], text) != text:
            return f"its pieces {by_score[scores[text]]!r} and {text!r} have the same score"
        if unknown := [part for part in pair if part not in scores]:
            return f"it makes {text!r} out of {unknown[0]!r}, which is no piece"
    return None


def _overlap(a: str, b: str) -> bool:
    """Whether in some text `a` and `b` can share characters."""
    return a in b or b in a or any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in range(1, min(len(a), len(b))))


def _spell(piece: str) -> str:
    return piece.replace(_SPACE, " ")
