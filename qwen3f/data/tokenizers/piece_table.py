"""A table from pieces of ASCII text to token ids, looked up for a whole buffer of pieces at once in numpy.

A piece of up to 16 bytes is two 64-bit words, which are the key themselves, so no two pieces can be confused. The table
is a hash table with open addressing; a piece that it lacks is encoded once and added. Longer pieces, a few in a
hundred, go through a dict. Both are emptied when they are full, so memory is bounded.
"""

from collections.abc import Callable

import numpy as np

from qwen3f.data.tokenizers.ascii_pieces import MARK, piece_starts

_WORD = 8
_KEY_BYTES = 2 * _WORD
_BITS = 18
_SLOTS = 2**_BITS
_MOST = _SLOTS // 2  # pieces; a fuller table probes longer
_MOST_LONG = 2**15
_BLOCK = 2**16  # pieces looked up at a time, no more than _MOST
_LONGEST_KEPT = 256  # bytes
_MASKS = np.array([256**n - 1 for n in range(_WORD)] + [2**64 - 1], np.uint64)
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
_SHIFT = np.uint64(64 - _BITS)


class PieceTable:
    """Ids of pieces. Only one thread at a time may use it.

    Args:
        encode: ids of one piece, at least one and no more than its bytes.
    """

    def __init__(self, encode: Callable[[bytes], list[int]]) -> None:
        self._encode = encode
        self._clear()

    def _clear(self) -> None:
        self._keys = np.zeros((2, _SLOTS), np.uint64)  # 0 in the first word: free; no text here holds NUL
        self._ids = np.zeros((_SLOTS, _KEY_BYTES), np.uint32)
        self._first = np.zeros(_SLOTS, np.uint32)  # the ids' first column, close together
        self._counts = np.zeros(_SLOTS, np.uint8)
        self._used = 0
        self._long: dict[bytes, list[int]] = {}

    def encode(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the text, and where its parts end.

        Args:
            text: ASCII without NUL, in parts that each end with the byte MARK.

        Returns:
            ids uint32 [n] of all parts (nothing for the MARKs), and ends int64 [parts]: part p is ids[ends[p - 1] :
            ends[p]].
        """
        padded = np.frombuffer(text + bytes(_KEY_BYTES), np.uint8)
        starts = piece_starts(padded[: len(text)])
        lengths = np.diff(starts, append=len(text))
        blocks = [
            self._block(text, padded, starts[n : n + _BLOCK], lengths[n : n + _BLOCK])
            for n in range(0, len(starts), _BLOCK)
        ]
        ids, counts = map(np.concatenate, zip(*blocks))
        return ids, np.cumsum(counts)[padded[starts] == MARK]

    def _block(
        self, text: bytes, padded: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids uint32 [n] of some pieces, and how many each has, int64 [pieces]."""
        long = lengths > _KEY_BYTES
        short = ~(long | (padded[starts] == MARK))
        slots = self._slots(text, padded, starts[short], lengths[short])
        first, counts = np.zeros(len(starts), np.uint32), np.zeros(len(starts), np.int64)
        first[short], counts[short] = self._first[slots], self._counts[slots]
        long_at = np.flatnonzero(long)
        spans = zip(starts[long_at].tolist(), lengths[long_at].tolist())
        long_ids = [self._long_ids(text[start : start + length]) for start, length in spans]
        counts[long_at] = [len(ids) for ids in long_ids]

        ends = np.cumsum(counts)
        out = np.repeat(first, counts)
        for end, ids in zip(ends[long_at].tolist(), long_ids):
            out[end - len(ids) : end] = ids
        short_counts, begins = counts[short], (ends - counts)[short]
        several = np.flatnonzero(short_counts > 1)
        for place in range(1, _KEY_BYTES):
            several = several[short_counts[several] > place]
            if not several.size:
                break
            out[begins[several] + place] = self._ids[slots[several], place]
        return out, counts

    def _slots(self, text: bytes, padded: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The slot of each piece in the table, int64 [pieces]; pieces that are missing are added first."""
        words = np.ndarray(len(padded) - _WORD + 1, np.dtype("<u8"), padded, strides=(1,))  # at every byte
        keys = np.zeros((2, len(starts)), np.uint64)
        keys[0] = words[starts] & _MASKS[np.minimum(lengths, _WORD)]
        wide = np.flatnonzero(lengths > _WORD)
        keys[1, wide] = words[starts[wide] + _WORD] & _MASKS[lengths[wide] - _WORD]
        slots, missing = self._find(keys)
        if missing.size:
            new = {text[s : s + n] for s, n in zip(starts[missing].tolist(), lengths[missing].tolist())}
            if self._used + len(new) > _MOST:
                self._clear()
                new = {text[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist())}
            self._add(sorted(new))
            slots, _ = self._find(keys)
        return slots

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the slot of each key, the indices of the keys that are not in the table)."""
        slots = _hash(keys)
        wrong = np.flatnonzero((self._keys[0][slots] != keys[0]) | (self._keys[1][slots] != keys[1]))
        missing = []
        while wrong.size:
            free = self._keys[0][slots[wrong]] == 0
            missing.append(wrong[free])
            wrong = wrong[~free]
            slots[wrong] = (slots[wrong] + 1) % _SLOTS
            at = slots[wrong]
            wrong = wrong[(self._keys[0][at] != keys[0][wrong]) | (self._keys[1][at] != keys[1][wrong])]
        return slots, np.concatenate(missing) if missing else np.zeros(0, np.int64)

    def _add(self, pieces: list[bytes]) -> None:
        keys = np.array([np.frombuffer(piece.ljust(_KEY_BYTES, b"\0"), "<u8") for piece in pieces], np.uint64).T
        for piece, low, high, slot in zip(pieces, *keys.tolist(), _hash(keys).tolist()):
            while self._keys[0, slot]:
                slot = (slot + 1) % _SLOTS
            ids = self._encode(piece)
            self._keys[:, slot] = low, high
            self._ids[slot, : len(ids)] = ids
            self._first[slot], self._counts[slot] = ids[0], len(ids)
        self._used += len(pieces)

    def _long_ids(self, piece: bytes) -> list[int]:
        ids = self._long.get(piece)
        if ids is None:
            ids = self._encode(piece)
            if len(piece) <= _LONGEST_KEPT:
                if len(self._long) >= _MOST_LONG:
                    self._long.clear()
                self._long[piece] = ids
        return ids


def _hash(keys: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return ((keys[0] * _FACTORS[0] + keys[1] * _FACTORS[1]) >> _SHIFT).astype(np.int64)
