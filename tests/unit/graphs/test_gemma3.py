"""Gemma 3's graphs: windows in every onnxruntime, runs behind a past, pooling; against transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from exporter.adapters.merge import merge_adapters
from exporter.core.modelfiles import read_config
from exporter.families.specs.gemma3 import seen_positions
from exporter.graphs.export import export_model
from exporter.runtimes.torch_reference import load_model
from tests.support.tiny_gemma3 import ROWS, SIDE, SOFT_ID, WINDOW, write_tiny_gemma3

torch.set_num_threads(1)
DECODER = "decoder_model_merged"
# Two images with three tokens between them, and text before and behind.
LENGTH, IMAGES = 2 * ROWS + 15, (slice(4, 4 + ROWS), slice(7 + ROWS, 7 + 2 * ROWS))
Array = NDArray[np.float32]
Feed = dict[str, NDArray[Any]]


@dataclass
class Tiny:
    """A tiny model's exported graphs and its torch model."""

    onnx: Path
    model: Any
    embeds: Array
    image: NDArray[np.bool_]

    def expected(self, count: int = LENGTH) -> Array:
        """Logits ``[count, vocab]`` of transformers for the first embeddings."""
        kinds = torch.from_numpy(self.image[None, :count]).long()
        with torch.inference_mode():
            embeds = torch.from_numpy(self.embeds[None, :count])
            logits: Array = self.model(inputs_embeds=embeds, token_type_ids=kinds).logits[0].numpy()
        return logits


def exported(root: Path, **changes: Any) -> tuple[Path, Any]:
    """The graphs' folder and the torch model of a tiny model with changed keys."""
    for name in ("merged", "out"):
        (root / name).mkdir(parents=True)
    merge_adapters(write_tiny_gemma3(root / "base", **changes), [], root / "merged")
    export_model(root / "merged", root / "out", float_storage="float32")
    model = load_model(root / "merged", read_config(root / "merged/config.json"))
    return root / "out/model/onnx", model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder, model = exported(tmp_path_factory.mktemp("gemma3"))
    image = np.zeros(LENGTH, np.bool_)
    for part in IMAGES:
        image[part] = True
    embeds = np.random.default_rng(0).standard_normal((LENGTH, 64)).astype(np.float32)
    return Tiny(folder, model, embeds, image)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(decoder: ort.InferenceSession, feed: Feed, past: Feed | None = None) -> tuple[Array, Feed]:
    """All logits ``[batch, length, vocab]`` behind `past`, and the past of what comes next."""
    shapes = {i.name: i.shape for i in decoder.get_inputs() if i.name.startswith("past_")}
    batch = len(feed["inputs_embeds"])
    past = past or {n: np.zeros((batch, s[1], 0, s[3]), np.float32) for n, s in shapes.items()}
    names = ["logits", *(n.replace("past_key_values", "present") for n in shapes)]
    keep = {"num_logits_to_keep": np.array(0, np.int64)}
    logits, *rest = decoder.run(names, {**feed, **keep, **past})
    return logits, dict(zip(shapes, rest, strict=True))


def whole(tiny: Tiny, first: int, last: int) -> Feed:
    """The inputs of positions `first` to `last` of the text."""
    return {
        "inputs_embeds": tiny.embeds[None, first:last],
        "attention_mask": np.ones((1, last), np.int64),
        "position_ids": seen_positions(tiny.image)[:, None, first:last],
    }


def relative(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_two_images_in_one_run(tiny: Tiny) -> None:
    logits, _ = run(session(tiny.onnx / f"{DECODER}.onnx"), whole(tiny, 0, LENGTH))
    assert relative(logits[0], tiny.expected()) < 1e-5


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (4,)])
def test_runs_behind_a_past(tiny: Tiny, sizes: tuple[int, ...]) -> None:
    """One token at a time, and several: the window goes on over what is cached."""
    decoder, at = session(tiny.onnx / f"{DECODER}.onnx"), LENGTH - 4
    logits, past = run(decoder, whole(tiny, 0, at))
    found = [logits]
    for size in sizes:
        logits, past = run(decoder, whole(tiny, at, at + size), past)
        found.append(logits)
        at += size
    assert relative(np.concatenate(found, axis=1)[0], tiny.expected()) < 1e-5


