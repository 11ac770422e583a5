"""How large the compressed parts of an Arrow file say they are when decompressed, found without decompressing them.

Each message of the file begins with a flatbuffer, in which a record batch lists its buffers; a compressed buffer begins
with its decompressed size (Arrow's Message.fbs). pyarrow would read both only while it decompresses. A damaged file is
left for pyarrow to report.
"""

import struct
from pathlib import Path

import pyarrow

_MAGIC = b"ARROW1\0\0"  # before the messages, in the file format
_DICTIONARY, _BATCH = 2, 3  # kinds of messages
_HEADER_TYPE, _HEADER = 1, 2  # fields of a Message
_DICTIONARY_DATA = 1  # of a DictionaryBatch
_BUFFERS, _COMPRESSION = 2, 3  # of a RecordBatch


def decompressed_bytes(path: Path) -> int:
    """Bytes of the largest message's compressed buffers once decompressed; 0 if none is compressed."""
    largest = 0
    if path.stat().st_size == 0:
        return 0
    with pyarrow.memory_map(str(path)) as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            file.seek(0)
        try:
            for message in pyarrow.ipc.MessageReader.open_stream(file):
                largest = max(largest, _claimed(message.metadata.to_pybytes(), message.body))
        except (pyarrow.ArrowException, OSError, struct.error, IndexError):
            pass
    return largest


def _claimed(header: bytes, body: pyarrow.Buffer | None) -> int:
    (message,) = struct.unpack_from("<I", header)
    kind, content = _field(header, message, _HEADER_TYPE), _field(header, message, _HEADER)
    if kind is None or content is None or header[kind] not in (_DICTIONARY, _BATCH) or body is None:
        return 0
    batch = _follow(header, content)
    if header[kind] == _DICTIONARY:
        batch = _follow(header, _field(header, batch, _DICTIONARY_DATA) or 0)
    buffers = _field(header, batch, _BUFFERS)
    if buffers is None or _field(header, batch, _COMPRESSION) is None:
        return 0
    vector = _follow(header, buffers)
    (count,) = struct.unpack_from("<I", header, vector)
    total = 0
    for n in range(count):
        offset, length = struct.unpack_from("<qq", header, vector + 4 + 16 * n)
        if length >= 8:
            total += max(0, *struct.unpack("<q", body.slice(offset, 8).to_pybytes()))  # −1: not compressed after all
    return total


def _field(header: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table lies; None if it is left out."""
    vtable = table - struct.unpack_from("<i", header, table)[0]
    (size,) = struct.unpack_from("<H", header, vtable)
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", header, vtable + place)[0] if place < size else 0
    return table + offset if offset else None


def _follow(header: bytes, place: int) -> int:
    return place + struct.unpack_from("<I", header, place)[0]
