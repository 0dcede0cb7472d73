"""Swin transformer (arXiv 2103.14030) on square images of one size: its tensors, windows and shifts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.families.base import BIAS, PATCHES, TensorSpec, norm_tensors
from exporter.families.config import choice, count, flag, positive

RELATIVE = "relative positions: added, not multiplied"
INDEX = "buffer that follows from the window's size"
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
# torch's default, which the norms of patches and of merged patches keep whatever config.json says.
FIXED_EPS = 1e-5
# What torch adds between tokens that are neighbours by the shift alone.
APART = -100.0
# Names up to transformers 5.0 behind a block's name, and the newest.
OLDER = (
    ("attention.self.query", "attention.q_proj"),
    ("attention.self.key", "attention.k_proj"),
    ("attention.self.value", "attention.v_proj"),
    (
        "attention.self.relative_position_bias_table",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    (
        "attention.self.relative_position_index",
        "attention.relative_position_bias.relative_position_index",
    ),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


@dataclass(frozen=True)
class SwinBlock:
    """One block: `shift` moves the windows by so many cells, 0 for none."""

    name: str
    shift: int


@dataclass(frozen=True)
class SwinStage:
    """Blocks of one width on ``side x side`` cells; `merge` names what halves the grid behind them."""

    width: int
    heads: int
    side: int
    blocks: tuple[SwinBlock, ...]
    merge: str


@dataclass(frozen=True)
class SwinSpec:
    """Sizes of a tower; `prefix` (with its dot) is put before all names."""

    image_size: int
    patch_size: int
    embed_dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    mlp_ratio: float
    norm_eps: float
    activation: str
    prefix: str

    @property
    def output_size(self) -> int:
        """Width of the last stage."""
        return self.embed_dim << (len(self.depths) - 1)

    def stages(self) -> Iterator[SwinStage]:
        """Every stage in order."""
        last = len(self.depths) - 1
        for i, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            side = self.image_size // self.patch_size >> i
            # In a grid of one window nothing is left to shift.
            shift = self.window // 2 if side > self.window else 0
            at = f"{self.prefix}encoder.layers.{i}."
            blocks = tuple(
                SwinBlock(f"{at}blocks.{n}.", shift if n % 2 else 0) for n in range(depth)
            )
            merge = "" if i == last else f"{at}downsample."
            yield SwinStage(self.embed_dim << i, heads, side, blocks, merge)

    def inner(self, width: int) -> int:
        """Width inside the MLP of a block."""
        return int(self.mlp_ratio * width)

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the tower."""
        at, side = f"{self.prefix}embeddings.", self.patch_size
        patch = f"{at}patch_embeddings.projection"
        yield TensorSpec(f"{patch}.weight", (self.embed_dim, 3, side, side), reason=PATCHES)
        yield TensorSpec(f"{patch}.bias", (self.embed_dim,), reason=BIAS)
        yield from norm_tensors(f"{at}norm", self.embed_dim)
        for stage in self.stages():
            for block in stage.blocks:
                yield from self._block(block.name, stage)
            if stage.merge:
                wide = 4 * stage.width
                yield from norm_tensors(f"{stage.merge}norm", wide)
                shape = (2 * stage.width, wide)
                yield TensorSpec(f"{stage.merge}reduction.weight", shape, "vision")
        yield from norm_tensors(f"{self.prefix}layernorm", self.output_size)

    def _block(self, name: str, stage: SwinStage) -> Iterator[TensorSpec]:
        width, inner = stage.width, self.inner(stage.width)
        shapes = {f"attention.{part}_proj": (width, width) for part in "qkvo"} | {
            "mlp.fc1": (inner, width),
            "mlp.fc2": (width, inner),
        }
        for part, shape in shapes.items():
            yield TensorSpec(f"{name}{part}.weight", shape, "vision")
            yield TensorSpec(f"{name}{part}.bias", shape[:1], reason=BIAS)
        table = ((2 * self.window - 1) ** 2, stage.heads)
        yield TensorSpec(table_name(name), table, reason=RELATIVE)
        yield from norm_tensors(f"{name}layernorm_before", width)
        yield from norm_tensors(f"{name}layernorm_after", width)


def table_name(block: str) -> str:
    """The tensor of a block's relative positions."""
    return f"{block}attention.relative_position_bias.relative_position_bias_table"


