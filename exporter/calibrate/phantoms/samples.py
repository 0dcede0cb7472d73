"""The phantoms of a split: patients, their images, captions and facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.phantoms.captions import (
    keyword_caption,
    plain_caption,
    report_caption,
    scene_facts,
)
from exporter.calibrate.phantoms.draw import draw
from exporter.calibrate.phantoms.scene import Scene, new_patient, new_scene, region_of
from exporter.calibrate.phantoms.stream import Stream

VERSION = "1"
MODALITIES = ("x-ray", "ct", "mri", "ultrasound")


@dataclass(frozen=True)
class Phantom:
    """One drawn image of one patient; `pixels` is uint8 ``[height, width]``."""

    id: str
    patient: str
    study: str
    scene: Scene
    pixels: NDArray[np.uint8]

    @property
    def caption(self) -> str:
        """The caption in report style."""
        return report_caption(self.scene)

    @property
    def plain(self) -> str:
        """The caption in the base model's style."""
        return plain_caption(self.scene)

    @property
    def keywords(self) -> str:
        """The caption that the base model learns first."""
        return keyword_caption(self.scene)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """The facts as drawn."""
        return scene_facts(self.scene)


def draw_phantoms(split: str, patients: int, images: int, first: int = 0) -> Iterator[Phantom]:
    """`images` phantoms of each of `patients` patients; no two splits share a patient.

    Modalities take turns, so that each split has them in equal shares. The patients' numbers start
    at `first`.
    """
    for number in range(first, first + patients):
        name = f"{split}-{number:05d}"
        person = new_patient(name, Stream(f"phantoms/{VERSION}/{name}"))
        for image in range(images):
            stream = Stream(f"phantoms/{VERSION}/{name}/{image}")
            region = region_of(MODALITIES[(number + image) % len(MODALITIES)], stream)
            scene = new_scene(region, stream)
            study = f"{name}-{region.modality}"
            yield Phantom(f"{name}-{image}", name, study, scene, draw(scene, person, stream))
