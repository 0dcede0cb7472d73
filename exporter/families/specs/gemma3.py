"""Gemma 3 (arXiv 2503.19786): a decoder of windowed and full layers, and a SigLIP tower, pooled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.families.base import (
    BIAS,
    NORM,
    PATCHES,
    POSITIONS,
    Feed,
    TensorSpec,
    VitSpec,
    block_tensors,
    gated_block_shapes,
    norm_tensors,
)
from exporter.families.config import choice, count, flag, positive, section
from exporter.families.specs.decoder import example_texts

SLIDING, FULL = "sliding_attention", "full_attention"
TEXT, VISION = "text_config", "vision_config"
ACTIVATION = "gelu_pytorch_tanh"
# Gemma3TextConfig's and SiglipVisionConfig's defaults.
TEXT_SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
VISION_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 224,
}
THETAS = {FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)}
PATTERN = 6  # every sixth layer sees everything
IMAGE_TOKENS = 256
# Positions of the example prompt that see one another both ways.
EXAMPLE_IMAGE = slice(1, 4)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of a kind of layer: the base, and what positions are divided by."""

    theta: float
    factor: float = 1.0


@dataclass(frozen=True)
class Gemma3Decoder:
    """A decoder of the Gemma 3 kind; sizes in elements, names as in the checkpoint.

    `windows`: how many places up to its own a position of each layer sees, 0 for all. Image tokens
    see one another both ways, within the window. All norms scale by one plus their weight; queries
    and keys have one too, and queries are multiplied by ``query_scalar**-0.5``. `prefix` is put before
    ``layers.{i}...``.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    query_scalar: float
    windows: tuple[int, ...]
    full_rotary: Rotary
    sliding_rotary: Rotary
    max_positions: int
    prefix: str
    embedding: str
    final_norm: str
    head: str
    tied: bool

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each matrix of a block by its name within the block, in the order of use."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return gated_block_shapes(self.hidden_size, self.intermediate_size, queries, keys)

    def norm_sizes(self) -> dict[str, int]:
        """Size of each norm of a block by its name within the block."""
        names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        heads = dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), self.head_dim)
        return {**{f"{name}_layernorm": self.hidden_size for name in names}, **heads}

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has: the embedding first, the head (unless tied) last."""
        table = (self.vocab_size, self.hidden_size)
        yield TensorSpec(self.embedding, table, "embedding")
        for i in range(self.layers):
            layer = f"{self.prefix}layers.{i}."
            for name, size in self.norm_sizes().items():
                yield TensorSpec(f"{layer}{name}.weight", (size,), reason=NORM)
            for name, shape in self.matrix_shapes().items():
                yield TensorSpec(f"{layer}{name}.weight", shape, "decoder")
        yield TensorSpec(self.final_norm, (self.hidden_size,), reason=NORM)
        if not self.tied:
            yield TensorSpec(self.head, table, "head")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random inputs of the graph: a prompt with an image, and one token behind three, twice."""
        for batch, length, past, feed in example_texts(self, rng):
            image = np.zeros(length, np.bool_)
            image[EXAMPLE_IMAGE] = not past
            positions = past + seen_positions(image)
            feed["position_ids"] = np.repeat(positions[:, None], batch, axis=1)
            yield feed


@dataclass(frozen=True)
class PooledSiglip(VitSpec):
    """A SigLIP tower whose patches are averaged in squares, normed and projected.

    `tokens` rows a tile; `norm` and `projection` are whole tensor names, the projection is stored
    as ``[inputs, outputs]``.
    """

    tokens: int
    output_size: int
    norm: str
    projection: str

    @property
    def pooled(self) -> int:
        """Patches along one side of a square that is averaged."""
        return self.patches // int(self.tokens**0.5)

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower and projector."""
        hidden, side = self.hidden_size, self.patch_size
        patch = f"{self.prefix}embeddings.patch_embedding."
        yield TensorSpec(patch + "weight", (hidden, 3, side, side), reason=PATCHES)
        yield TensorSpec(patch + "bias", (hidden,), reason=BIAS)
        positions = f"{self.prefix}embeddings.position_embedding.weight"
        yield TensorSpec(positions, (self.patches**2, hidden), reason=POSITIONS)
        for i in range(self.layers):
            layer = f"{self.prefix}encoder.layers.{i}."
            yield from block_tensors(layer, hidden, self.intermediate_size)
        yield from norm_tensors(self.prefix + "post_layernorm", hidden)
        yield TensorSpec(self.norm, (hidden,), reason=NORM)
        yield TensorSpec(self.projection, (hidden, self.output_size), "vision", turned=True)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random tiles, one and two."""
        for tiles in (1, 2):
            shape = (1, tiles, 3, self.image_size, self.image_size)
            yield {"pixel_values": rng.uniform(-1, 1, shape).astype(np.float32)}


def seen_positions(image: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Place in the text and the last place seen, int64 ``[2, length]``, from where image tokens are.

    A token of an image (consecutive image tokens) sees to the image's end, every other one to itself:
    transformers' mask of ``token_type_ids``.
    """
    places = np.arange(len(image), dtype=np.int64)
    following = np.where(image, len(image), places)
    behind = np.minimum.accumulate(following[::-1])[::-1]
    return np.stack([places, np.where(image, behind - 1, places)])


