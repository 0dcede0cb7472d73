"""Inputs of the parity check: images of different tile grids, prompts of different length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from exporter.core.cases import Case, prompt_for
from exporter.families.base import Preparer, PromptInputs
from exporter.runtimes.images import open_image

PROBE_IMAGES = 2
SHORT = "Describe."
# Parts of the width and height that are kept: as it is, wide, tall, and a small detail.
CROPS = ((1.0, 1.0), (1.0, 0.4), (0.35, 1.0), (0.25, 0.25))


@dataclass(frozen=True)
class Probe:
    """One image with one prompt, prepared; `name` says which case it is made from and how."""

    name: str
    image: Image
    prompt: str
    inputs: PromptInputs


def make_probes(preparer: Preparer, cases: Sequence[Case], prompt: str) -> list[Probe]:
    """Crops of the first and the last case's image, each with another of three prompts."""
    chosen = [cases[0], cases[-1]][: min(PROBE_IMAGES, len(cases))]
    probes: list[Probe] = []
    for case in chosen:
        image, asked = open_image(case.image), prompt_for(prompt, case.modality)
        prompts = (asked, SHORT, f"{asked} {asked}")
        for width, height in CROPS:
            # The same crop meets another prompt on the next image.
            text = prompts[len(probes) % len(prompts)]
            box = (0, 0, max(1, round(image.width * width)), max(1, round(image.height * height)))
            part = image.crop(box)
            inputs = preparer.prepare([part], text)
            size = f"{part.width}x{part.height}"
            detail = f"{size}, {len(inputs.vision)} tiles, {len(inputs.input_ids)} tokens"
            probes.append(Probe(f"{case.id} ({detail})", part, text, inputs))
    return probes
