"""Opens an image of a calibration set: what `runtimes.images` opens, and DICOM through pydicom."""

from __future__ import annotations

from pathlib import Path

from PIL.Image import Image

from exporter.calibrate.loaders.dicom import is_dicom, read_dicom
from exporter.runtimes.images import open_image


def open_picture(path: Path) -> Image:
    """The image as Pillow mode RGB or L. Raises what `open_image` and `read_dicom` raise."""
    return read_dicom(path) if is_dicom(path) else open_image(path)