def relative_index(window: int) -> NDArray[np.int64]:
    """Row of the table for each pair of tokens of a window, ``[window**2, window**2]``."""
    cells = np.stack(np.divmod(np.arange(window**2), window))
    down, right = cells[:, :, None] - cells[:, None, :] + window - 1
    found: NDArray[np.int64] = down * (2 * window - 1) + right
    return found


def window_order(side: int, window: int, shift: int) -> NDArray[np.int64]:
    """Cell of the grid (row by row) at each place when the grid is shifted up and left and then cut
    into windows one behind the other: ``[side**2]``.
    """
    cells = np.roll(np.arange(side**2).reshape(side, side), (-shift, -shift), (0, 1))
    count = side // window
    parts = cells.reshape(count, window, count, window).transpose(0, 2, 1, 3)
    return parts.reshape(-1).astype(np.int64)


def shift_mask(side: int, window: int, shift: int) -> NDArray[np.float32]:
    """What is added to scores in each window, ``[windows, 1, window**2, window**2]``: 0 between tokens
    of one region of the unshifted grid, `APART` between others.
    """
    # Where the grid wraps round, a window holds cells from both of its edges.
    region = np.zeros(side, np.int64)
    region[side - window :], region[side - shift :] = 1, 2
    grid = (3 * region[:, None] + region[None, :]).reshape(-1)
    count = side // window
    parts = grid.reshape(count, window, count, window).transpose(0, 2, 1, 3)
    regions = parts.reshape(count**2, window**2)
    apart = regions[:, :, None] != regions[:, None, :]
    return np.where(apart, APART, 0.0).astype(np.float32)[:, None]


def merge_order(side: int) -> NDArray[np.int64]:
    """Cells of the grid in fours, as they are merged: ``[side**2]``."""
    cells = np.arange(side**2).reshape(side // 2, 2, side // 2, 2)
    # Down before right: the upper left, lower left, upper right and lower right cell.
    return cells.transpose(0, 2, 3, 1).reshape(-1).astype(np.int64)


def swin_spec(config: Mapping[str, Any], prefix: str, where: str) -> SwinSpec:
    """The tower of Swin's part of a config.json, with SwinConfig's defaults; `prefix` has its dot.

    Raises `InputRefused` on a bad config, and where images would have to be padded to windows.
    """
    if not flag(config, "qkv_bias", True) or flag(config, "use_absolute_embeddings", False):
        raise InputRefused(
            f"config.json: {where} has attention without bias or absolute positions; expected neither"
        )
    depths, heads = (_counts(config, key, where) for key in ("depths", "num_heads"))
    spec = SwinSpec(
        image_size=count(config, "image_size", 224, where),
        patch_size=count(config, "patch_size", 4, where),
        embed_dim=count(config, "embed_dim", 96, where),
        depths=depths,
        heads=heads,
        window=count(config, "window_size", 7, where),
        mlp_ratio=positive(config, "mlp_ratio", 4.0, where),
        norm_eps=positive(config, "layer_norm_eps", 1e-5, where),
        activation=choice(config, "hidden_act", "gelu", ACTIVATIONS, where),
        prefix=prefix,
    )
    channels = count(config, "num_channels", 3, where)
    if len(depths) != len(heads) or channels != 3:
        raise InputRefused(
            f"config.json: {where} has {len(depths)} depths, {len(heads)} num_heads and {channels} channels; "
            "expected as many of both, and 3 channels"
        )
    _check_grid(spec, where)
    return spec


def _check_grid(spec: SwinSpec, where: str) -> None:
    whole = spec.image_size % spec.patch_size == 0
    side = spec.image_size // spec.patch_size
    for i, heads in enumerate(spec.heads):
        here = side >> i
        whole = whole and here << i == side and here >= spec.window and here % spec.window == 0
        whole = whole and (spec.embed_dim << i) % heads == 0
    if not whole:
        raise InputRefused(
            f"config.json: {where} cuts {spec.image_size} pixels into patches of {spec.patch_size}, windows of "
            f"{spec.window} and {len(spec.depths)} stages with {list(spec.heads)} heads of width "
            f"{spec.embed_dim} and its doubles; expected whole windows in every stage and whole heads"
        )


def _counts(config: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    default = {"depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}[key]
    found = default if config.get(key) is None else config[key]
    if not isinstance(found, list | tuple) or not all(type(n) is int and n > 0 for n in found):
        raise InputRefused(f"config.json: {where}.{key} is {found!r}; expected positive integers")
    return tuple(found)
