"""A tokenizer.json like Qwen's with a handful of merges; its bytes are spelled by Hugging Face's own alphabet."""

import json
from pathlib import Path

from tokenizers import pre_tokenizers

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = [("Ġ", "Ġ"), ("t", "h"), ("th", "e"), ("ĠĠ", "ĠĠ"), ("Ġ", "the")]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def small_tokenizer_json() -> dict:
    """A fresh copy each time, to change at will: 261 tokens and 5 added ones, the last two not `special`."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": len(tokens) + n, "content": name, **flags, "special": n < 3} for n, name in enumerate(SPECIALS)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in MERGES],
        },
    }


def small_files(directory: Path) -> dict[str, Path]:
    """Write it as vocab.json, merges.txt and tokenizer_config.json to `directory`; return the paths by name."""
    content = small_tokenizer_json()
    vocab = content["model"]["vocab"]
    files = {name: directory / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    files["vocab.json"].write_text(json.dumps(vocab))
    files["merges.txt"].write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in content["model"]["merges"]))
    added = {str(token.pop("id")): token for token in content["added_tokens"]}
    files["tokenizer_config.json"].write_text(json.dumps({"added_tokens_decoder": added}))
    return files
