"""Small changes of an image that leave its clinical content alone: do captions stay what they are?"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from exporter.compare.jobs import Job, JobCase
from exporter.core.errors import InputRefused
from exporter.runtimes.base import Captioner
from exporter.runtimes.images import open_image

CUT = 4.0  # noise is cut at so many standard deviations, so that its effect is bounded
JPEG_LONGEST = 65_500  # libjpeg's limit of a side


@dataclass(frozen=True)
class Perturbation:
    """One row of the table: `change` takes image, `amount` and a seed, and keeps size and mode."""

    name: str
    said: str
    amount: float
    change: Callable[[Image.Image, float, int], Image.Image]


def _noise(image: Image.Image, amount: float, seed: int) -> Image.Image:
    """Gaussian noise, one field for all channels: a gray picture stored in colour stays gray."""
    pixels = np.asarray(image).astype(np.float64)
    field = np.random.default_rng(seed).standard_normal(pixels.shape[:2]).clip(-CUT, CUT)
    moved = pixels + amount * (field if pixels.ndim == 2 else field[..., None])
    return Image.fromarray(np.rint(moved).clip(0, 255).astype(np.uint8))


def _contrast(image: Image.Image, amount: float, _seed: int) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(amount)


def _jpeg(image: Image.Image, amount: float, _seed: int) -> Image.Image:
    if max(image.size) > JPEG_LONGEST:
        raise InputRefused(
            f"image of {image.width} x {image.height}: JPEG holds at most {JPEG_LONGEST} pixels a "
            "side; scale it down, or compare without --robustness"
        )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(amount))
    with Image.open(buffer, formats=("JPEG",)) as opened:
        return opened.convert(image.mode)


def _rotation(image: Image.Image, amount: float, _seed: int) -> Image.Image:
    pixels = np.asarray(image)
    edge: NDArray[np.uint8] = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    median = np.median(edge, axis=0)
    fill = int(median) if image.mode == "L" else tuple(int(v) for v in median)
    return image.rotate(amount, Image.Resampling.BILINEAR, fillcolor=fill)


PERTURBATIONS = (
    Perturbation("noise", "Gaussian noise, sigma 4 of 255, the same for all models", 4.0, _noise),
    Perturbation("contrast-0.9", "contrast x0.9 about the mean gray", 0.9, _contrast),
    Perturbation("contrast-1.1", "contrast x1.1 about the mean gray", 1.1, _contrast),
    Perturbation("jpeg-60", "JPEG of quality 60", 60.0, _jpeg),
    Perturbation(
        "rotation-3", "3 degrees counterclockwise, corners filled with the border's median", 3.0,
        _rotation,
    ),
)  # fmt: skip


def perturb(image: Image.Image, perturbation: Perturbation, sha256: str) -> Image.Image:
    """`image` (mode L or RGB) changed, in the same size and mode.

    The noise's seed is the hex digest `sha256`, so that every model sees the same picture. Raises
    ValueError for another mode, `InputRefused` for an image that JPEG cannot hold.
    """
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"image mode {image.mode}; expected L or RGB")
    return perturbation.change(image, perturbation.amount, int(sha256[:16], 16))


def perturbed_captions(captioner: Captioner, job: Job, case: JobCase) -> dict[str, str]:
    """The model's captions of the case's image under each perturbation, by its name."""
    image = open_image(Path(case.image))
    return {
        p.name: captioner.caption(
            perturb(image, p, case.sha256), job.asked(case), job.max_new_tokens
        ).text
        for p in PERTURBATIONS
    }
