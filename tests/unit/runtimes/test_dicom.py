"""DICOM files as images: modality LUT, window, inversion; refusals. Needs pydicom for most."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from exporter.calibrate.sets import open_set
from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.runtimes.dicom import is_dicom, read_dicom, window
from exporter.runtimes.images import open_image

needs_pydicom = pytest.mark.skipif(find_spec("pydicom") is None, reason="pydicom is not installed")
STORED = np.array([[0, 100, 1000], [1024, 1064, 4095]], np.uint16)


def write_dicom(path: Path, pixels: NDArray[Any] = STORED, **changes: Any) -> Path:
    """A CT-like file; `changes` set elements, None removes one."""
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    values = {
        "PatientName": "Secret^Name",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 3 if pixels.ndim == 3 else 1,
        "PhotometricInterpretation": "RGB" if pixels.ndim == 3 else "MONOCHROME2",
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize,
        "HighBit": 8 * pixels.itemsize - 1,
        "PixelRepresentation": 0,
        "PixelData": pixels.tobytes() + b"\0" * (pixels.nbytes % 2),
    }
    if pixels.ndim == 3:
        values["PlanarConfiguration"] = 0
    for name, value in (values | changes).items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


@needs_pydicom
def test_rescale_and_window(tmp_path: Path) -> None:
    path = write_dicom(
        tmp_path / "a.dcm",
        RescaleSlope="1",
        RescaleIntercept="-1024",
        WindowCenter=["40", "300"],
        WindowWidth=["400", "1500"],
    )
    assert is_dicom(path)
    image = open_image(path)
    # Linear window: 255 * ((x - 39.5) / 399 + 0.5) of x = stored - 1024, clipped.
    expected = np.rint(np.clip((STORED - 1024.0 - 39.5) / 399 + 0.5, 0, 1) * 255)
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert sorted(set(expected.ravel())) == [0, 87, 102, 128, 255]  # worked out by hand


@needs_pydicom
def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    one = read_dicom(write_dicom(tmp_path / "a", PhotometricInterpretation="MONOCHROME1"))
    two = read_dicom(write_dicom(tmp_path / "b"))
    np.testing.assert_array_equal(np.asarray(one), 255 - np.asarray(two))
    np.testing.assert_array_equal(np.asarray(two), np.rint(STORED / 4095 * 255))


@needs_pydicom
def test_voi_table(tmp_path: Path) -> None:
    import pydicom

    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 16])
    item.add_new("LUTData", "OW", (np.arange(4096) * 16).astype("<u2").tobytes())
    sequence = pydicom.sequence.Sequence([item])
    found = np.asarray(read_dicom(write_dicom(tmp_path / "a", VOILUTSequence=sequence)))
    np.testing.assert_array_equal(found, np.rint(STORED * 16.0 / 65535 * 255))


@needs_pydicom
def test_rgb(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    image = read_dicom(write_dicom(tmp_path / "a", pixels))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_window_functions() -> None:
    x = np.array([-10.0, 49.0, 50.0, 50.5, 51.0, 200.0])
    np.testing.assert_allclose(window(x, 50, 1, "LINEAR"), [0, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(window(x, 50, 4, "LINEAR_EXACT"), [0, 0.25, 0.5, 0.625, 0.75, 1.0])
    np.testing.assert_allclose(
        window(x, 50, 4, "SIGMOID"), 1 / (1 + np.exp(-4 * (x - 50) / 4)), rtol=1e-12
    )
    for width, function in ((0.5, "LINEAR"), (0.0, "SIGMOID"), (float("nan"), "LINEAR"), (9, "X")):
        with pytest.raises(ValueError, match="window"):
            window(x, 50, width, function)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@needs_pydicom
@pytest.mark.parametrize(
    ("changes", "spoil", "message"),
    [
        ({"NumberOfFrames": "2"}, None, "2 frames of 3 x 2 pixels; expected one"),
        ({"Rows": 30000, "Columns": 30000}, None, "30000 x 30000 pixels; expected one of at most"),
        ({"PixelData": None}, None, "damaged DICOM, or one without an image"),
        ({"Rows": None}, None, "damaged DICOM, or one without an image"),
        ({}, cut, "damaged DICOM, or one without an image"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, None, "expected MONOCHROME1"),
        ({"WindowCenter": "1", "WindowWidth": "-3"}, None, "damaged DICOM"),
    ],
)
def test_bad_files_are_refused_without_their_text(
    changes: dict[str, Any], spoil: Callable[[Path], None] | None, message: str, tmp_path: Path
) -> None:
    path = write_dicom(tmp_path / "a.dcm", **changes)
    if spoil:
        spoil(path)
    with pytest.raises(InputRefused, match=message) as refused:
        read_dicom(path)
    assert "Secret" not in str(refused.value) and "\n" not in str(refused.value)


@needs_pydicom
def test_compressed_without_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pydicom

    path = write_dicom(tmp_path / "a.dcm")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.2.840.10008.1.2.4.201")  # HTJ2K
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" * 4])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    if find_spec("openjpeg"):
        with pytest.raises((InputRefused, EnvironmentLacks)):
            read_dicom(path)
    else:
        with pytest.raises(EnvironmentLacks, match=r"no decoder .*medexport\[dicom\]"):
            read_dicom(path)


@needs_pydicom
def test_a_folder_with_dicom(tmp_path: Path) -> None:
    write_dicom(tmp_path / "x.dcm")
    (tmp_path / "captions.jsonl").write_text('{"image": "x.dcm", "caption": "CT."}\n')
    found = open_set(f"folder:{tmp_path}")
    assert open_image(found.samples[0].image_path).size == (3, 2)


def test_without_pydicom_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 64)
    (tmp_path / "captions.jsonl").write_text('{"image": "x.dcm", "caption": "CT."}\n')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentLacks, match=r"'pydicom'.*medexport\[dicom\]"):
        open_set(f"folder:{tmp_path}")
    with pytest.raises(EnvironmentLacks, match=r"'pydicom'.*medexport\[dicom\]"):
        open_image(tmp_path / "x.dcm")


def test_other_images_need_no_pydicom(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 7).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == (5, 4)
    with pytest.raises(InputRefused, match=r"none.png: No such file"):
        open_image(tmp_path / "none.png")
