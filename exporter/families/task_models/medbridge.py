"""A trained plug-in over a frozen CLIP, after MedBridge (arXiv 2505.21698): the worked example of
docs/adding_a_family.md.

From the paper: local regions of the image at full resolution beside the whole of it, each a view of its
own (Focal Sampling); a few learned queries that look at the frozen encoder's feature maps (Query
Encoder), then at one another across the views; the largest value over the views.

Chosen here, since the paper's code could not be read: everything else. The regions are overlapping
windows in a grid; the queries look at the states behind the tower's last block, in pre-norm blocks; their
mean is added to the whole view's class token before CLIP's last norm and projection, so that a plug-in
whose projection is zero leaves CLIP as it is, and labels are matched by CLIP's own text encoder. The
paper's mixture of experts weighs several frozen encoders by their queries; here there is one. Nothing
could be compared with the authors' weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from exporter.catalog.schema import Value
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import copy_small_files, read_config
from exporter.core.tensors import Checkpoint, SafetensorsWriter
from exporter.families.base import BIAS, Feed, TensorSpec, VitSpec, norm_tensors
from exporter.families.config import count, positive, section
from exporter.families.layouts.names import Layout
from exporter.families.layouts.published import PublishedLayout
from exporter.families.shapes.plugin import medbridge
from exporter.families.specs.clip import ClipImage, clip_image, clip_text
from exporter.families.task_models import clip
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, GraphSpec, Outputs, Task

MODEL_TYPE, CLASS = "medbridge", "MedBridgeModel"
MODEL_TYPES = (MODEL_TYPE,)
TASK: Task = "zero-shot"
TORCH_CLASSES = {MODEL_TYPE: f"exporter.families.reference.medbridge:{CLASS}"}
PUBLISHED: Mapping[str, PublishedLayout] = {}
LAYOUTS = (Layout(MODEL_TYPES, (), clip.EMBEDDING),)
SHAPES = {MODEL_TYPE: medbridge}
# A plug-in's config.json is CLIP's with a section more.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    **clip.CONFIG_DEFAULTS,
    "bridge_config.grid": 2,
    "bridge_config.num_queries": 16,
    "bridge_config.num_hidden_layers": 2,
}
PREFIX, WHERE = "bridge.", "bridge_config"
# Why they stay in float16.
QUERIES = "learned queries: few bytes"
ATTENTIONS = ("cross_attn", "self_attn")


@dataclass(frozen=True)
class Windows:
    """Local regions: `grid` x `grid` equal squares in the image's middle square, each of which shares
    `overlap` of its edge with the next.
    """

    grid: int
    overlap: float

    @property
    def views(self) -> int:
        """The whole image and its windows."""
        return 1 + self.grid**2

    def cut(self, image: Image) -> list[Image]:
        """The image itself, then its windows row by row, in the image's own pixels."""
        square = min(image.size)
        left, top = ((n - square) / 2 for n in image.size)
        edge = square / (self.grid - (self.grid - 1) * self.overlap)
        starts = np.linspace(0, square - edge, self.grid)
        boxes = [
            (left + x, top + y, left + x + edge, top + y + edge) for y in starts for x in starts
        ]
        return [image, *(image.crop(_pixels(box)) for box in boxes)]


@dataclass(frozen=True)
class BridgedImage:
    """The image half of a CLIP, with a plug-in of as many blocks as `block` says.

    `block`: sizes of the plug-in's blocks, which are as wide as the tower's.
    """

    clip: ClipImage
    windows: Windows
    queries: int
    block: VitSpec

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the frozen half, then the plug-in's."""
        yield from self.clip.tensors()
        hidden, inner = self.block.hidden_size, self.block.intermediate_size
        yield TensorSpec(f"{PREFIX}queries", (self.queries, hidden), reason=QUERIES)
        yield from norm_tensors(f"{PREFIX}features_norm", hidden)
        for i in range(self.block.layers):
            at = f"{PREFIX}layers.{i}."
            for name in ATTENTIONS:
                yield from norm_tensors(f"{at}{name}_norm", hidden)
                for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    yield from _linear(f"{at}{name}.{part}", hidden, hidden)
            yield from norm_tensors(f"{at}mlp_norm", hidden)
            yield from _linear(f"{at}mlp.fc1", inner, hidden)
            yield from _linear(f"{at}mlp.fc2", hidden, inner)
        yield from norm_tensors(f"{PREFIX}final_norm", hidden)
        yield from _linear(f"{PREFIX}projection", hidden, hidden)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random views, of one image and of two."""
        side = self.clip.tower.image_size
        for batch in (1, 2):
            pixels = rng.uniform(-1, 1, (batch, self.windows.views, 3, side, side))
            yield {"pixel_values": pixels.astype(np.float32)}


class FocalPreparer:
    """`families.tasks.ZeroShotPreparer`: every view is prepared as the frozen CLIP prepares an image."""

    def __init__(self, frozen: clip.ClipPreparer, windows: Windows) -> None:
        self.template = frozen.template
        self._frozen, self._windows = frozen, windows

    def images(self, images: Sequence[Image]) -> Feed:
        """pixel_values float32 ``[images, views, 3, side, side]``."""
        cut = [self._frozen.images(self._windows.cut(image)) for image in images]
        return {"pixel_values": np.stack([feed["pixel_values"] for feed in cut])}

    def texts(self, texts: Sequence[str]) -> Feed:
        """input_ids and attention_mask int64 ``[texts, length]``, as CLIP's."""
        return self._frozen.texts(texts)


