"""One image to be captioned, as the comparison sees it, and the instruction that it gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.core.errors import InputRefused

# Stands in an instruction for the modality of each image.
MODALITY = "{modality}"
# What an instruction is tried with where there is no image of a known kind.
EXAMPLE_MODALITY = "x-ray"


@dataclass(frozen=True)
class Case:
    """An image with who it shows and what it is; `caption` is the ground truth, None if unknown."""

    id: str
    image: Path
    patient: str
    modality: str
    caption: str | None


def prompt_for(prompt: str, modality: str) -> str:
    """`prompt` with `modality` in the place of `MODALITY`.

    Raises `InputRefused` where the instruction names a modality and the image has none.
    """
    if MODALITY not in prompt:
        return prompt
    if not modality.strip():
        raise InputRefused(
            f"the instruction {prompt!r} names the image's modality, and none is known; give one "
            "(--modality ct), or a prompt without it"
        )
    return prompt.replace(MODALITY, modality.strip())
