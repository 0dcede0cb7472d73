"""Peak memory of captioning one image, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
# CUDA context, kernels and workspaces. Assumed: 0.4 to 0.9 GB by device and libraries.
GPU_RUNTIME = 700_000_000


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
    rows = [
        MemoryItem(f"weights: {part}", size, "as loaded")
        for part, size in resident_weights(shape, scheme, cpu=cpu).items()
    ]
    if shape.decoder:
        item = cache_item(target)
        size = load.batch * item * shape.decoder.cache_values(load.context)
        how = f"{load.context} positions, batch {load.batch}, {8 * item} bits"
        rows.append(MemoryItem("key-value cache", size, how))
    rows.extend(_activations(shape, scheme, load, cpu=cpu))
    if shape.tower:
        rows.append(MemoryItem("pixels", _pixels(shape.tower), f"{shape.tower.tiles} tile(s)"))
    if cpu or (target.memory and target.memory.unified):
        words = max((w.rows for w in shape.weights if w.role == "embedding"), default=0)
        rows.append(MemoryItem("tokenizer", TOKEN_ENTRY * words, f"{words} entries"))
    overhead = CPU_RUNTIME if cpu else GPU_RUNTIME
    rows.append(MemoryItem("runtime", overhead, "measured" if cpu else "assumed"))
    return tuple(rows)


def resident_weights(shape: ModelShape, scheme: Scheme, *, cpu: bool) -> dict[Part, int]:
    """Bytes of the loaded weights by part."""
    sizes: dict[Part, int] = {}
    for item in stored(shape, scheme):
        part = item.weights.part
        sizes[part] = sizes.get(part, 0) + (_on_cpu(item) if cpu else item.bytes)
    return sizes


def _on_cpu(item: StoredWeights) -> int:
    """As loaded by onnxruntime's CPU provider: float weights and block scales become float32 at load.

    A packed table stays in the mapped file where it is looked up: only the rows needed are read. A
    float one that is also the head is loaded by both graphs.
    """
    table, shared = item.weights.role == "embedding", bool(item.weights.rows_in)
    if item.format is None:
        return FLOAT32 * item.weights.parameters * (2 if table and shared else 1)
    if table and not shared:
        return 0
    return item.bytes + (FLOAT32 - FLOAT16) * item.scales


def _activations(
    shape: ModelShape, scheme: Scheme, load: Load, *, cpu: bool
) -> Iterator[MemoryItem]:
    """Each graph keeps what it once took, so the parts add up."""
    item = FLOAT32 if cpu else FLOAT16
    encoders = (("vision part", shape.tower), ("text encoder", shape.text))
    for name, encoder in encoders:
        if encoder:
            size = item * _encoder_values(encoder, cpu=cpu)
            if cpu:
                size = int(ARENA * (size + _unpacked(shape, scheme)))
            how = f"{encoder.together * encoder.sequence} positions"
            yield MemoryItem(f"activations: {name}", size, how)
    if shape.decoder:
        size = load.batch * item * _prefill_values(shape.decoder, load.prompt, cpu=cpu)
        yield MemoryItem("activations: prefill", size, f"{load.prompt} positions")


def _unpacked(shape: ModelShape, scheme: Scheme) -> int:
    """The largest 8-bit matrix outside the decoder: it is unpacked whole while it is multiplied."""
    matrices = [
        s.weights.rows * s.weights.columns * FLOAT32
        for s in stored(shape, scheme)
        if s.format and s.weights.part != "decoder" and s.weights.role == "linear"
    ]
    return max(matrices, default=0)


def _encoder_values(e: EncoderShape, *, cpu: bool) -> int:
    """Live values in the worst place of a block: residual and normed rows beside the MLP's two, or
    queries, keys, values before and after their bias beside them. Scores are counted only where the
    kernel keeps them whole: not on a CPU, where it works in blocks.
    """
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
