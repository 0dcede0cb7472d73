"""Opens untrusted image files: PNG, JPEG, TIFF, BMP, WebP, GIF and DICOM, one frame, bounded."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from exporter.core.errors import InputRefused
from exporter.runtimes.dicom import is_dicom, read_dicom

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, KeyError, TypeError)
SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


def open_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as Pillow mode RGB or L, upright (EXIF orientation is applied).

    Gray of 16 bits is scaled from 0..65535 to 0..255 (values are not windowed: a 12-bit picture
    stored in the low bits stays dark; transparency is put on white). The number of pixels is checked
    in the header, before anything is decoded. A file of several frames is refused: which one is
    meant must be said, by exporting it. DICOM is windowed as a viewer shows it (`runtimes.dicom`).

    Raises `InputRefused` when it is no such image, too large, damaged, of several frames or of more
    than 16 bits; `EnvironmentLacks` for DICOM without pydicom.
    """
    if is_dicom(path):
        return read_dicom(path, max_pixels=max_pixels)
    try:
        with warnings.catch_warnings():
            # Pillow's own limit warns or raises by module-wide settings; ours is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                _check(path, opened, max_pixels)
                opened.load()
                return _plain(path, ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        raise InputRefused(f"{path}: {error}; expected at most {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise InputRefused(
            f"{path}: not an image; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        ) from error
    except FileNotFoundError as error:
        raise InputRefused(f"{path}: no such file; expected an image") from error
    except DAMAGED as error:
        raise InputRefused(
            f"{path}: damaged image ({' '.join(str(error).split())[:200]}); save it again"
        ) from error


def _check(path: Path, image: Image.Image, max_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise InputRefused(
            f"{path}: {image.width} x {image.height} = {pixels} pixels; expected at most {max_pixels}, "
            "scale it down"
        )
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        raise InputRefused(f"{path}: {frames} frames; expected one, export the frame that is meant")


def _plain(path: Path, image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT:
        # 65535 / 257 = 255: round to the nearest of the 256 levels.
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise InputRefused(
            f"{path}: pixels of 32 bits without a known range; expected 8 or 16 bits, save it so"
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("L" if image.mode in {"1", "L"} else "RGB")
