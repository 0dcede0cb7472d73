"""CRIS (arXiv 2111.15174) as three graphs: its sizes, its tensors, and how a config.json says them.

Published as code (github.com/DerrickWang005/CRIS.pytorch): CLIP's ResNet and text transformer, a
pyramid that joins both, a decoder in which pixels see words, and a 3 x 3 kernel made of the text.
What does not depend on the text belongs to the first graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.core.errors import InputRefused
from exporter.families.base import BIAS, POSITIONS, Feed, TensorSpec, norm_tensors
from exporter.families.config import count
from exporter.families.images.clip import MEAN, STD
from exporter.families.specs.clipseg import UNUSED_SCALE
from exporter.families.specs.layers import (
    attention_tensors,
    batch_norm_tensors,
    convolution_tensor,
    linear_tensors,
)

MODEL_TYPE, CLASS = "cris", "CRIS"
# Of checkpoints of several GPUs, as the code saves them.
PUBLISHED_NAMES = tuple((f"module.{n}", n) for n in ("backbone", "neck", "decoder", "proj"))
IMAGES = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 416, "width": 416},
    "resample": 2,
    "image_mean": list(MEAN),
    "image_std": list(STD),
}
EXPANSION, TAPS = 4, 9
# Stem and stages together make pixels that many times larger.
STRIDE = 32
LAYERS = (3, 4, 6, 3)
SIZES = {
    "input_size": 416,
    "clip_resolution": 224,
    "vision_width": 64,
    "embed_dim": 1024,
    "text_width": 512,
    "text_layers": 12,
    "text_heads": 8,
    "vocab_size": 49408,
    "context_length": 77,
    "word_len": 17,
    "num_layers": 3,
    "num_head": 8,
    "dim_ffn": 2048,
}


@dataclass(frozen=True)
class CrisSizes:
    """Sizes in elements and pixels; `stages`: blocks of each stage of the ResNet; `pyramid`: channels
    of its three levels, the finest first.
    """

    input_size: int
    clip_resolution: int
    vision_width: int
    embed_dim: int
    text_width: int
    text_layers: int
    text_heads: int
    vocab_size: int
    context_length: int
    word_len: int
    num_layers: int
    num_head: int
    dim_ffn: int
    stages: tuple[int, ...]
    pyramid: tuple[int, int, int]
    pad: int

    @property
    def deep(self) -> int:
        """Channels behind the last stage."""
        return self.vision_width * 8 * EXPANSION

    @property
    def levels(self) -> tuple[int, int, int]:
        """Channels that the pyramid takes: of the second and third stage, and of the pooled last one."""
        return self.deep // 4, self.deep // 2, self.embed_dim

    @property
    def grid(self) -> int:
        """Cells along one side behind the third stage, on which words are looked for."""
        return 2 * self.input_size // STRIDE

    @property
    def dim(self) -> int:
        """Width of the decoder: of pixels and words alike."""
        return self.pyramid[1]


@dataclass(frozen=True)
class Convolved:
    """A convolution without bias, a batch norm and a ReLU, as the pyramid has them."""

    name: str
    outputs: int
    inputs: int
    side: int

    def tensors(self) -> Iterator[TensorSpec]:
        """Kernel and statistics."""
        yield convolution_tensor(f"{self.name}.0", self.outputs, self.inputs, self.side)
        yield from batch_norm_tensors(f"{self.name}.1", self.outputs)


@dataclass(frozen=True)
class Bottleneck:
    """A block of the ResNet: `stride` is that of an average pool behind its second convolution."""

    name: str
    inputs: int
    planes: int
    stride: int

    @property
    def outputs(self) -> int:
        """Channels that it gives."""
        return self.planes * EXPANSION

    @property
    def downsampled(self) -> bool:
        """Whether the shortcut has a convolution."""
        return self.stride > 1 or self.inputs != self.outputs

    def tensors(self) -> Iterator[TensorSpec]:
        """Kernels and statistics."""
        shapes = ((self.planes, self.inputs, 1), (self.planes, self.planes, 3))
        for i, (outputs, inputs, side) in enumerate((*shapes, (self.outputs, self.planes, 1)), 1):
            yield convolution_tensor(f"{self.name}conv{i}", outputs, inputs, side)
            yield from batch_norm_tensors(f"{self.name}bn{i}", outputs)
        if self.downsampled:
            yield convolution_tensor(f"{self.name}downsample.0", self.outputs, self.inputs, 1)
            yield from batch_norm_tensors(f"{self.name}downsample.1", self.outputs)


@dataclass(frozen=True)
class CrisImage:
    """CLIP's ResNet with attention over its last cells, and what the pyramid makes of each level."""

    sizes: CrisSizes
    prefix: str = "backbone.visual."

    def stem(self) -> tuple[tuple[int, int, int], ...]:
        """(outputs, inputs, stride) of the first three convolutions."""
        width = self.sizes.vision_width
        return (width // 2, 3, 2), (width // 2, width // 2, 1), (width, width // 2, 1)

    def blocks(self) -> Iterator[tuple[int, Bottleneck]]:
        """Stage, from 1, and block, in the order of use."""
        inputs = self.sizes.vision_width
        for stage, depth in enumerate(self.sizes.stages, 1):
            planes = self.sizes.vision_width * 2 ** (stage - 1)
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                block = Bottleneck(f"{self.prefix}layer{stage}.{i}.", inputs, planes, stride)
                yield stage, block
                inputs = block.outputs

    def levels(self) -> tuple[Convolved, Convolved, Convolved]:
        """What the pyramid does to the levels before it sees the text, the finest first."""
        (c3, c4, c5), (o3, o4, o5) = self.sizes.levels, self.sizes.pyramid
        return (
            Convolved("neck.f3_v_proj", o3, c3, 3),
            Convolved("neck.f2_v_proj", o4, c4, 3),
            Convolved("neck.f1_v_proj", o5, c5, 1),
        )

    @property
    def cells(self) -> int:
        """Cells along one side that the positions were trained for."""
        return self.sizes.clip_resolution // STRIDE

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of ResNet, its pooling, and the pyramid's first layers."""
        at, deep, size = self.prefix, self.sizes.deep, self.sizes.embed_dim
        for i, (outputs, inputs, _) in enumerate(self.stem(), 1):
            yield convolution_tensor(f"{at}conv{i}", outputs, inputs, 3)
            yield from batch_norm_tensors(f"{at}bn{i}", outputs)
        for _, block in self.blocks():
            yield from block.tensors()
        pool = f"{at}attnpool."
        shape = (self.cells**2 + 1, deep)
        yield TensorSpec(f"{pool}positional_embedding", shape, reason=POSITIONS)
        for part in "qkv":
            yield from linear_tensors(f"{pool}{part}_proj", deep, deep, "vision")
        yield from linear_tensors(f"{pool}c_proj", size, deep, "vision")
        yield convolution_tensor(f"{pool}connect.0", size, deep, 1)
        yield from batch_norm_tensors(f"{pool}connect.1", size)
        for level in self.levels():
            yield from level.tensors()

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        side = self.sizes.input_size
        for images in (1, 2):
            pixels = rng.uniform(-1, 1, (images, 3, side, side))
            yield {"pixel_values": pixels.astype(np.float32)}


@dataclass(frozen=True)
class CrisText:
    """CLIP's text transformer, of which all words are given beside the text's vector."""

    sizes: CrisSizes
    prefix: str = "backbone."

    def block(self, layer: int) -> str:
        """What the names of a block begin with."""
        return f"{self.prefix}transformer.resblocks.{layer}."

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor, the embedding first."""
        at, width, sizes = self.prefix, self.sizes.text_width, self.sizes
        table = (sizes.vocab_size, width)
        yield TensorSpec(f"{at}token_embedding.weight", table, "embedding")
        places = (sizes.context_length, width)
        yield TensorSpec(f"{at}positional_embedding", places, reason=POSITIONS)
        for layer in range(sizes.text_layers):
            block = self.block(layer)
            yield from attention_tensors(f"{block}attn", width, "decoder")
            yield from linear_tensors(f"{block}mlp.c_fc", 4 * width, width, "decoder")
            yield from linear_tensors(f"{block}mlp.c_proj", width, 4 * width, "decoder")
            for part in ("ln_1", "ln_2"):
                yield from norm_tensors(block + part, width)
        yield from norm_tensors(f"{at}ln_final", width)
        projection = (width, sizes.embed_dim)
        yield TensorSpec(f"{at}text_projection", projection, "decoder", turned=True)
        yield TensorSpec(f"{at}logit_scale", (), reason=UNUSED_SCALE, used=False)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random tokens: one text, and three of which one is padded."""
        length, last = self.sizes.word_len, self.sizes.vocab_size - 1
        for texts in (1, 3):
            ids = rng.integers(1, last, (texts, length))
            ids[:, -1] = last
            ids[-1, length // 2 :] = [last, *[0] * (length - length // 2 - 1)]
            yield {"input_ids": ids}


@dataclass(frozen=True)
class CrisMask:
    """Pyramid, decoder and the kernel made of the text."""

    sizes: CrisSizes

    def joins(self) -> dict[str, Convolved]:
        """The pyramid's layers that see the text, by their names in it."""
        (o3, o4, o5), dim = self.sizes.pyramid, self.sizes.dim
        shapes = {
            "f2_cat": (o5 + o4, 1),
            "f3_cat": (o3 + o4, 1),
            "f4_proj5": (o5, 3),
            "f4_proj4": (o4, 3),
            "f4_proj3": (o4, 3),
            "aggr": (3 * o4, 1),
            "coordconv.0.conv1": (o4 + 2, 3),
            "coordconv.1": (o4, 3),
        }
        return {n: Convolved(f"neck.{n}", dim, *shape) for n, shape in shapes.items()}

    def upsampled(self) -> tuple[Convolved, Convolved]:
        """The two layers behind the projector's upsampling."""
        dim = self.sizes.dim
        return Convolved("proj.vis.1", dim, dim, 3), Convolved("proj.vis.3", dim // 2, dim, 3)

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor."""
        sizes, dim, kernel = self.sizes, self.sizes.dim, self.sizes.dim // 2
        deepest = sizes.pyramid[2]
        yield TensorSpec("neck.txt_proj.0.weight", (deepest, sizes.embed_dim), "decoder")
        yield from batch_norm_tensors("neck.txt_proj.1", deepest)
        yield from batch_norm_tensors("neck.norm_layer.0", deepest)
        for layer in (*self.joins().values(), *self.upsampled()):
            yield from layer.tensors()
        for i in range(sizes.num_layers):
            at = f"decoder.layers.{i}."
            for part in ("self_attn", "multihead_attn"):
                yield from attention_tensors(at + part, dim, "vision")
            for part in ("self_attn_norm", "cross_attn_norm", "norm1", "norm2", "norm3"):
                yield from norm_tensors(at + part, dim)
            yield from linear_tensors(f"{at}ffn.0", sizes.dim_ffn, dim, "vision")
            yield from norm_tensors(f"{at}ffn.3", sizes.dim_ffn)
            yield from linear_tensors(f"{at}ffn.4", dim, sizes.dim_ffn, "vision")
        yield from norm_tensors("decoder.norm", dim)
        yield convolution_tensor("proj.vis.4", kernel, kernel, 1)
        yield TensorSpec("proj.vis.4.bias", (kernel,), reason=BIAS)
        yield from linear_tensors("proj.txt", kernel * TAPS + 1, sizes.embed_dim, "decoder")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random levels of one image, for one text and for three, of which one is padded."""
        sizes = self.sizes
        for texts in (1, 3):
            words = (texts, sizes.word_len, sizes.text_width)
            mask = np.ones((texts, sizes.word_len), np.float32)
            mask[-1, sizes.word_len // 2 :] = 0
            feed = {
                name: rng.uniform(0, 1, (1, channels, side, side)).astype(np.float32)
                for name, (channels, side) in level_shapes(sizes).items()
            }
            feed["text_embeds"] = rng.standard_normal((texts, sizes.embed_dim), np.float32)
            yield {**feed, "words": rng.standard_normal(words, np.float32), "word_mask": mask}


def level_shapes(sizes: CrisSizes) -> dict[str, tuple[int, int]]:
    """Channels and side of the levels that the image graph gives, by name."""
    o3, o4, o5 = sizes.pyramid
    return {
        "level_3": (o3, sizes.grid),
        "level_4": (o4, sizes.grid),
        "level_5": (o5, sizes.grid // 2),
    }


def cris_sizes(config: Mapping[str, Any]) -> CrisSizes:
    """Sizes of a parsed config.json; what it leaves out is that of the code's ResNet-50 settings.

    Raises `InputRefused` on a bad config.
    """
    found = {key: count(config, key, default, "config") for key, default in SIZES.items()}
    stages = _numbers(config, "vision_layers", LAYERS, 4)
    pyramid = _numbers(config, "fpn_out", (256, 512, 1024), 3)
    pad = config.get("pad_token_id") or 0
    sizes = CrisSizes(**found, stages=stages, pyramid=(pyramid[0], pyramid[1], pyramid[2]), pad=pad)
    heads = ((sizes.deep, sizes.deep // 64), (sizes.text_width, sizes.text_heads))
    wrong = any(width % max(count_, 1) for width, count_ in (*heads, (sizes.dim, sizes.num_head)))
    if wrong or sizes.dim % 4 or sizes.dim != sizes.text_width or type(pad) is not int:
        raise InputRefused(
            f"config.json: pyramid of {pyramid}, words of {sizes.text_width}, heads {sizes.num_head} and "
            f"{sizes.text_heads}, pad_token_id {pad!r}; expected pixels and words of one width, divisible "
            "by 4 and by the heads"
        )
    if (
        sizes.input_size % STRIDE
        or sizes.clip_resolution % STRIDE
        or sizes.word_len > sizes.context_length
    ):
        raise InputRefused(
            f"config.json: images of {sizes.input_size} (trained {sizes.clip_resolution}) pixels, texts of "
            f"{sizes.word_len} tokens in {sizes.context_length}; expected multiples of {STRIDE} pixels, and "
            "texts that fit"
        )
    return sizes


def _numbers(
    config: Mapping[str, Any], key: str, default: tuple[int, ...], length: int
) -> tuple[int, ...]:
    found = config.get(key) or default
    good = isinstance(found, (list, tuple)) and len(found) == length
    if not good or any(type(value) is not int or value < 1 for value in found):
        raise InputRefused(f"config.json: {key} is {found!r}; expected {length} positive integers")
    return tuple(found)


def cris_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with every size said. Raises `InputRefused`."""
    sizes = cris_sizes(config)
    said = {key: getattr(sizes, key) for key in SIZES}
    lists = {"vision_layers": list(sizes.stages), "fpn_out": list(sizes.pyramid)}
    names = {"architectures": [CLASS], "model_type": MODEL_TYPE, "pad_token_id": sizes.pad}
    return {**config, **said, **lists, **names}
