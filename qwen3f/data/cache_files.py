"""The files of a token cache; see `token_cache`."""

import numpy as np

FORMAT_VERSION = 1
TOKENS, OFFSETS, BYTES, META = "tokens.bin", "doc_offsets.bin", "doc_bytes.bin", "meta.json"


def token_dtype(vocab_size: int) -> np.dtype:
    """Of the tokens: uint16 where every id fits."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
