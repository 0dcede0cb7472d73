"""Which writer makes the graph of which kind of vision part and decoder.

A new kind is one file and one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporter.families.base import DecoderSpec, TowerSpec, VisionSpec
from exporter.families.captioners.cnn_transformer import CellVision
from exporter.families.specs.blip2_vision import Blip2Vision
from exporter.families.specs.decoder import TextDecoder
from exporter.families.specs.gemma3 import Gemma3Decoder, PooledSiglip
from exporter.families.specs.gpt2 import Gpt2Spec
from exporter.families.specs.idefics import GatedLlama, ResampledVision
from exporter.families.specs.llava_vision import LlavaVision
from exporter.families.specs.moondream_vision import MoondreamVision
from exporter.families.specs.opt import OptSpec
from exporter.families.specs.phi import PhiSpec
from exporter.families.specs.post_norm import PostNormDecoder
from exporter.families.specs.qwen_vision import QwenVisionSpec
from exporter.families.specs.vit_tower import CrossVit
from exporter.graphs.clip_tower import write_llava_vision
from exporter.graphs.cross import write_cross_vit
from exporter.graphs.decoder import DecoderOptions, write_decoder
from exporter.graphs.densenet import write_cell_vision
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.embedding import write_embedding
from exporter.graphs.gated import write_gated_llama, write_parted_embedding
from exporter.graphs.gemma3 import write_gemma3, write_pooled_siglip, write_scaled_embedding
from exporter.graphs.gpt2 import write_gpt2
from exporter.graphs.moondream_tower import write_moondream_vision
from exporter.graphs.opt import write_opt
from exporter.graphs.perceiver import write_resampled_vision
from exporter.graphs.phi import write_phi
from exporter.graphs.post_norm import write_post_norm
from exporter.graphs.qformer import write_blip2_vision
from exporter.graphs.qwen_tower import write_qwen_vision
from exporter.graphs.tower import write_tower
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import WrittenGraph

# The first argument after the folder is a spec of the row's own kind, hence Any.
Writer = Callable[[Path, Any, WeightSource, int, OpenDialect | None], WrittenGraph]
VISION_WRITERS: Mapping[type, Writer] = {
    TowerSpec: write_tower,
    LlavaVision: write_llava_vision,
    QwenVisionSpec: write_qwen_vision,
    CrossVit: write_cross_vit,
    CellVision: write_cell_vision,
    MoondreamVision: write_moondream_vision,
    ResampledVision: write_resampled_vision,
    Blip2Vision: write_blip2_vision,
    PooledSiglip: write_pooled_siglip,
}
DecoderWriter = Callable[
    [Path, Any, WeightSource, DecoderOptions, OpenDialect | None], WrittenGraph
]
DECODER_WRITERS: Mapping[type, DecoderWriter] = {
    DecoderSpec: write_decoder,
    Gpt2Spec: write_gpt2,
    PostNormDecoder: write_post_norm,
    PhiSpec: write_phi,
    OptSpec: write_opt,
    GatedLlama: write_gated_llama,
    Gemma3Decoder: write_gemma3,
}
# Only decoders whose embedding is more than the rows of one table of its vocabulary.
EmbeddingWriter = Callable[[Path, Any, WeightSource, OpenDialect | None], WrittenGraph]
EMBEDDING_WRITERS: Mapping[type, EmbeddingWriter] = {
    GatedLlama: write_parted_embedding,
    Gemma3Decoder: write_scaled_embedding,
}


def write_vision(
    folder: Path,
    spec: VisionSpec,
    weights: WeightSource,
    accuracy_level: int,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``vision_encoder.onnx`` for any kind of `spec`. Raises `InputRefused` on bad tensors."""
    return VISION_WRITERS[type(spec)](folder, spec, weights, accuracy_level, dialect)


def write_tokens(
    folder: Path, spec: TextDecoder, weights: WeightSource, dialect: OpenDialect | None = None
) -> WrittenGraph:
    """Write ``embed_tokens.onnx`` for any kind of `spec`. Raises `InputRefused` on bad tensors."""
    return EMBEDDING_WRITERS.get(type(spec), write_embedding)(folder, spec, weights, dialect)


def write_text_decoder(
    folder: Path,
    spec: TextDecoder,
    weights: WeightSource,
    options: DecoderOptions,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``decoder_model_merged.onnx`` for any kind of `spec`. Raises `InputRefused` on bad tensors."""
    return DECODER_WRITERS[type(spec)](folder, spec, weights, options, dialect)
