"""The files of a token cache; see `token_cache`."""

import numpy as np

FORMAT_VERSION = 2
OFFSETS, BYTES, INDEX = "doc_offsets.bin", "doc_bytes.bin", "index.json"


def shard_name(number: int) -> str:
    """File of the shard `number`, from 0."""
    return f"tokens-{number:05}.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """Of the tokens: uint16 where every id fits."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
