"""One frame of a DICOM file as an 8-bit gray or RGB image, windowed as a viewer shows it.

DICOM PS3.3 C.11 and PS3.4 N.2: stored values go through the modality LUT (rescale slope and
intercept, or a table), then through the first VOI window or LUT, and are inverted for MONOCHROME1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.core.errors import EnvironmentLacks, InputRefused, require

MAX_PIXELS = 64_000_000
GRAY = ("MONOCHROME1", "MONOCHROME2")
# What pydicom and its decoders raise on damaged files; there is no common base class.
DAMAGED = (OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, IndexError)


def is_dicom(path: Path) -> bool:
    """Whether the file has the DICOM preamble. Raises `InputRefused` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}; expected an image file") from error


def read_dicom(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The file's only frame, mode L or RGB. The number of pixels is checked before decoding.

    Raises `InputRefused` when the file is damaged, has no pixels, several frames, another colour
    space or too many pixels; `EnvironmentLacks` without pydicom or a decoder for its compression.
    """
    require("pydicom", "dicom")
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        dataset = pydicom.dcmread(path)
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        frames = int(dataset.get("NumberOfFrames") or 1)
        kind = str(dataset.PhotometricInterpretation)
        # Text of the file never enters a message: it may name a patient.
        if rows * columns > max_pixels or frames != 1:
            raise InputRefused(
                f"{path}: {frames} frames of {columns} x {rows} pixels; expected one of at most "
                f"{max_pixels} pixels, export the frame that is meant"
            )
        return _picture(path, dataset, kind)
    except InvalidDicomError as error:
        raise InputRefused(f"{path}: not a DICOM file; expected one with a preamble") from error
    except (RuntimeError, NotImplementedError) as error:  # pydicom's words for no decoder
        raise EnvironmentLacks(
            f"{path}: no decoder for this transfer syntax is installed: pip install 'medexport[dicom]'"
        ) from error
    except DAMAGED as error:
        raise InputRefused(
            f"{path}: damaged DICOM, or one without an image ({type(error).__name__}); export the frame as PNG"
        ) from error


def _picture(path: Path, dataset: Any, kind: str) -> Image.Image:
    from pydicom.pixels.processing import apply_modality_lut, convert_color_space

    pixels = dataset.pixel_array
    if kind in GRAY and pixels.ndim == 2:
        values = np.asarray(apply_modality_lut(pixels, dataset), np.float64)
        gray = np.rint(255.0 * _windowed(values, dataset)).astype(np.uint8)
        return Image.fromarray(255 - gray if kind == "MONOCHROME1" else gray)
    if pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8:
        # pydicom's decoders already give RGB for compressed YBR; plain YBR_FULL they leave.
        if kind == "YBR_FULL" and not dataset.file_meta.TransferSyntaxUID.is_compressed:
            pixels = convert_color_space(pixels, kind, "RGB")
        return Image.fromarray(pixels, "RGB")
    raise InputRefused(
        f"{path}: pixels of shape {pixels.shape} in {kind[:20]!r}; expected MONOCHROME1, MONOCHROME2 "
        "or 8-bit RGB, export the frame as PNG"
    )


def _windowed(values: NDArray[np.float64], dataset: Any) -> NDArray[np.float64]:
    """Values as 0..1: through the first window or VOI table, else over their own range."""
    from pydicom.pixels.processing import apply_voi

    if "WindowCenter" in dataset and "WindowWidth" in dataset:
        center, width = (_first(dataset[k].value) for k in ("WindowCenter", "WindowWidth"))
        function = str(dataset.get("VOILUTFunction") or "LINEAR")
        return window(values, center, width, function)
    if "VOILUTSequence" in dataset:
        top = 2.0 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1.0
        shown = apply_voi(values.astype(np.int64), dataset, index=0)
        return np.clip(np.asarray(shown, np.float64) / top, 0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def window(
    values: NDArray[np.float64], center: float, width: float, function: str
) -> NDArray[np.float64]:
    """Values through a VOI window as 0..1 (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    `function`: LINEAR, LINEAR_EXACT or SIGMOID. Raises ValueError for others and impossible widths.
    """
    least = 1.0 if function == "LINEAR" else 0.0
    if not np.isfinite([center, width]).all() or width < least or (width == 0.0):
        raise ValueError("the window's width is impossible")
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp(-4.0 * (values - center) / width)))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0.0, 1.0)
    if function != "LINEAR":
        raise ValueError("the window's function is unknown")
    if width == 1.0:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def _first(value: Any) -> float:
    """The first of a multi-valued element."""
    return float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)
