"""Peak memory of captioning one image, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import get_args

from exporter.catalog.schema import TargetProfile
from exporter.families.shapes.parts import DecoderShape, EncoderShape, ModelShape, Part
from exporter.pipeline.fit_sizes import FLOAT16, StoredWeights, stored
from exporter.pipeline.fit_speed import CPU, Load, cache_item
from exporter.quantizers.schemes import Scheme

FLOAT32 = 4
# Interpreter, onnxruntime, numpy, tokenizer and their code, measured with the demo model.
CPU_RUNTIME = 84_000_000
# An entry of a byte-pair vocabulary with its merge in the tokenizers library: 31 MB for 49,000.
TOKEN_ENTRY = 650
# What onnxruntime's arena takes of the activations that live at a time: it grows by doubling, and a
# tower's matrices of many sizes leave gaps. Measured with SmolVLM-256M's tower, in float and int8.
ARENA = 2.5
# Bytes that a value of a convolution's kernel takes on a CPU, whatever the scheme. Alone a graph takes
# 10: as stored, with its norm folded in, and in the order in which it is read; what that leaves behind
# graphs loaded later take in part. Measured with whole MedFILIPs and CRISs, in float and int8.
KERNEL = 8
# Up to so many bytes of weights a graph keeps them inside its file (`graphs.writer`), which is read
# whole: a mapped file is not.
INLINE_LIMIT = 64 << 20
# CUDA context, kernels and workspaces. Assumed: 0.4 to 0.9 GB by device and libraries.
GPU_RUNTIME = 700_000_000
# Keys and values in TensorRT's runtime: places by which they grow, and bytes at which tensors begin.
STEP, ALIGNMENT = 256, 256
SECOND_BLOCK = "second cache block (TensorRT)"


@dataclass(frozen=True)
class MemoryItem:
    """One row of the sum; `how` in words."""

    name: str
    bytes: int
    how: str


def predict_memory(
    shape: ModelShape, scheme: Scheme, target: TargetProfile, load: Load
) -> tuple[MemoryItem, ...]:
    """What is in memory at the worst moment, by name."""
    cpu = target.provider == CPU
    weights = resident_weights(shape, scheme, cpu=cpu)
    rows = [MemoryItem(f"weights: {part}", size, "as loaded") for part, size in weights.items()]
    if shape.decoder:
        item = cache_item(target)
        size = load.batch * item * shape.decoder.cache_values(load.context)
        how = f"{load.context} positions, batch {load.batch}, {8 * item} bits"
        rows.append(MemoryItem("key-value cache", size, how))
        if not cpu and shape.kind == "captioner":
            rows.append(_second_block(shape.decoder, load, item, size))
    rows.extend(_activations(shape, scheme, load, cpu=cpu))
    if shape.tower:
        rows.append(MemoryItem("pixels", _pixels(shape.tower), f"{shape.tower.tiles} tile(s)"))
    if cpu:
        running = sum(row.bytes for row in rows) - sum(weights.values())
        opening = max(_opening(graph) for graph in _graphs(shape, scheme))
        if opening > running:
            how = f"{opening / 1e6:.0f} MB for a moment, less what running takes after it"
            rows.append(MemoryItem("opening a graph", opening - running, how))
    if cpu or (target.memory and target.memory.unified):
        words = max((w.rows for w in shape.weights if w.role == "embedding"), default=0)
        rows.append(MemoryItem("tokenizer", TOKEN_ENTRY * words, f"{words} entries"))
    overhead = CPU_RUNTIME if cpu else GPU_RUNTIME
    rows.append(MemoryItem("runtime", overhead, "measured" if cpu else "assumed"))
    return tuple(rows)


def _second_block(d: DecoderShape, load: Load, item: int, first: int) -> MemoryItem:
    """What the TensorRT runtime holds beyond `first`: onnxruntime grows one cache in place, TensorRT's
    reads a past of whole steps and writes a present of one place more (runtimes.trt_decoder).
    """
    past = min(-(-max(load.context - 1, 1) // STEP) * STEP, max(d.max_positions - 1, 1))
    # Every tensor begins at an aligned address: heads are rounded up.
    width = d.head_dim * item
    heads = ALIGNMENT // gcd(ALIGNMENT, width)
    place = 2 * d.layers * -(-d.kv_heads // heads) * heads * width
    both = load.batch * (place * (2 * past + 1) + item * (d.cache_values(0)))
    how = f"past of {past}, present of {past + 1}; onnxruntime needs none"
    return MemoryItem(SECOND_BLOCK, both - first, how)


def resident_weights(shape: ModelShape, scheme: Scheme, *, cpu: bool) -> dict[Part, int]:
    """Bytes of the loaded weights by part."""
    parts: tuple[Part, ...] = get_args(Part)
    sizes = {p: 0 for p in parts if any(w.part == p for w in shape.weights)}
    for graph in _graphs(shape, scheme):
        inline = _inline(graph) > 0
        for item in graph:
            held = _on_cpu(item, inline=inline) if cpu else _on_gpu(item)
            sizes[item.weights.part] += held
    return sizes


def _graphs(shape: ModelShape, scheme: Scheme) -> tuple[tuple[StoredWeights, ...], ...]:
    """What each graph holds: a decoder's table is a graph of its own."""
    items = stored(shape, scheme)
    tables = tuple(s for s in items if _is_table(s))
    rest = tuple(s for s in items if not _is_table(s))
    parts = tuple(tuple(s for s in rest if s.weights.part == p) for p in get_args(Part))
    return tuple(graph for graph in (tables, *parts) if graph)


