"""Calibrated quantization: images through the float model, block by block, into packed weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.calibrate.draw import draw_cases
from exporter.calibrate.imageset import ImageSet
from exporter.calibrate.overlap import refuse_overlap
from exporter.calibrate.prompts import EmbeddedPrompt, embed_prompts
from exporter.calibrate.sets import open_set
from exporter.calibrate.walk import walk_decoder
from exporter.core.artifact import write_atomic
from exporter.core.cases import Case, prompt_for
from exporter.core.digest import canonical_json, sha256_json
from exporter.core.modelfiles import read_config, read_json
from exporter.core.progress import Progress, silent
from exporter.core.tensors import Checkpoint
from exporter.families.table import family_of
from exporter.quantizers.plan import plan_layers
from exporter.quantizers.schemes import Scheme
from exporter.quantizers.sequential import BlockQuantizer, BlockStore, assemble

CALIBRATION = "calibration.json"
SAMPLES = 128
# Which blocks were quantized, and the record of a walk, for a run that continues one.
IDENTITY = "identity.json"


@dataclass(frozen=True)
class Calibration:
    """The prompts that a model is calibrated on: `cases` of `images`, with `prompt` each.

    `seed` is what they were drawn with; `balance`: image tokens weigh as much as text tokens.
    """

    images: ImageSet
    cases: tuple[Case, ...]
    prompt: str
    seed: int = 0
    balance: bool = True

    def options(self) -> dict[str, Any]:
        """What decides the result, for cache keys and the record."""
        return {
            "set": self.images.name,
            "sha256": self.images.digest,
            "cases": [case.id for case in self.cases],
            "prompt": self.prompt,
            **self.drawing(),
        }

    def drawing(self) -> dict[str, Any]:
        """How the cases were drawn and how their tokens are weighed, for the manifest."""
        return {"seed": self.seed, "balance": self.balance}


def open_calibration(
    name: str, samples: int, prompt: str | None, evaluation: ImageSet | None, *, seed: int = 0
) -> Calibration:
    """An image set with `samples` of its cases (0: all) drawn by `seed`, modalities in equal numbers;
    `prompt` is the set's own when None.

    Raises `InputRefused` when it shares an image or a patient with `evaluation`, or where the prompt
    names a modality that a case does not have.
    """
    images = open_set(name)
    if evaluation is not None:
        refuse_overlap(images, evaluation)
    cases = images.cases()
    drawn = draw_cases(cases, samples or len(cases), seed=seed)
    # An empty prompt is one: models trained without an instruction begin with it.
    asked = images.prompt if prompt is None else prompt
    for case in drawn:
        prompt_for(asked, case.modality)
    return Calibration(images, drawn, asked, seed)


def claim_scratch(scratch: Path, identity: str) -> None:
    """Leave `scratch` as it is when it belongs to the build `identity`, else empty it and say whose.

    What an interrupted build of other weights or settings left there is of no use to this one.
    """
    mark = scratch / IDENTITY
    if mark.is_file() and read_json(mark) == {"identity": identity}:
        return
    if scratch.exists():
        shutil.rmtree(scratch)
    write_atomic(mark, canonical_json({"identity": identity}))


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
) -> str:
    """Quantize `merged` into the empty folder `out` with the inputs that `calibration` gives it.

    `exported` is its float16 export: its vision part and embedding prepare the prompts. Finished
    blocks and hidden states are kept in `scratch`, so that a killed run goes on at its block; the
    folder (see `claim_scratch`) may be removed once `out` is complete. Returns what there is to say
    about where the work began, "" for the start.
    """
    config = read_config(merged / "config.json")
    family = family_of(config)
    decoder = family.decoder_spec(config)
    tower = family.tower_spec(config)
    checkpoint = Checkpoint.open(merged)
    plans = plan_layers(checkpoint, decoder, tower, scheme)
    key = sha256_json({"scheme": repr(scheme), "calibration": calibration.options()})
    store = BlockStore(scratch / "blocks", key)
    visitor = BlockQuantizer(store, decoder, plans)
    blocks, saved = range(decoder.layers), scratch / CALIBRATION
    if saved.is_file() and all(visitor.finished(layer) for layer in blocks):
        note = f"all {decoder.layers} blocks were finished"
    else:
        prompts = embed_prompts(
            merged, exported / "model", calibration.cases, calibration.prompt, threads=threads
        )
        write_atomic(saved, canonical_json(calibration_record(calibration, prompts)))
        first = walk_decoder(
            checkpoint,
            decoder,
            prompts,
            visitor,
            keep=scratch / "states",
            balance=calibration.balance,
            threads=threads,
            progress=progress,
        )
        note = f"went on at block {first} of {decoder.layers}" if first else ""
    assemble(merged, out, scheme, decoder, store, threads=threads, progress=progress)
    shutil.copyfile(saved, out / CALIBRATION)
    return note


def calibration_record(
    calibration: Calibration, prompts: Sequence[EmbeddedPrompt]
) -> dict[str, Any]:
    """What calibration.json says: the set, its cases, and how many tokens of which kind they gave."""
    return calibration.options() | {
        "images": len(prompts),
        "tokens": sum(p.length for p in prompts),
        "image_tokens": int(sum(p.image_positions.sum() for p in prompts)),
    }
