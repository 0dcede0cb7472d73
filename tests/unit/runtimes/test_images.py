"""Untrusted image files: what is accepted comes out plain, the rest is one clear line."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.runtimes.images import open_image


def colours(width: int = 6, height: int = 4) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    colours().save(tmp_path / f"a.{suffix}")
    opened = open_image(tmp_path / f"a.{suffix}")
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(colours()))


@pytest.mark.parametrize("suffix", ["jpg", "webp", "gif"])
def test_other_formats_are_read(tmp_path: Path, suffix: str) -> None:
    colours().save(tmp_path / f"a.{suffix}")
    assert open_image(tmp_path / f"a.{suffix}").size == (6, 4)


@pytest.mark.parametrize(
    ("mode", "expected"), [("L", "L"), ("1", "L"), ("P", "RGB"), ("CMYK", "RGB")]
)
def test_modes_become_plain(tmp_path: Path, mode: str, expected: str) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    colours().convert(mode).save(path)
    opened = open_image(path)
    assert opened.mode == expected
    assert np.array_equal(np.asarray(opened), np.asarray(colours().convert(mode).convert(expected)))


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (2, 2), (10, 128)).save(tmp_path / "b.png")
    assert open_image(tmp_path / "b.png").getpixel((1, 1)) == (132, 132, 132)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    opened = open_image(tmp_path / f"a.{suffix}")
    assert opened.mode == "L"
    assert np.asarray(opened).tolist() == np.rint(values / 65535 * 255).astype(int).tolist()


def test_big_endian_sixteen_bits(tmp_path: Path) -> None:
    # A one-strip TIFF in Motorola byte order, written by hand: Pillow writes only the other one.
    tags = [(256, 3, 2 << 16), (257, 3, 1 << 16), (258, 3, 16 << 16), (259, 3, 1 << 16)]
    tags += [(262, 3, 1 << 16), (273, 4, 8), (277, 3, 1 << 16), (278, 3, 1 << 16), (279, 4, 4)]
    body = struct.pack(">HH", 0, 65535) + struct.pack(">H", len(tags))
    body += b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in tags)
    (tmp_path / "a.tiff").write_bytes(b"MM\x00*" + struct.pack(">I", 12) + body + b"\0\0\0\0")
    assert np.asarray(open_image(tmp_path / "a.tiff")).tolist() == [[0, 255]]


def test_thirty_two_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputRefused, match="32 bits"):
        open_image(tmp_path / "a.tiff")


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    colours().save(tmp_path / "a.png", exif=exif)
    expected = np.rot90(np.asarray(colours()), -1)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), expected)


@pytest.mark.parametrize("suffix", ["gif", "tiff", "webp", "png"])
def test_several_frames_are_refused(tmp_path: Path, suffix: str) -> None:
    frames = [colours(), Image.new("RGB", (6, 4)), Image.new("RGB", (6, 4), (9, 9, 9))]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(InputRefused, match="3 frames; expected one"):
        open_image(tmp_path / f"a.{suffix}")


def test_a_small_file_of_a_billion_pixels_is_refused_before_decoding(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(40_000, 25_000, b"\0" * 100))
    with pytest.raises(InputRefused, match="pixels"):
        open_image(tmp_path / "bomb.png")
    (tmp_path / "big.png").write_bytes(png(10_000, 10_000, b"\0" * 100))
    with pytest.raises(
        InputRefused, match=r"10000 x 10000 = 100000000 pixels; expected at most 64000000"
    ):
        open_image(tmp_path / "big.png")


def test_the_bound_can_be_lowered(tmp_path: Path) -> None:
    colours().save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", max_pixels=24).size == (6, 4)
    with pytest.raises(InputRefused, match="24 pixels; expected at most 23"):
        open_image(tmp_path / "a.png", max_pixels=23)


def test_non_images_are_one_clear_line(tmp_path: Path) -> None:
    for name, data in {"empty": b"", "text": b"hello", "ps": b"%!PS-Adobe-3.0 EPSF-3.0\n"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            InputRefused, match=f"{name}: not an image; expected PNG, JPEG"
        ) as refused:
            open_image(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputRefused, match="No such file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(InputRefused, match="Is a directory"):
        open_image(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "bmp", "webp", "gif"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    colours(200, 150).save(path)
    whole = path.read_bytes()
    for part in (0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(InputRefused) as refused:
            open_image(path)
        assert "\n" not in str(refused.value)


def test_any_changed_byte_gives_an_image_or_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    colours().save(path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        data[random.integers(len(data))] = random.integers(256)
        path.write_bytes(data)
        try:
            outcomes.add(open_image(path).mode)
        except InputRefused as error:
            outcomes.add("several lines" if "\n" in str(error) else "refused")
    assert {"RGB", "refused"} <= outcomes <= {"RGB", "L", "refused"}


def test_dicom_without_pydicom_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 50)
    with pytest.raises(EnvironmentLacks, match=r"medexport\[dicom\]"):
        open_image(tmp_path / "a.dcm")
