"""Makes a tokenizer of any size, for this project and for transformers, so that benchmarks need no model's files.

Its merges are all pairs of bytes, then all pairs with a third byte. English takes about one token for two letters.
"""

import itertools
import json
from pathlib import Path
from typing import Any

from qwen3f.data.tokenizers.bpe_files import PATTERN, TOKENIZER_JSON, to_text
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.errors import UserError

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISIBLE = ("<think>", "</think>")
_COMMON = b" etaoinshrdlcumwfgypbvkABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # their pairs come first
_QWEN3 = 151_669  # ids of the released tokenizer


def write_tokenizer(place: Path, vocab_size: int) -> QwenTokenizer:
    """Writes a tokenizer with vocab_size ids, but no more than Qwen3's has. Raises UserError for less than 300."""
    if vocab_size < 300:
        raise UserError(f"a vocabulary of {vocab_size} has no room for the bytes and merges; use 300 or more")
    names = SPECIAL + VISIBLE
    size = min(vocab_size, _QWEN3) - len(names)
    single = [bytes([value]) for value in dict.fromkeys([*_COMMON, *range(256)])]
    pairs = [(a, b) for a, b in itertools.product(single, single)]
    triples = ((a + b, c) for (a, b), c in itertools.product(pairs, single))
    merges = list(itertools.islice(itertools.chain(pairs, triples), size - 256))
    tokens = [*single, *(a + b for a, b in merges)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": size + n, "content": name, **flags, "special": name in SPECIAL} for n, name in enumerate(names)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {to_text(token): i for i, token in enumerate(tokens)},
            "merges": [[to_text(a), to_text(b)] for a, b in merges],
        },
    }
    place.mkdir(parents=True, exist_ok=True)
    (place / TOKENIZER_JSON).write_text(json.dumps(content))
    return QwenTokenizer.load(place)


def transformers_tokenizer(place: Path) -> Any:
    """The same tokenizer, read by transformers."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(place / TOKENIZER_JSON), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