def bridged_image(config: Mapping[str, Any]) -> BridgedImage:
    """The image half of a parsed config.json. Raises `InputRefused` on a bad one.

    Absent keys of ``bridge_config``: 2 x 2 windows, a quarter of overlap, 16 queries, 2 blocks, heads
    and inner size of the tower.
    """
    frozen, bridge = clip_image(config), section(config, WHERE)
    tower = frozen.tower
    block = replace(
        tower,
        layers=count(bridge, "num_hidden_layers", 2, WHERE),
        heads=count(bridge, "num_attention_heads", tower.heads, WHERE),
        intermediate_size=count(bridge, "intermediate_size", tower.intermediate_size, WHERE),
        prefix="",
    )
    windows = Windows(count(bridge, "grid", 2, WHERE), positive(bridge, "overlap", 0.25, WHERE))
    if windows.overlap >= 1 or block.hidden_size % block.heads:
        raise InputRefused(
            f"config.json: {WHERE} has an overlap of {windows.overlap} and {block.heads} heads; expected "
            f"less than 1, and heads that divide {block.hidden_size}, the tower's hidden size"
        )
    return BridgedImage(frozen, windows, count(bridge, "num_queries", 16, WHERE), block)


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """Image and text encoder of a parsed config.json. Raises `InputRefused` on a bad one."""
    return {VISION_GRAPH: bridged_image(config), TEXT_GRAPH: clip_text(config)}


def open_preparer(model_dir: Path) -> FocalPreparer:
    """Windows, tokenizer and image settings of a model folder. Raises `InputRefused`."""
    windows = bridged_image(read_config(model_dir / "config.json")).windows
    return FocalPreparer(clip.open_preparer(model_dir), windows)


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:
    """image_embeds of the family's own class; text_embeds and logit_scale as CLIP's."""
    import torch

    if graph == VISION_GRAPH:
        return {"image_embeds": model.encode_image(torch.from_numpy(feed["pixel_values"])).numpy()}
    return clip.torch_outputs(model, graph, feed)


def join_plugin(base: Path, plugin: Path, bridge: Mapping[str, Any], out: Path) -> None:
    """Write a CLIP folder and a plug-in's tensors as one model folder, into the empty folder `out`.

    `base`: a folder of transformers' CLIPModel; `plugin`: a safetensors file whose tensors begin with
    ``bridge.``; `bridge`: the config.json's ``bridge_config``. Values and types stay as they are stored.
    Raises `InputRefused` when a tensor is missing, unknown or of another shape.
    """
    config = read_config(base / "config.json")
    if config.get("model_type") != "clip":
        raise InputRefused(
            f"{base}: model_type is {config.get('model_type')!r}; expected 'clip': merge another layout "
            "first (medexport merge)"
        )
    config |= {"model_type": MODEL_TYPE, "architectures": [CLASS], WHERE: dict(bridge)}
    expected = {t.name: t.shape for spec in graphs(config).values() for t in spec.tensors()}
    frozen, added = Checkpoint.open(base), Checkpoint([plugin])
    for name, info in added.tensors.items():
        if not name.startswith(PREFIX) or expected.get(name) != info.shape:
            raise InputRefused(
                f"{plugin}: tensor '{name}' is {list(info.shape)}; expected "
                f"{list(expected.get(name, ())) or 'no such tensor'} (names begin with {PREFIX})"
            )
    sources = {name: added if name.startswith(PREFIX) else frozen for name in expected}
    entries = {n: (s.info(n).dtype, s.info(n).shape) for n, s in sources.items()}
    copy_small_files(base, out)
    (out / "config.json").write_bytes(canonical_json(config))
    with SafetensorsWriter(out / "model.safetensors", entries, {"format": "pt"}) as writer:
        for name, source in sources.items():
            writer.write(name, source.raw(name))


def _linear(name: str, outputs: int, inputs: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (outputs, inputs), "vision")
    yield TensorSpec(f"{name}.bias", (outputs,), reason=BIAS)


def _pixels(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """The nearest whole pixels, at least one on each axis."""
    left, top, right, bottom = (round(value) for value in box)
    return left, top, max(right, left + 1), max(bottom, top + 1)
