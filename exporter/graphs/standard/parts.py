"""The three graphs of a model in the standard dialect."""

from __future__ import annotations

from pathlib import Path

from exporter.families.base import VisionSpec
from exporter.families.specs.decoder import TextDecoder
from exporter.graphs.decoder import DecoderOptions
from exporter.graphs.parts import write_text_decoder, write_tokens, write_vision
from exporter.graphs.standard.lowering import Standard
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_standard(
    folder: Path,
    text: TextDecoder,
    vision: VisionSpec,
    weights: WeightSource,
    *,
    half: bool = False,
) -> tuple[tuple[WrittenGraph, ...], dict[str, str]]:
    """Write the three graphs; also returns which matrices were stored wider than they came, and why.

    `half`: scales of packed matrices in float16, as `standard.float16` needs them; all else is float32.

    Raises `InputRefused` for what the dialect cannot say, or bad tensors.
    """
    opened: list[Standard] = []

    def dialect(writer: GraphWriter) -> Standard:
        opened.append(Standard(writer, half=half))
        return opened[-1]

    # Unpacked matrices have no accuracy level; gate and up apart leave float16 one by one.
    parts = (
        write_vision(folder, vision, weights, 0, dialect),
        write_tokens(folder, text, weights, dialect),
        write_text_decoder(folder, text, weights, DecoderOptions(0, fuse_mlp=False), dialect),
    )
    return parts, {name: why for one in opened for name, why in one.widened.items()}
