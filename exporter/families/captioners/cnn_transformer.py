"""CNN-Transformer: DenseNet cells, a transformer encoder over them, a small decoder that writes.

No checkpoint and no class is published: the network is the one of `cnn_transformer_torch`, which has
torchvision's names in its CNN and torch's in its layers. Absent keys of a config.json are those of
DenseNet-121 and of that module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import POSITIONS, Feed, PromptInputs, ReaderFiles, TensorSpec
from exporter.families.config import choice, count, flag
from exporter.families.images.vit import read_vit_settings
from exporter.families.layouts.names import Layout
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.prefix import PrefixPreparer, read_prefix_preparer
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.shapes.cnn_transformer import cnn_transformer
from exporter.families.specs.densenet import DenseNetSpec
from exporter.families.specs.layers import linear_tensors
from exporter.families.specs.post_norm import PostNormDecoder, PostNormSizes

if TYPE_CHECKING:
    import torch

MODEL_TYPE = "cnn_transformer"
MODEL_TYPES = (MODEL_TYPE,)
TORCH_CLASSES = {MODEL_TYPE: "exporter.families.reference.cnn_transformer:CNNTransformer"}
PUBLISHED: Mapping[str, PublishedLayout] = {}
LAYOUTS = (Layout(MODEL_TYPES, (), embedding="embed_tokens.weight", head="lm_head.weight"),)
SHAPES = {MODEL_TYPE: cnn_transformer}
DENSENET_121 = (6, 12, 24, 16)
# No sizes are published: those of DenseNet-121, and of the network in `reference`.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "image_size": 224,
    "growth_rate": 32,
    "block_config": DENSENET_121,
    "num_init_features": 64,
    "bn_size": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "vocab_size": 30522,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
# Trained without an instruction: a prompt would become the beginning of the caption.
DEFAULT_PROMPT = ""
WHERE = "config"
PROOF_IMAGES = 2


@dataclass(frozen=True)
class CellVision:
    """DenseNet, one projection, learned positions and encoder layers over the cells of an image, with
    all that turns them into a decoder's cross keys and values.
    """

    cnn: DenseNetSpec
    image_size: int
    layers: int
    decoder: PostNormDecoder

    @property
    def rows(self) -> int:
        """Cells of an image."""
        return self.cnn.cells(self.image_size) ** 2

    @property
    def output_size(self) -> int:
        """Width of keys, and of values, of one layer of the decoder."""
        return self.decoder.hidden_size

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has; cross keys and values are the decoder's."""
        yield from self.cnn.tensors()
        yield from linear_tensors("project", self.output_size, self.cnn.channels, "vision")
        yield TensorSpec("cells.weight", (self.rows, self.output_size), reason=POSITIONS)
        for number in range(self.layers):
            yield from self.decoder.sizes.encoder_layer(f"encoder.layers.{number}.")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        for batch in (1, 2):
            shape = (batch, 1, 3, self.image_size, self.image_size)
            yield {"pixel_values": rng.uniform(-1, 1, shape).astype(np.float32)}


def decoder_spec(config: Mapping[str, Any]) -> PostNormDecoder:
    """The decoder of a parsed config.json. Raises `InputRefused` on a bad config."""
    sizes = PostNormSizes(
        hidden_size=count(config, "hidden_size", 512, WHERE),
        heads=count(config, "num_attention_heads", 8, WHERE),
        intermediate_size=count(config, "intermediate_size", 2048, WHERE),
        activation=choice(config, "hidden_act", "relu", ("relu", "gelu"), WHERE),
    )
    if sizes.hidden_size % sizes.heads:
        raise InputRefused(
            f"config.json: hidden size {sizes.hidden_size} and {sizes.heads} heads; expected a multiple"
        )
    return PostNormDecoder(
        sizes=sizes,
        layers=count(config, "decoder_layers", 3, WHERE),
        vocab_size=count(config, "vocab_size", 30522, WHERE),
        max_positions=count(config, "max_position_embeddings", 256, WHERE),
        embedding="embed_tokens.weight",
        positions="positions.weight",
        prefix="decoder.layers.",
        head="lm_head.weight",
        tied=flag(config, "tie_word_embeddings", False),
    )