def gemma3_decoder(
    config: Mapping[str, Any], *, prefix: str, embedding: str, final_norm: str, head: str
) -> Gemma3Decoder:
    """The decoder of a parsed config.json; `prefix` and the names as in `Gemma3Decoder`.

    Raises `InputRefused` on a bad config.
    """
    text = section(config, TEXT)
    _refuse_switches(text)
    sizes = {key: count(text, key, default, TEXT) for key, default in TEXT_SIZES.items()}
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % kv_heads or sizes["head_dim"] % 8:
        raise InputRefused(
            f"config.json: {TEXT} has {heads} heads of {sizes['head_dim']} and {kv_heads} key-value "
            "heads; expected a head_dim of a multiple of 8 and heads divisible by key-value heads"
        )
    window, kinds = sizes["sliding_window"], _layer_kinds(text, sizes["num_hidden_layers"])
    return Gemma3Decoder(
        hidden_size=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=sizes["head_dim"],
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        norm_eps=positive(text, "rms_norm_eps", 1e-6, TEXT),
        query_scalar=positive(text, "query_pre_attn_scalar", 256, TEXT),
        windows=tuple(window if kind == SLIDING else 0 for kind in kinds),
        full_rotary=_rotary(text, FULL),
        sliding_rotary=_rotary(text, SLIDING),
        max_positions=sizes["max_position_embeddings"],
        prefix=prefix,
        embedding=embedding,
        final_norm=final_norm,
        head=head,
        tied=flag(config, "tie_word_embeddings", True),
    )


def pooled_siglip(config: Mapping[str, Any], *, prefix: str, projector: str) -> PooledSiglip:
    """Tower and projector of a parsed config.json; the names are put before those of their tensors.

    Raises `InputRefused` on a bad config.
    """
    vision = section(config, VISION)
    choice(vision, "model_type", "siglip_vision_model", ("siglip_vision_model",), VISION)
    # Absent, transformers' class has a pooling head of its own, which no published Gemma 3 has.
    if flag(vision, "vision_use_head", True):
        raise InputRefused(
            f"config.json: {VISION}.vision_use_head is not false; only that is known"
        )
    sizes = {key: count(vision, key, default, VISION) for key, default in VISION_SIZES.items()}
    spec = PooledSiglip(
        hidden_size=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        patch_size=sizes["patch_size"],
        image_size=sizes["image_size"],
        norm_eps=positive(vision, "layer_norm_eps", 1e-6, VISION),
        activation=choice(vision, "hidden_act", ACTIVATION, (ACTIVATION, "gelu"), VISION),
        prefix=prefix,
        tokens=count(config, "mm_tokens_per_image", IMAGE_TOKENS, "config"),
        output_size=count(section(config, TEXT), "hidden_size", TEXT_SIZES["hidden_size"], TEXT),
        norm=f"{projector}mm_soft_emb_norm.weight",
        projection=f"{projector}mm_input_projection_weight",
    )
    channels, side = count(vision, "num_channels", 3, VISION), int(spec.tokens**0.5)
    if channels != 3 or spec.hidden_size % spec.heads:
        raise InputRefused(
            f"config.json: {VISION} has {channels} channels, hidden size {spec.hidden_size} and "
            f"{spec.heads} heads; expected 3 channels and a hidden size divisible by the heads"
        )
    if side**2 != spec.tokens or spec.patches % side:
        raise InputRefused(
            f"config.json: {spec.patches} patches a side cannot be averaged to mm_tokens_per_image "
            f"{spec.tokens}; expected the square of a divisor"
        )
    return spec


def _refuse_switches(text: Mapping[str, Any]) -> None:
    """Raise `InputRefused` for what changes the network and no published Gemma 3 sets."""
    choice(text, "model_type", "gemma3_text", ("gemma3_text",), TEXT)
    choice(text, "hidden_activation", ACTIVATION, (ACTIVATION,), TEXT)
    off = ("attention_bias", "use_bidirectional_attention")
    for key in (*off, "attn_logit_softcapping", "final_logit_softcapping"):
        if text.get(key):
            raise InputRefused(f"config.json: {TEXT}.{key} is {text[key]!r}; expected none")


def _layer_kinds(text: Mapping[str, Any], layers: int) -> Sequence[str]:
    """`SLIDING` or `FULL` for each layer."""
    # Gemma3TextConfig keeps the pattern of a file under another name when it saves it.
    key = (
        "sliding_window_pattern" if "sliding_window_pattern" in text else "_sliding_window_pattern"
    )
    pattern = count(text, key, PATTERN, TEXT)
    kinds = text.get("layer_types")
    if kinds is None:
        return [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not {*kinds} <= {SLIDING, FULL}:
        raise InputRefused(
            f"config.json: {TEXT}.layer_types is not '{SLIDING}' or '{FULL}' for each of {layers} layers"
        )
    return kinds


def _rotary(text: Mapping[str, Any], kind: str) -> Rotary:
    """Rotary positions of a kind of layer, as transformers 5 or as older versions write them."""
    key, default = THETAS[kind]
    rope: Any = text.get("rope_parameters")
    where = f"{TEXT}.rope_parameters.{kind}"
    if isinstance(rope, Mapping):
        rope = rope.get(kind) or {}
        theta = positive(rope, "rope_theta", default, where)
    else:
        # Older versions scale the full layers alone.
        rope, where = (
            (text.get("rope_scaling") or {}) if kind == FULL else {},
            f"{TEXT}.rope_scaling",
        )
        theta = positive(text, key, default, TEXT)
    if not isinstance(rope, Mapping):
        raise InputRefused(f"config.json: {where} is {rope!r}; expected an object")
    named = "rope_type" if rope.get("rope_type") is not None else "type"
    scaling = choice(rope, named, "default", ("default", "linear"), where)
    return Rotary(theta, positive(rope, "factor", 1.0, where) if scaling == "linear" else 1.0)
