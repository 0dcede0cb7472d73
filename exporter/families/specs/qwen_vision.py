"""The vision part of Qwen2-VL and Qwen2.5-VL: a transformer over the patches of one image.

Images keep their shape, so the number of patches varies. What depends on the shape of the grid
(rotary positions, windows) is computed here in numpy and fed to the graph as integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.families.base import BIAS, NORM, PATCHES, Feed, TensorSpec, norm_tensors
from exporter.families.config import choice, count, positive, section

CHANNELS = 3
# Frames that the patch embedding joins: an image is repeated that often.
FRAMES = 2
# Both classes have it in the code, not in the config.
NORM_EPS = 1e-6
WHERE = "vision_config"


@dataclass(frozen=True)
class QwenVisionSpec:
    """Sizes in elements, names as in the checkpoint.

    A patch is `patch_size` pixels a side, a feature row `merge` x `merge` patches. `gated`: RMSNorm
    and a SwiGLU MLP (Qwen2.5-VL) instead of LayerNorm and quick GELU (Qwen2-VL). `window`: feature
    rows along a side of an attention window, 0 for none; the layers `full` look at the whole image.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    patch_size: int
    merge: int
    output_size: int
    rope_theta: float
    gated: bool
    window: int
    full: tuple[int, ...]
    prefix: str

    @property
    def patch_values(self) -> int:
        """Values of one patch: channels, frames, height, width."""
        return CHANNELS * FRAMES * self.patch_size**2

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.heads

    def windowed(self, layer: int) -> bool:
        """Whether `layer` attends within windows."""
        return bool(self.window) and layer not in self.full

    def mlp_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each matrix of a block's MLP, in the order of use."""
        wide, narrow = (
            (self.intermediate_size, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
        )
        if self.gated:
            return {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
        return {"fc1": wide, "fc2": narrow}

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has."""
        size, joined = self.hidden_size, self.hidden_size * self.merge**2
        patch = (size, CHANNELS, FRAMES, self.patch_size, self.patch_size)
        yield TensorSpec(self.prefix + "patch_embed.proj.weight", patch, reason=PATCHES)
        for i in range(self.layers):
            at = f"{self.prefix}blocks.{i}."
            yield from self._norm(at + "norm1")
            yield from _linear(at + "attn.qkv", (3 * size, size))
            yield from _linear(at + "attn.proj", (size, size))
            yield from self._norm(at + "norm2")
            for name, shape in self.mlp_shapes().items():
                yield from _linear(f"{at}mlp.{name}", shape)
        yield from self._norm(self.prefix + "merger.ln_q")
        yield from _linear(self.prefix + "merger.mlp.0", (joined, joined))
        yield from _linear(self.prefix + "merger.mlp.2", (self.output_size, joined))

    def _norm(self, name: str) -> Iterator[TensorSpec]:
        if self.gated:
            yield TensorSpec(name + ".weight", (self.hidden_size,), reason=NORM)
        else:
            yield from norm_tensors(name, self.hidden_size)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random patches of a small image, and of one that does not fill its windows."""
        side = self.window or 2
        for rows, columns in ((1, 2), (side + 1, 2 * side + 1)):
            height, width = rows * self.merge, columns * self.merge
            shape = (height * width, self.patch_values)
            yield vision_feed(self, rng.uniform(-1, 1, shape).astype(np.float32), height, width)


def _linear(name: str, shape: tuple[int, int]) -> Iterator[TensorSpec]:
    yield TensorSpec(name + ".weight", shape, "vision")
    yield TensorSpec(name + ".bias", shape[:1], reason=BIAS)


def vision_feed(
    spec: QwenVisionSpec, pixels: NDArray[np.float32], height: int, width: int
) -> dict[str, NDArray[Any]]:
    """Inputs of the vision graph for one image of ``height x width`` patches.

    `pixels`: float32 ``[height * width, patch_values]``, the patches of a feature row together.
    """
    feed: dict[str, NDArray[Any]] = {
        "pixel_values": pixels,
        "patch_positions": patch_positions(height, width, spec.merge),
    }
    if spec.window:
        feed |= windows(height // spec.merge, width // spec.merge, spec.window, spec.merge**2)
    return feed


def patch_positions(height: int, width: int, merge: int) -> NDArray[np.int64]:
    """Row and column of each patch, int64 ``[height * width, 2]``, those of a feature row together."""
    places = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
    return np.ascontiguousarray(places.transpose(1, 3, 2, 4, 0).reshape(-1, 2), np.int64)


def grid_of(feed: Feed) -> tuple[int, int]:
    """Height and width in patches of the image that a feed holds."""
    height, width = (feed["patch_positions"].max(axis=0) + 1).tolist()
    return height, width


def windows(rows: int, columns: int, side: int, unit: int) -> dict[str, NDArray[Any]]:
    """Which patches share a window of ``side x side`` feature rows of `unit` patches each.

    Windows at the right and lower edge hold what is left. window_patches int64
    ``[windows, longest]``: the patches of each, patch 0 behind the last; window_lengths int32
    ``[windows]``; patch_places int64 ``[patches]``: where each patch stands in window_patches.
    """
    row, column = np.indices((rows, columns)).reshape(2, -1)
    window = row // side * -(-columns // side) + column // side
    # Stable, so that the order within a window is that of the image.
    order = np.argsort(window, kind="stable")
    lengths = np.bincount(window) * unit
    starts = np.cumsum(lengths) - lengths
    patches = (order[:, None] * unit + np.arange(unit)).reshape(-1)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    slot = np.arange(len(patches)) - starts[owner]
    table = np.zeros((len(lengths), int(lengths.max())), np.int64)
    table[owner, slot] = patches
    places = np.empty(len(patches), np.int64)
    places[patches] = owner * table.shape[1] + slot
    return {
        "window_patches": table,
        "window_lengths": lengths.astype(np.int32),
        "patch_places": places,
    }


def read_vision(config: Mapping[str, Any], *, gated: bool, prefix: str) -> QwenVisionSpec:
    """The vision part of a parsed config.json, with the defaults of transformers' config classes.

    Raises `InputRefused` on a bad config.
    """
    vision = section(config, WHERE)
    _refuse_other_kinds(vision, "silu" if gated else "quick_gelu")
    hidden, inner, output = _gated_sizes(vision) if gated else _plain_sizes(vision)
    patch = count(vision, "patch_size", 14, WHERE)
    merge = count(vision, "spatial_merge_size", 2, WHERE)
    spec = QwenVisionSpec(
        hidden_size=hidden,
        layers=count(vision, "depth", 32, WHERE),
        heads=count(vision, "num_heads", 16, WHERE),
        intermediate_size=inner,
        patch_size=patch,
        merge=merge,
        output_size=output,
        rope_theta=positive(vision.get("rope_parameters") or {}, "rope_theta", 10000.0, WHERE),
        gated=gated,
        window=count(vision, "window_size", 112, WHERE) // merge // patch if gated else 0,
        full=_full_layers(vision) if gated else (),
        prefix=prefix,
    )
    if spec.hidden_size % spec.heads or spec.head_dim % 4 or (gated and not spec.window):
        raise InputRefused(
            f"config.json: {WHERE} has hidden size {hidden} in {spec.heads} heads and windows of "
            f"{spec.window} rows; expected a head size divisible by 4 and windows of at least one row"
        )
    return spec


def _gated_sizes(vision: Mapping[str, Any]) -> tuple[int, int, int]:
    """Hidden, inner and output size of Qwen2.5-VL's vision part."""
    keys = (("hidden_size", 3584), ("intermediate_size", 3420), ("out_hidden_size", 3584))
    hidden, inner, output = (count(vision, key, default, WHERE) for key, default in keys)
    return hidden, inner, output


def _plain_sizes(vision: Mapping[str, Any]) -> tuple[int, int, int]:
    """The same of Qwen2-VL's, which calls the output size hidden_size."""
    hidden = count(vision, "embed_dim", 1280, WHERE)
    ratio = count(vision, "mlp_ratio", 4, WHERE)
    return hidden, hidden * ratio, count(vision, "hidden_size", 3584, WHERE)


def _refuse_other_kinds(vision: Mapping[str, Any], activation: str) -> None:
    choice(vision, "hidden_act", activation, (activation,), WHERE)
    for key, known in (
        ("in_channels", CHANNELS),
        ("in_chans", CHANNELS),
        ("temporal_patch_size", FRAMES),
    ):
        if vision.get(key) not in (None, known):
            raise InputRefused(f"config.json: {WHERE}.{key} is {vision[key]!r}; expected {known}")


def _full_layers(vision: Mapping[str, Any]) -> tuple[int, ...]:
    value = vision.get("fullatt_block_indexes")
    layers = (7, 15, 23, 31) if value is None else value
    if not isinstance(layers, list | tuple) or not all(type(i) is int for i in layers):
        raise InputRefused(
            f"config.json: {WHERE}.fullatt_block_indexes is {value!r}; expected a list of layers"
        )
    return tuple(layers)