def _is_table(item: StoredWeights) -> bool:
    """Whether it is a decoder's table that is only looked up."""
    w = item.weights
    return w.part == "decoder" and w.role == "embedding" and not w.rows_in


def _inline(graph: Sequence[StoredWeights]) -> int:
    """Bytes of weights inside a graph's file."""
    size = sum(item.bytes for item in graph)
    return size if size <= INLINE_LIMIT else 0


def _opening(graph: Sequence[StoredWeights]) -> int:
    """What a CPU session takes only while it is opened: the file, where it holds the weights, and a
    second copy of a float matrix that is put into the order in which it is read.
    """
    matrices = (
        FLOAT32 * item.weights.rows * item.weights.columns
        for item in graph
        if item.format is None and item.weights.role in ("linear", "head")
    )
    return _inline(graph) + max(matrices, default=0)


def _on_cpu(item: StoredWeights, *, inline: bool) -> int:
    """As loaded by onnxruntime's CPU provider: float weights and block scales become float32 at load.

    A convolution's kernel is kept in each of its forms.
    A table stays in the mapped file where it is looked up and not `inline`: of a packed one only the
    rows needed are read, a float one counts whole. One that is also the head becomes float32 in the
    decoder's graph; the embedding's graph adds to that what stands inside its file.
    """
    table, shared = item.weights.role == "embedding", bool(item.weights.rows_in)
    if item.weights.convolution:
        return KERNEL * item.weights.parameters
    if item.format is None:
        if table and not shared:
            return FLOAT16 * item.weights.parameters
        return FLOAT32 * item.weights.parameters + (_inline((item,)) if table else 0)
    if table and not shared:
        return item.bytes if inline else 0
    return item.bytes + (FLOAT32 - FLOAT16) * item.scales


def _on_gpu(item: StoredWeights) -> int:
    """As stored; each session has its own, so that a table which is also the head is there twice."""
    w = item.weights
    shared = w.part == "decoder" and w.role == "embedding" and w.rows_in
    return item.bytes * (2 if shared else 1)


def _activations(
    shape: ModelShape, scheme: Scheme, load: Load, *, cpu: bool
) -> Iterator[MemoryItem]:
    """Each graph keeps what it once took, so the parts add up."""
    item = FLOAT32 if cpu else FLOAT16
    encoders: tuple[tuple[str, Part, EncoderShape | None], ...] = (
        ("vision part", "vision", shape.tower),
        ("text encoder", "text", shape.text),
    )
    for name, part, encoder in encoders:
        if encoder:
            size = item * _encoder_values(encoder, cpu=cpu)
            if cpu:
                size = int(ARENA * (size + _unpacked(shape, scheme, part)))
            how = f"{encoder.together * encoder.sequence} positions"
            # Without the factor: maps go where opening the graph has left room (measured).
            maps = item * encoder.together * encoder.maps
            if maps > size:
                size, how = maps, f"feature maps of {encoder.side} x {encoder.side} pixels"
            yield MemoryItem(f"activations: {name}", size, how)
    if shape.decoder:
        size = load.batch * item * _prefill_values(shape.decoder, load.prompt, cpu=cpu)
        yield MemoryItem("activations: prefill", size, f"{load.prompt} positions")


def _unpacked(shape: ModelShape, scheme: Scheme, part: Part) -> int:
    """The largest 8-bit matrix of an encoder: it is unpacked whole while it is multiplied."""
    matrices = [
        s.weights.rows * s.weights.columns * FLOAT32
        for s in stored(shape, scheme)
        if s.format and s.weights.part == part and s.weights.role == "linear"
    ]
    return max(matrices, default=0)


def _encoder_values(e: EncoderShape, *, cpu: bool) -> int:
    """Live values in the worst place of a block: residual and normed rows beside the MLP's two, or
    queries, keys, values before and after their bias beside them. Scores are counted only where the
    kernel keeps them whole: not on a CPU, where it works in blocks. A tower of convolutions alone has
    none of these.
    """
    if not e.attended:
        return 0
    rows = e.together * e.sequence
    mlp = rows * (2 * e.hidden + 2 * e.inner)
    attention = rows * 8 * e.hidden
    scores = 0 if cpu else e.heads * rows * max(e.attended)
    return max(mlp, attention + scores)


def _prefill_values(d: DecoderShape, prompt: int, *, cpu: bool) -> int:
    """As `_encoder_values`; grouped attention on a CPU keeps the scores of all heads, and the last
    position's logits are float32.
    """
    mlp = prompt * (3 * d.hidden + 3 * d.inner)
    scores = d.heads * prompt * prompt if cpu or d.quadratic else 0
    attention = prompt * (d.heads + 2 * d.kv_heads) * d.head_dim
    return max(mlp, attention + scores) + d.vocabulary


def _pixels(e: EncoderShape) -> int:
    """Pixels of all tiles as float32."""
    return 3 * (e.pixels or e.side**2) * e.tiles * FLOAT32