def tower_spec(config: Mapping[str, Any]) -> CellVision:
    """CNN and encoder of a parsed config.json. Raises `InputRefused` on a bad config."""
    blocks = config.get("block_config") or DENSENET_121
    whole = isinstance(blocks, list | tuple) and all(type(n) is int and n > 0 for n in blocks)
    if not whole:
        raise InputRefused(f"config.json: block_config is {blocks!r}; expected positive integers")
    cnn = DenseNetSpec(
        growth=count(config, "growth_rate", 32, WHERE),
        blocks=tuple(blocks),
        first=count(config, "num_init_features", 64, WHERE),
        bottleneck=count(config, "bn_size", 4, WHERE),
        prefix="cnn.features.",
    )
    side = count(config, "image_size", 224, WHERE)
    if cnn.cells(side) < 1:
        raise InputRefused(
            f"config.json: image_size {side} leaves no cell behind {len(cnn.blocks)} blocks"
        )
    return CellVision(cnn, side, count(config, "encoder_layers", 3, WHERE), decoder_spec(config))


def open_preparer(model_dir: Path) -> PrefixPreparer:
    """Tokenizer, image settings and start token of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    side = tower_spec(config).image_size
    images = read_vit_settings(*read_image_settings(model_dir))
    if images.output() != (side, side):
        raise InputRefused(
            f"{model_dir / 'preprocessor_config.json'}: images become {images.output()} pixels (height, "
            f"width), config.json says squares of {side}"
        )
    return read_prefix_preparer(model_dir, config, decoder_spec(config), images)


def reader_files(config: Mapping[str, Any]) -> ReaderFiles:  # noqa: ARG001 (the same for all)
    """The image processor's class; there is no joint processor, and no chain of graphs to run."""
    return ReaderFiles("", "ViTImageProcessor", {}, genai=False)


def proof_inputs(
    config: Mapping[str, Any], rng: np.random.Generator, ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], int]:
    """Two random images, each captioned with `ids`."""
    side = tower_spec(config).image_size
    pixels = rng.uniform(-1, 1, (PROOF_IMAGES, 3, side, side)).astype(np.float32)
    return {
        "input_ids": np.repeat(ids[None], PROOF_IMAGES, 0),
        "pixel_values": pixels,
    }, PROOF_IMAGES


def torch_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """Cross keys and values of every decoder layer: ``[rows, layers * 2 * hidden]``."""
    import torch

    found: torch.Tensor = model.cross(model.encode(torch.from_numpy(inputs.pixel_values)))[0]
    return found


def library_features(model: Any, inputs: PromptInputs) -> torch.Tensor:
    """The same from the projections of torch's own attention modules, each in turn."""
    import torch
    from torch.nn.functional import linear

    memory = model.encode(torch.from_numpy(inputs.pixel_values))[0]
    parts = []
    for layer in model.decoder.layers:
        attention = layer.multihead_attn
        _, *weights = attention.in_proj_weight.chunk(3)
        _, *biases = attention.in_proj_bias.chunk(3)
        parts += [linear(memory, w, b) for w, b in zip(weights, biases, strict=True)]
    return torch.cat(parts, dim=-1)


def torch_start(
    model: Any,
    features: torch.Tensor,
    inputs: PromptInputs,  # noqa: ARG001 (one image, which all tokens see)
) -> Any:
    """See `families.base.CrossFamily.torch_start`."""
    return model.start(features)


def torch_append(
    model: Any,
    embeds: torch.Tensor,
    cache: Any,
    positions: torch.Tensor | None,  # noqa: ARG001 (places in the text)
) -> tuple[torch.Tensor, Any]:
    """See `families.base.Family.torch_append`; `cache` comes from `torch_start`."""
    return model.append(embeds, cache), cache
