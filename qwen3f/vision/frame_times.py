"""How long each frame of an animation is shown, read from the blocks of its file without decoding pixels.

For GIF, APNG and WebP. pillow gives a frame's time only after decoding the frames before it.
"""

import struct
from collections.abc import Iterator


def frame_times(data: bytes) -> list[int]:
    """Milliseconds of each frame, for the same frames that pillow gives; 0 where the file has no time; [0] for a still
    image.

    A damaged file gives the frames before the damage. An APNG's default image that is not part of the animation gets 0.
    """
    walks = {b"GIF8": _gif, b"\x89PNG": _png, b"RIFF": _webp}
    times = []
    try:
        for time in walks[data[:4]](data) if data[:4] in walks else ():
            times.append(time)
    except (IndexError, struct.error):  # the file ends within a block
        pass
    return times or [0]


def _gif(data: bytes) -> Iterator[int]:
    at, time = 13 + _colours(data[10]), 0
    while data[at] != 0x3B:
        if data[at] == 0x21:  # an extension; 0xF9 has the time of the next frame, in hundredths
            if data[at + 1] == 0xF9:
                time = 10 * struct.unpack_from("<H", data, at + 4)[0]
            at = _behind_blocks(data, at + 2)
        elif data[at] == 0x2C:  # a frame
            yield time
            time = 0
            at = _behind_blocks(data, at + 11 + _colours(data[at + 9]))
        else:
            at += 1


def _colours(flags: int) -> int:
    """Bytes of the colour table that the flags name."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _behind_blocks(data: bytes, at: int) -> int:
    while data[at]:
        at += 1 + data[at]
    return at + 1


def _png(data: bytes) -> Iterator[int]:
    at, frames = 8, 0
    while True:
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"fcTL":
            number, part = struct.unpack_from(">HH", data, at + 28)
            frames += 1
            yield round(1000 * number / (part or 100))
        elif kind == b"IDAT" and not frames:
            frames += 1
            yield 0
        elif kind == b"IEND":
            return
        at += 12 + size


def _webp(data: bytes) -> Iterator[int]:
    at = 12
    while at < len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"ANMF":
            yield int.from_bytes(data[at + 20 : at + 23], "little")
        at += 8 + size + size % 2
