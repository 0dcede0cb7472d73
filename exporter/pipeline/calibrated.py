"""Calibrated quantization: images through the float model, block by block, into packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.calibrate.imageset import ImageSet
from exporter.calibrate.overlap import refuse_overlap
from exporter.calibrate.prompts import embed_prompts
from exporter.calibrate.sets import open_set
from exporter.calibrate.walk import walk_decoder
from exporter.core.cases import Case
from exporter.core.digest import canonical_json, sha256_json
from exporter.core.modelfiles import read_config
from exporter.core.progress import Progress, silent
from exporter.core.tensors import Checkpoint
from exporter.families.table import family_of
from exporter.pipeline.stages import spread
from exporter.quantizers.plan import plan_layers
from exporter.quantizers.schemes import Scheme
from exporter.quantizers.sequential import BlockQuantizer, BlockStore, assemble

CALIBRATION = "calibration.json"
SAMPLES = 128


@dataclass(frozen=True)
class Calibration:
    """The prompts that a model is calibrated on: `cases` of `images`, with `prompt` each."""

    images: ImageSet
    cases: tuple[Case, ...]
    prompt: str

    def options(self) -> dict[str, Any]:
        """What decides the result, for cache keys and the record."""
        return {
            "set": self.images.name,
            "sha256": self.images.digest,
            "cases": [case.id for case in self.cases],
            "prompt": self.prompt,
        }


def open_calibration(
    name: str, samples: int, prompt: str | None, evaluation: ImageSet | None
) -> Calibration:
    """An image set with `samples` of its cases (0: all), as many of each modality as can be.

    Raises `InputRefused` when it shares an image or a patient with `evaluation`.
    """
    images = open_set(name)
    if evaluation is not None:
        refuse_overlap(images, evaluation)
    return Calibration(images, spread(images.cases(), samples), prompt or images.prompt)


def quantize_calibrated(
    merged: Path,
    exported: Path,
    out: Path,
    scheme: Scheme,
    calibration: Calibration,
    scratch: Path,
    *,
    threads: int,
    progress: Progress = silent,
) -> None:
    """Quantize `merged` into the empty folder `out` with the inputs that `calibration` gives it.

    `exported` is its float16 export: its vision part and embedding prepare the prompts. Finished
    blocks and hidden states are kept in `scratch`, so that a killed run goes on at its block; the
    folder may be removed once `out` is complete.
    """
    config = read_config(merged / "config.json")
    family = family_of(config)
    decoder, tower = family.decoder_spec(config), family.tower_spec(config)
    checkpoint = Checkpoint.open(merged)
    plans = plan_layers(checkpoint, decoder, tower, scheme)
    prompts = embed_prompts(
        merged, exported / "model", calibration.cases, calibration.prompt, threads=threads
    )
    key = sha256_json({"scheme": repr(scheme), "calibration": calibration.options()})
    store = BlockStore(scratch / "blocks", key)
    visitor = BlockQuantizer(store, decoder, plans)
    walk_decoder(
        checkpoint,
        decoder,
        prompts,
        visitor,
        keep=scratch / "states",
        threads=threads,
        progress=progress,
    )
    assemble(merged, out, scheme, decoder, store, threads=threads, progress=progress)
    record = calibration.options() | {
        "images": len(prompts),
        "tokens": sum(p.length for p in prompts),
        "image_tokens": int(sum(p.image_positions.sum() for p in prompts)),
    }
    (out / CALIBRATION).write_bytes(canonical_json(record))
