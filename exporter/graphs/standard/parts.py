"""Which graph belongs to which kind of part in the standard dialect, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec, TowerSpec, VisionSpec, VitSpec
from exporter.families.decoder import TextDecoder
from exporter.families.llava_vision import LlavaVision
from exporter.graphs.clip_tower import build_llava_vision
from exporter.graphs.standard.decoder import write_decoder
from exporter.graphs.standard.embedding import write_embedding
from exporter.graphs.standard.vit import StandardVit
from exporter.graphs.tower import NAME, build_tower
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

# The second argument is a spec of the row's own kind, hence Any.
VISION_BUILDERS: Mapping[type, Callable[[Vit, Any], None]] = {
    TowerSpec: build_tower,
    LlavaVision: build_llava_vision,
}


def write_standard(
    folder: Path, text: TextDecoder, vision: VisionSpec, weights: WeightSource
) -> tuple[tuple[WrittenGraph, ...], dict[str, str]]:
    """Write the three graphs; also returns which matrices were stored wider than they came, and why.

    Raises `InputRefused` for a kind of part that the dialect does not have, or bad tensors.
    """
    if not isinstance(text, DecoderSpec) or type(vision) not in VISION_BUILDERS:
        part = text if not isinstance(text, DecoderSpec) else vision
        raise InputRefused(
            "the standard dialect has Llama decoders with SigLIP or LLaVA vision parts, this model's is "
            f"described by {type(part).__name__}; export with --dialect ort"
        )
    widened: dict[str, str] = {}
    parts = (
        _write_vision(folder, vision, weights, widened),
        write_embedding(folder, text, weights, widened),
        write_decoder(folder, text, weights, widened),
    )
    return parts, widened


def _write_vision(
    folder: Path, spec: VisionSpec, weights: WeightSource, widened: dict[str, str]
) -> WrittenGraph:
    with GraphWriter(folder, NAME, contrib=False) as writer:
        vit = StandardVit(writer, _tower(spec), weights)
        VISION_BUILDERS[type(spec)](vit, spec)
        widened.update(vit.matrices.widened)
        return writer.finish()


def _tower(spec: VisionSpec) -> VitSpec:
    if isinstance(spec, LlavaVision):
        return spec.tower
    if isinstance(spec, VitSpec):
        return spec
    raise ValueError(f"{type(spec).__name__} has no tower")
