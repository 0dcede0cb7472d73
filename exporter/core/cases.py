"""One image to be captioned, as the comparison sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """An image with who it shows and what it is; `caption` is the ground truth, None if unknown."""

    id: str
    image: Path
    patient: str
    modality: str
    caption: str | None
