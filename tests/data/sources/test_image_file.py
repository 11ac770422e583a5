"""Untrusted image files: only named formats of bounded size are read, no program is run, the rest is one UserError."""

import io
import os
import struct
import zlib

import pytest
from PIL import Image, features

from qwen3f.data.sources.adapters.multimodal import ImageFile
from qwen3f.data.sources.image_file import FORMATS, image_size, read_image
from qwen3f.errors import UserError
from qwen3f.vision.rgb import to_rgb

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\nshowpage\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """Put a fake `gs` first on the PATH. Return the file that it creates when it runs."""
    ran = tmp_path / "ran"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return ran


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width, height, rows=None):
    """A black PNG of one bit a pixel, compressed to a thousandth of its size.

    rows: the number of rows that it really holds, each of one byte; None: all rows, whole.
    """
    squeezed = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8) if rows is None else b"0"
    rows = b"".join(squeezed.compress(row) for _ in range(height if rows is None else rows)) + squeezed.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(kind, size=(5, 4)):
    content = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_named_formats_are_read_whatever_the_suffix(kind, tmp_path):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("pillow without WebP")
    (tmp_path / "x.jpg").write_bytes(encoded(kind))
    image = read_image(tmp_path / "x.jpg")
    assert (image.mode, image.size) == ("RGB", (5, 4))
    assert all(abs(a - b) <= 5 for a, b in zip(image.getpixel((2, 2)), (200, 10, 10)))  # JPEG rounds


def test_of_a_jpeg_with_further_pictures_the_first_is_read(tmp_path):
    first, second = (Image.new("RGB", (40, 24), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[second])
    red = read_image(tmp_path / "x.jpg").getpixel((2, 2))
    assert red[0] > 250
    assert max(red[1:]) < 5
    assert image_size(tmp_path / "x.jpg") == (24, 40)


GREY, RGB = 0, 2  # colour types of PNG


@pytest.mark.parametrize(
    "depth, kind, row, clear, others",
    [
        (1, GREY, bytes([0b01000000]), struct.pack(">H", 1), [(0, 0, 0), None]),
        (2, GREY, bytes([0b00011011]), struct.pack(">H", 1), [(0, 0, 0), None, (170, 170, 170), (255, 255, 255)]),
        (4, GREY, bytes([0x1F]), struct.pack(">H", 1), [None, (255, 255, 255)]),
        (8, GREY, bytes([10, 20]), struct.pack(">H", 10), [None, (20, 20, 20)]),
        (16, GREY, struct.pack(">2H", 1000, 2570), struct.pack(">H", 1000), [None, (10, 10, 10)]),
        (8, RGB, bytes([1, 2, 3, 9, 8, 7]), struct.pack(">3H", 1, 2, 3), [None, (9, 8, 7)]),
        (16, RGB, struct.pack(">6H", 1, 2, 3, 60000, 0, 0), struct.pack(">3H", 60000, 0, 0), [(0, 0, 0), None]),
    ],
)
def test_a_pngs_transparent_colour_is_white_at_any_depth(depth, kind, row, clear, others, tmp_path):
    header = struct.pack(">IIBBBBB", len(others), 1, depth, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b""))
    image = read_image(tmp_path / "x.png")
    assert [image.getpixel((x, 0)) for x in range(len(others))] == [pixel or (255, 255, 255) for pixel in others]
    with Image.open(tmp_path / "x.png") as opened:  # the same object, asked twice
        assert [to_rgb(opened).tobytes() for _ in range(2)] == [image.tobytes()] * 2


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.eps"])
def test_no_file_starts_a_program(name, tmp_path, ghostscript):
    (tmp_path / name).write_bytes(EPS)
    with Image.open(tmp_path / name) as image, pytest.raises(OSError):
        image.load()  # pillow starts `gs` if it is not told which formats to accept
    assert ghostscript.exists()
    ghostscript.unlink()
    for read in (lambda: read_image(tmp_path / name), ImageFile(tmp_path / name, "rows.json:3").open):
        with pytest.raises(
            UserError, match=rf"the image .*{name} cannot be read: it is no whole file of JPEG, .*; convert"
        ):
            read()
    assert not ghostscript.exists()


@pytest.mark.parametrize("kind", ["PPM", "TIFF", "ICO", "TGA", "PCX", "SGI", "DDS"])
def test_other_formats_are_refused(kind, tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(kind))
    with pytest.raises(UserError, match=r"x.png cannot be read: it is no whole file of JPEG"):
        read_image(tmp_path / "x.png")


def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    bomb = png_bomb(12_000, 12_000)
    assert len(bomb) < 24 * 1024
    (tmp_path / "bomb.png").write_bytes(bomb)

    def decoded(*args, **kwargs):
        raise AssertionError("the image was decoded")

    with monkeypatch.context() as patched:
        patched.setattr("PIL.ImageFile.ImageFile.load", decoded)
        patched.setattr("PIL.PngImagePlugin.PngImageFile.load", decoded, raising=False)
        words = (
            r"rows.json:3: the image .*bomb.png has 12,000 × 12,000 pixels, over the limit of 67,108,864 pixels; .*set "
        )
        with pytest.raises(UserError, match=words + "QWEN3F_MAX_PIXELS higher"):
            ImageFile(tmp_path / "bomb.png", "rows.json:3").open()
    (tmp_path / "small.png").write_bytes(png_bomb(80, 30))
    monkeypatch.setenv("QWEN3F_MAX_PIXELS", "2400")
    assert read_image(tmp_path / "small.png").size == (80, 30)
    monkeypatch.setenv("QWEN3F_MAX_PIXELS", "2399")
    with pytest.raises(UserError, match="80 × 30 pixels, over the limit of 2,399 pixels"):
        ImageFile(tmp_path / "small.png", "rows.json:3").open()
    monkeypatch.delenv("QWEN3F_MAX_PIXELS")
    (tmp_path / "huge.png").write_bytes(png_bomb(2**31 - 1, 2**31 - 1, rows=1))
    with pytest.raises(UserError, match="over the limit of 67,108,864 "):
        read_image(tmp_path / "huge.png")


def test_damaged_files_are_one_error(tmp_path):
    """A PNG cut off at each byte, or with one byte changed, gives a picture or a UserError, nothing else."""
    content = encoded("PNG", (3, 3))
    path = tmp_path / "x.png"
    messages = []
    for at in range(len(content)):
        for harmed in (content[:at], content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]):
            path.write_bytes(harmed)
            try:
                image = read_image(path)
            except UserError as error:
                messages.append(str(error))
            else:
                assert image.mode == "RGB"
    assert len(messages) > len(content)
    assert all("x.png" in message and "\n" not in message for message in messages)


def test_what_is_no_file(tmp_path):
    for path, words in ((tmp_path, "is no regular file: name a file"), (tmp_path / "absent.jpg", "cannot be read")):
        with pytest.raises(UserError, match=rf"the image {path} {words}"):
            read_image(path)
