"""What an image set is, wherever it was read from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.core.cases import Case


@dataclass(frozen=True)
class Sample:
    """One image with its caption; `facts` is what the caption says, in the set's own words.

    `patient` is what cases are clustered by; `image_sha256` is the digest of the image's file.
    """

    id: str
    image_path: Path
    patient: str
    modality: str
    caption: str
    facts: tuple[Any, ...]
    image_sha256: str


@dataclass(frozen=True)
class ImageSet:
    """A checked set. `digest` covers prompt, captions and, through their digests, every image."""

    name: str
    digest: str
    prompt: str
    samples: tuple[Sample, ...]

    def cases(self) -> tuple[Case, ...]:
        """The samples as plain cases for the comparison."""
        return tuple(
            Case(s.id, s.image_path, s.patient, s.modality, s.caption) for s in self.samples
        )
