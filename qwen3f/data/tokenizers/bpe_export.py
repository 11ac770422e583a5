"""A byte-level BPE vocabulary written for Hugging Face: vocab.json, merges.txt and tokenizer_config.json.

For tokenizers that were read from qwen.tiktoken, which transformers cannot read. It has no merges: they are recovered
from the order of the tokens. The config alone is for vocab.json and merges.txt without a list of added tokens.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen3f.data.tokenizers.bpe_files import MERGES, TOKENIZER_CONFIG, VOCAB, Vocabulary, to_text
from qwen3f.errors import UserError
from qwen3f.files import write_atomically


def write_vocabulary(vocabulary: Vocabulary, directory: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, which transformers and `read_vocabulary` load.

    Deviation from Qwen's own tokenizer_config.json: no chat template is in it (`qwen3f.interop.hf` writes one).

    Raises:
        UserError: a token is not the merge of two earlier ones.
    """
    vocab = {to_text(token): i for i, token in enumerate(vocabulary.tokens)}
    pairs = recover_merges(vocabulary.tokens)
    merges = ["#version: 0.2", *(f"{to_text(left)} {to_text(right)}" for left, right in pairs), ""]
    write_atomically(directory / VOCAB, json.dumps(vocab, ensure_ascii=False).encode())
    write_atomically(directory / MERGES, "\n".join(merges).encode())
    write_config(vocabulary, directory, None)


def write_config(vocabulary: Vocabulary, directory: Path, own: Mapping[str, Any] | None) -> None:
    """Write tokenizer_config.json with the added tokens, which stand nowhere else beside vocab.json and merges.txt.

    Args:
        own: the other content of the file; None: that of Qwen's own file.
    """
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(token.id): {"content": name, **plain, "special": token.special} for name, token in vocabulary.added.items()
    }
    qwens = {
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    config = {**(qwens if own is None else own), "added_tokens_decoder": added}
    write_atomically(directory / TOKENIZER_CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def recover_merges(tokens: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    """For each token from id 256 on, the pair of parts that it is merged from.

    They are what is left when the token's bytes are merged by the earlier merges only.

    Args:
        tokens: as in `Vocabulary`.

    Raises:
        UserError: more or less than two parts are left.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for token, i in list(ids.items())[256:]:
        parts = [token[n : n + 1] for n in range(len(token))]
        while len(parts) > 2:
            results = [ids.get(left + right, i) for left, right in itertools.pairwise(parts)]
            best = min(results)
            if best == i:
                break
            at = results.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) != 2:
            raise UserError(f"Token {i} ({token!r}) of the vocabulary is not the merge of two earlier tokens.")
        pairs.append((parts[0], parts[1]))
    return pairs