def test_a_batch_whose_rows_are_of_other_lengths_goes_on(tiny: Tiny) -> None:
    """A prompt padded on the right, then one token for each row."""
    decoder, lengths = session(tiny.onnx / f"{DECODER}.onnx"), (LENGTH - 1, LENGTH - 6)
    longest, seen = max(lengths), seen_positions(tiny.image)
    feed: Feed = {
        "inputs_embeds": np.repeat(tiny.embeds[None, :longest], 2, axis=0),
        "attention_mask": (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64),
        "position_ids": np.repeat(seen[:, None, :longest], 2, axis=1),
    }
    logits, past = run(decoder, feed)
    for row, length in enumerate(lengths):
        assert relative(logits[row, :length], tiny.expected(length)) < 1e-5
    feed = {
        "inputs_embeds": np.stack([tiny.embeds[n : n + 1] for n in lengths]),
        "attention_mask": (np.arange(longest + 1) <= np.array(lengths)[:, None]).astype(np.int64),
        "position_ids": np.array([[[n] for n in lengths]] * 2),
    }
    logits, _ = run(decoder, feed, past)
    for row, length in enumerate(lengths):
        assert relative(logits[row], tiny.expected(length + 1)[-1:]) < 1e-5


def test_looking_back_only_gives_something_else(tiny: Tiny) -> None:
    """Or the tests above would not see what image tokens see of one another."""
    feed = whole(tiny, 0, LENGTH)
    feed["position_ids"] = feed["position_ids"][:1].repeat(2, axis=0)
    logits, _ = run(session(tiny.onnx / f"{DECODER}.onnx"), feed)
    assert relative(logits[0], tiny.expected()) > 1e-2


def changed(tiny: Tiny, folder: Path, change: Callable[[onnx.NodeProto], None]) -> Array:
    """Logits of the graph whose windowed attention nodes were changed."""
    path = shutil.copy(tiny.onnx / f"{DECODER}.onnx", folder)
    graph = onnx.load(path)
    windowed = [
        n
        for n in graph.graph.node
        if n.op_type == "GroupQueryAttention"
        and any(a.name == "local_window_size" for a in n.attribute)
    ]
    assert len(windowed) == 6  # of seven layers
    for node in windowed:
        change(node)
    onnx.save(graph, path)
    logits, _ = run(session(Path(path)), whole(tiny, 0, LENGTH))
    return logits[0]


def widen(node: onnx.NodeProto) -> None:
    """What onnxruntime before 1.24 makes of the same attribute."""
    (window,) = (a for a in node.attribute if a.name == "local_window_size")
    assert window.i == WINDOW
    window.i += 1


def test_windows_are_those_of_every_onnxruntime(tiny: Tiny, tmp_path: Path) -> None:
    assert relative(changed(tiny, tmp_path, widen), tiny.expected()) < 1e-5


def test_the_attribute_alone_is_a_key_too_wide_before_1_24(tiny: Tiny, tmp_path: Path) -> None:
    def widened_alone(node: onnx.NodeProto) -> None:
        widen(node)
        del node.input[10:]

    def alone(node: onnx.NodeProto) -> None:
        del node.input[10:]

    assert relative(changed(tiny, tmp_path, widened_alone), tiny.expected()) > 1e-3
    assert relative(changed(tiny, tmp_path, alone), tiny.expected()) < 1e-5


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_features_of_other_squares(tmp_path: Path, rows: int) -> None:
    """All patches averaged to one row, to four, and none."""
    folder, model = exported(tmp_path, mm_tokens_per_image=rows)
    pixels = np.random.default_rng(rows).uniform(-1, 1, (2, 3, SIDE, SIDE)).astype(np.float32)
    with torch.inference_mode():
        expected = model.get_image_features(torch.from_numpy(pixels)).pooler_output.numpy()
    vision = session(folder / "vision_encoder.onnx")
    (found,) = vision.run(["image_features"], {"pixel_values": pixels[None]})
    assert found.shape[1] == rows
    assert relative(found, expected) < 1e-5


def test_embeddings_are_scaled_and_the_head_is_not(tiny: Tiny) -> None:
    ids = np.array([[0, SOFT_ID, 77, 123]])
    with torch.inference_mode():
        expected = tiny.model.get_input_embeddings()(torch.from_numpy(ids)).numpy()
    (found,) = session(tiny.onnx / "embed_tokens.onnx").run(None, {"input_ids": ids})
    assert relative(found, expected) < 1e-6
    table = tiny.model.get_output_embeddings().weight.detach().numpy()
    assert np.allclose(expected[0] / table[ids[0]], 8.0)


@pytest.mark.parametrize(
    "text",
    [
        {"num_key_value_heads": 4},
        {"head_dim": 32, "query_pre_attn_scalar": 168},
        {"layer_types": ["full_attention"] * 7},
        {"sliding_window": 3, "sliding_window_pattern": 2},
        {"rope_scaling": None, "rope_theta": 5e4, "rope_local_base_freq": 500.0},
    ],
)
def test_other_decoders(tmp_path: Path, tiny: Tiny, text: dict[str, Any]) -> None:
    folder, model = exported(tmp_path, text=text)
    other = Tiny(folder, model, tiny.embeds, tiny.image)
    logits, _ = run(session(folder / f"{DECODER}.onnx"), whole(other, 0, LENGTH))
    assert relative(logits[0], other.expected()) < 1e-5
