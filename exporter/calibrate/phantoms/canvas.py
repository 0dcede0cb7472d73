"""A grayscale canvas with soft-edged shapes.

Positions are fractions of the width (u) and the height (v); thicknesses and diameters of findings
are millimetres on a fixed scale: the long edge of every phantom spans 128 mm. Only operations that
IEEE 754 rounds exactly (+ - * / sqrt) touch the pixels, so the bytes do not depend on the machine.
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.float64]

FIELD_MM = 128.0
"""Millimetres along the long edge of every phantom."""


class Canvas:
    """Gray values [height, width], 0 (black) to 255 (white), and the shapes to fill them with."""

    def __init__(self, height: int, width: int, shade: float = 0.0) -> None:
        self.height, self.width = height, width
        self.pixels: Mask = np.full((height, width), float(shade))
        self.px_per_mm = max(height, width) / FIELD_MM
        self._x = (np.arange(width, dtype=np.float64) + 0.5)[None, :]
        self._y = (np.arange(height, dtype=np.float64) + 0.5)[:, None]

    @property
    def u(self) -> Mask:
        """Horizontal position of each column, [1, width], 0 at the left edge to 1."""
        return self._x / self.width

    @property
    def v(self) -> Mask:
        """Vertical position of each row, [height, 1], 0 at the top edge to 1."""
        return self._y / self.height

    def ellipse(self, u: float, v: float, ru: float, rv: float, soft: float = 1.0) -> Mask:
        """Coverage of an ellipse with its centre and radii in fractions; ``soft`` edge in pixels."""
        distance = np.sqrt(((self.u - u) / ru) ** 2 + ((self.v - v) / rv) ** 2)
        radius = min(ru * self.width, rv * self.height)
        return np.clip((1.0 - distance) * radius / soft + 0.5, 0.0, 1.0)

    def disc(self, u: float, v: float, diameter_mm: float) -> Mask:
        """Coverage of a disc of the given diameter in mm around (u, v)."""
        dx, dy = self._x - u * self.width, self._y - v * self.height
        radius = diameter_mm * self.px_per_mm / 2.0
        return np.clip(radius - np.sqrt(dx * dx + dy * dy) + 0.5, 0.0, 1.0)

    def line(self, start: tuple[float, float], end: tuple[float, float], mm: float) -> Mask:
        """Coverage of a straight line from ``start`` to ``end`` (u, v) that is ``mm`` thick."""
        x0, y0 = start[0] * self.width, start[1] * self.height
        dx, dy = end[0] * self.width - x0, end[1] * self.height - y0
        along = ((self._x - x0) * dx + (self._y - y0) * dy) / (dx * dx + dy * dy)
        along = np.clip(along, 0.0, 1.0)
        off_x, off_y = self._x - x0 - along * dx, self._y - y0 - along * dy
        half = mm * self.px_per_mm / 2.0
        return np.clip(half - np.sqrt(off_x * off_x + off_y * off_y) + 0.5, 0.0, 1.0)

    def box(self, u0: float, v0: float, u1: float, v1: float) -> Mask:
        """Coverage of the rectangle between two corners, with edges one pixel soft."""
        across = np.minimum(self._x - u0 * self.width, u1 * self.width - self._x)
        down = np.minimum(self._y - v0 * self.height, v1 * self.height - self._y)
        covered: Mask = np.clip(np.minimum(across, down) + 0.5, 0.0, 1.0)
        return covered

    def paint(self, mask: Mask, shade: float, opacity: float = 1.0) -> None:
        """Blend ``shade`` into the pixels where ``mask`` covers them."""
        self.pixels += (shade - self.pixels) * mask * opacity

    def add(self, field: Mask, amount: float) -> None:
        """Add ``amount`` times ``field`` (broadcast to [height, width]) to the pixels."""
        self.pixels += field * amount

    def gray(self) -> NDArray[np.uint8]:
        """The picture as bytes, [height, width]."""
        return np.rint(np.clip(self.pixels, 0.0, 255.0)).astype(np.uint8)


def png_bytes(gray: NDArray[np.uint8]) -> bytes:
    """An 8-bit grayscale PNG of ``gray`` [height, width].

    Written here, not by an imaging library: rows use the Up filter and Huffman coding without
    string matching, so that a library with another match finder gives the same bytes.
    """
    height, width = gray.shape
    above = np.vstack([np.zeros((1, width), np.uint8), gray[:-1]])
    rows = np.hstack([np.full((height, 1), 2, np.uint8), gray - above])
    packer = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    data = packer.compress(rows.tobytes()) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
