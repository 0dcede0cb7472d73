"""Cases and answers whose figures are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.compare.tasks.jobs import TaskResult
from exporter.core.cases import Case

KINDS = ("ct", "mri", "x-ray")


def image_cases(folder: Path, count: int, *, captions: bool = True) -> tuple[Case, ...]:
    """`count` gray images of two patients' images each; every second one has a nodule."""
    made = []
    for i in range(count):
        path = folder / f"{i:03d}.png"
        Image.fromarray(np.full((8, 10), 5 * i % 256, np.uint8)).save(path)
        finding = "There is a nodule." if i % 2 else "No nodule."
        caption = f"{finding} Image number {i}." if captions else None
        made.append(Case(f"c{i:03d}", path, f"p{i // 2:03d}", KINDS[i % 3], caption))
    return tuple(made)


def unit(rows: NDArray[np.floating] | Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """Rows of length 1."""
    values = np.asarray(rows, dtype=np.float64)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def result(**more: object) -> TaskResult:
    """A worker's answer without what was measured."""
    plain: dict[str, object] = {
        "job": "", "load_seconds": 0.0, "peak_load": None, "peak_run": None, "unique": None,
        "peak_was_reset": True, "versions": {}, "seconds": {},
    }  # fmt: skip
    return TaskResult(**(plain | more))  # type: ignore[arg-type]
