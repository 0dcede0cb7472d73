"""Does a caption depend on its image, and do two models mean the same by the same tokens?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from exporter.compare.jobs import Job, JobCase, Probe
from exporter.core.digest import sha256_bytes
from exporter.families.base import Preparer
from exporter.runtimes.base import Caption, Captioner
from exporter.runtimes.images import open_image

GRAY = 128


class Probed(Captioner, Protocol):
    """A captioner whose preparation of inputs can be asked for."""

    @property
    def preparer(self) -> Preparer:
        """What makes input tokens of image and prompt, and text of tokens."""
        ...


def probed_ids(job: Job) -> frozenset[str]:
    """The cases that are probed: `job.probes` of them at equal distances."""
    return spread_ids(job, job.probes)


def spread_ids(job: Job, wanted: int) -> frozenset[str]:
    """`wanted` of the job's cases at equal distances, or all."""
    count = min(wanted, len(job.cases))
    return frozenset(job.cases[i * len(job.cases) // count].id for i in range(count))


def probe_case(
    captioner: Probed,
    job: Job,
    case: JobCase,
    caption: Caption,
    reference: Sequence[int] | None,
) -> Probe:
    """Probe one case; `reference` are the reference's tokens, None for the reference itself.

    The blank image has the size of the real one, so that the prompt has the same tiles and length.
    """
    image = open_image(Path(case.image))
    blank = Image.new("L", image.size, GRAY)
    # If the blank image's caption is longer and begins alike, it is the same caption for us.
    length = min(job.max_new_tokens, max(1, len(caption.tokens)))
    inputs = captioner.preparer.prepare([image], job.asked(case))
    return Probe(
        blank=list(captioner.caption(blank, job.asked(case), length).tokens),
        prompt=sha256_bytes(inputs.input_ids.tobytes()),
        retold=None if reference is None else captioner.preparer.decode(reference),
    )
