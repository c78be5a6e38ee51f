"""Images that are not what one expects: what is read of them, and what is said about them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from cargo_folder import write_image
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gsalign.data import ImageRecord, Split, check_images, oddity, read_image
from gsalign.errors import DataError


def write_png16(path: Path, pixels: np.ndarray) -> Path:
    """Write RGB of 16 bits, uint16 [H, W, 3], which Pillow cannot."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip
    return path


@pytest.fixture
def ramp():
    return np.linspace(0, 65535, 32 * 16).round().astype(np.uint16).reshape(32, 16)


def test_sixteen_bits_become_eight_by_rounding(tmp_path, ramp):
    wanted = np.rint(ramp / 257.0).astype(np.uint8)
    grey = tmp_path / "grey.png"
    Image.fromarray(ramp).save(grey)
    colour = write_png16(tmp_path / "rgb.png", np.stack([ramp, 65535 - ramp, 0 * ramp], axis=2))
    read = read_image(grey)
    assert str(read.dtype) == "torch.uint8"
    np.testing.assert_array_equal(read.numpy(), np.stack([wanted] * 3))
    np.testing.assert_array_equal(read_image(colour)[0].numpy(), wanted)
    assert read_image(colour)[2].max() == 0
    for path in (grey, colour):
        assert oddity(path) == f"image {path} has 16 bits per channel; they are read as 8"


def test_pillow_reads_sixteen_bits_of_grey_alike(tmp_path, ramp, monkeypatch):
    path = tmp_path / "grey.png"
    Image.fromarray(ramp).save(path)
    fast = read_image(path)
    monkeypatch.setattr("gsalign.data.decoding._FAST_SUFFIXES", frozenset())
    assert (read_image(path) == fast).all()


def test_cmyk_is_read_as_rgb(tmp_path):
    path = tmp_path / "cmyk.jpg"
    Image.new("RGB", (16, 32), (200, 40, 90)).convert("CMYK").save(path, quality=100)
    read = read_image(path)
    assert read.shape == (3, 32, 16)
    assert np.abs(read[:, 16, 8].numpy().astype(int) - (200, 40, 90)).max() <= 3
    assert oddity(path) == f"image {path} is CMYK; it is read as RGB"


def test_what_is_odd_is_told_and_what_is_not_is_not(tmp_path):
    assert oddity(write_image(tmp_path / "plain.jpg", 1)) == ""
    grey = tmp_path / "grey.jpg"
    Image.new("L", (16, 32)).save(grey)
    assert oddity(grey) == ""
    tiny = tmp_path / "tiny Łukasz.jpg"
    Image.new("RGB", (1, 1)).save(tiny)
    assert read_image(tiny).shape == (3, 1, 1)
    assert oddity(tiny) == f"image {tiny} has 1 x 1 pixels"
    named = tmp_path / "png.jpg"
    Image.new("RGBA", (16, 32)).save(named, format="PNG")
    assert oddity(named) == f"image {named} is RGBA; it is read as RGB, is a PNG named .jpg"


def test_what_pillow_refuses_is_odd(tmp_path):
    """Read by torchvision; Pillow takes no text of more than a mebibyte."""
    path, text = tmp_path / "long text.png", PngInfo()
    text.add_text("prompt", "a" * (2 << 20), zip=True)
    Image.new("RGB", (16, 32)).save(path, pnginfo=text)
    assert read_image(path).shape == (3, 32, 16)
    told = oddity(path)
    assert told.startswith(f"image {path} is refused by Pillow: Decompressed data too large")
    check = check_images(Split("some", (ImageRecord(path, 1, 1, 0),)))
    assert check.broken == () and check.odd == (told,)


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    path = tmp_path / "zero.jpg"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"zero\.jpg is empty \(0 bytes\)$"):
        read_image(path)
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    with pytest.raises(DataError, match=r"text\.jpg cannot be read: cannot identify image file$"):
        read_image(text)


def test_checking_a_split_tells_the_odd_from_the_broken(tmp_path):
    paths = [write_image(tmp_path / f"{i}.jpg", i) for i in range(4)]
    paths[1].write_bytes(b"")
    Image.new("RGB", (3, 90)).save(paths[2])
    split = Split("some", tuple(ImageRecord(path, 1, 1, 0) for path in paths))
    check = check_images(split)
    assert [record.path.name for record in check.split.records] == ["0.jpg", "2.jpg", "3.jpg"]
    assert len(check.broken) == 1 and "1.jpg is empty" in check.broken[0]
    assert check.odd == (f"image {paths[2]} has 3 x 90 pixels",)
