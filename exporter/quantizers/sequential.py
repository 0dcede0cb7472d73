"""Quantize a decoder block by block while calibration walks through it, resumable at each block."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.activations import InputStatistics
from exporter.core.artifact import partial_path, publish, write_atomic
from exporter.core.blocks import QDATA, SCALES, ZEROS, PackedMatrix, dequantize
from exporter.core.digest import canonical_json, sha256_file
from exporter.core.errors import InputRefused
from exporter.core.progress import Progress, silent
from exporter.core.tensors import CODES, Checkpoint, SafetensorsWriter
from exporter.families.specs.decoder import TextDecoder
from exporter.families.specs.walked import block_tensors
from exporter.quantizers.block import BlockResult, quantize_block
from exporter.quantizers.gptq import GptqSettings
from exporter.quantizers.plan import LayerPlan
from exporter.quantizers.ready import ReadyTensor, packed_tensors
from exporter.quantizers.run import QuantizationReport, as_float16, write_model
from exporter.quantizers.schemes import Scheme

SCHEMA = 1


@dataclass(frozen=True)
class BlockStore:
    """The finished blocks in a folder: ``layer-00012.safetensors`` with a JSON file of the same name.

    `key` says what they were made from (checkpoint, calibration, scheme, settings): files with
    another key, and files that do not match their own digest, count as absent.
    """

    folder: Path
    key: str

    def save(self, layer: int, result: BlockResult) -> None:
        """Write a block; it exists once its JSON file, written last, is there."""
        tensors: dict[str, NDArray[Any]] = {}
        for name, packed in result.packed.items():
            tensors |= packed_tensors(name, packed)
        tensors |= {name: as_float16(name, values) for name, values in result.floats.items()}
        path, table = self._paths(layer)
        table.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = partial_path(path)
        with SafetensorsWriter(
            partial, {n: (CODES[t.dtype.name], t.shape) for n, t in tensors.items()}
        ) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        publish(partial, path)
        rows = {
            name: {"relative_error": result.errors[name], "notes": result.notes[name]}
            for name in result.packed
        }
        document = {"schema": SCHEMA, "key": self.key, "sha256": sha256_file(path), "rows": rows}
        write_atomic(table, canonical_json(document))

    def rows(self, layer: int) -> dict[str, Any] | None:
        """What the JSON file says of each packed matrix, or None when the block is not there."""
        path, table = self._paths(layer)
        if not (path.is_file() and table.is_file()):
            return None
        document = json.loads(table.read_bytes())
        mine = (document["schema"], document["key"]) == (SCHEMA, self.key)
        if not mine or document["sha256"] != sha256_file(path):
            return None
        found: dict[str, Any] = document["rows"]
        return found

    def open(self, layer: int) -> Checkpoint:
        """The tensors of a finished block."""
        path, _ = self._paths(layer)
        return Checkpoint.open(self.folder, path.stem)

    def _paths(self, layer: int) -> tuple[Path, Path]:
        stem = f"layer-{layer:05d}"
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"


class BlockQuantizer:
    """A `BlockVisitor`: quantizes each block, keeps it in `store`, and returns what it stands for.

    A block that `store` has is read instead of made again. Two runs over the same inputs, be they
    interrupted or not, leave the same bytes.
    """

    def __init__(
        self,
        store: BlockStore,
        spec: TextDecoder,
        plans: Sequence[LayerPlan],
        settings: GptqSettings | None = None,
    ) -> None:
        self._store = store
        self._spec = spec
        self._plans = plans
        self._settings = settings or GptqSettings()

    def finished(self, layer: int) -> bool:
        """Whether the block is in the store."""
        return self._store.rows(layer) is not None

    def __call__(
        self,
        layer: int,
        weights: Mapping[str, NDArray[np.float32]],
        inputs: Mapping[str, InputStatistics],
    ) -> Mapping[str, NDArray[np.float32]]:
        """Quantize block `layer`; see `BlockVisitor`. Raises `InputRefused` for weights that are not
        the plan's, and as the methods do.
        """
        plans = block_plans(self._plans, self._spec, layer)
        if not _are_planned(weights, plans):
            raise InputRefused(
                f"block {layer} holds {len(weights)} tensors that are not those of the plan "
                f"({len(plans)}); expected the checkpoint that was planned"
            )
        if not self.finished(layer):
            result = quantize_block(layer, self._spec, plans, weights, inputs, self._settings)
            self._store.save(layer, result)
        # Read back even when just made: what is returned is what is stored.
        stored, changed = self._store.open(layer), {}
        for plan in plans:
            if plan.name + QDATA in stored:
                changed[plan.name] = dequantize(stored_matrix(stored, plan))
            elif plan.name in stored:
                changed[plan.name] = stored.float32(plan.name)
        return changed


def block_plans(plans: Sequence[LayerPlan], spec: TextDecoder, layer: int) -> tuple[LayerPlan, ...]:
    """The plans of one decoder block's tensors."""
    names = {tensor.name for tensor in block_tensors(spec, layer)}
    return tuple(p for p in plans if p.name in names)


def _are_planned(weights: Mapping[str, NDArray[np.float32]], plans: Sequence[LayerPlan]) -> bool:
    """Whether these are the plan's tensors; the plan has a turned one that stays in float as stored."""
    shapes = {p.name: (p.shape, p.shape if p.format else p.shape[::-1]) for p in plans}
    return shapes.keys() == weights.keys() and all(w.shape in shapes[n] for n, w in weights.items())


def stored_matrix(stored: Checkpoint, plan: LayerPlan) -> PackedMatrix:
    """The packed matrix of `plan` from a block's file."""
    if plan.format is None:
        raise ValueError(f"{plan.name} is not quantized")
    zeros = None if plan.format.symmetric else stored.raw(plan.name + ZEROS)
    parts = stored.raw(plan.name + QDATA), stored.raw(plan.name + SCALES), zeros
    return PackedMatrix(plan.format, plan.columns, *parts)


class _StoredBlocks:
    """`ReadyTensors` over a complete store."""

    def __init__(self, store: BlockStore, spec: TextDecoder) -> None:
        self._at: dict[str, int] = {}
        self._rows: dict[str, Any] = {}
        self._store = store
        for layer in range(spec.layers):
            rows = store.rows(layer)
            if rows is None:
                raise InputRefused(
                    f"{store.folder}: block {layer} of {spec.layers} is missing or damaged; run the "
                    "calibration again, it continues there"
                )
            self._rows |= rows
            for name in store.open(layer).tensors:
                self._at[name] = layer

    def take(self, plan: LayerPlan) -> ReadyTensor | None:
        """The stored tensors of `plan`, or None for a tensor outside the blocks or unchanged."""
        names = plan.entries()
        layers = {self._at.get(name, -1) for name in names}
        if layers == {-1}:
            return None
        if len(layers) != 1 or -1 in layers:
            raise InputRefused(f"{self._store.folder}: '{plan.name}' is stored in another format")
        checkpoint = self._store.open(layers.pop())
        stored = {name: checkpoint.raw(name) for name in names}
        row = self._rows.get(plan.name, {"relative_error": 0.0, "notes": {}})
        return ReadyTensor(stored, row["relative_error"], row["notes"])


def assemble(
    source: Path,
    out: Path,
    scheme: Scheme,
    spec: TextDecoder,
    store: BlockStore,
    *,
    plan: Sequence[LayerPlan] | None = None,
    threads: int,
    progress: Progress = silent,
) -> QuantizationReport:
    """Write the quantized folder into the empty `out`: the blocks of `store`, all else from `source`.

    `plan` is the one that the blocks were made by, the scheme's own unless given. Raises
    `InputRefused` when a block is missing, and as `quantize_model` does.
    """
    ready = _StoredBlocks(store, spec)
    return write_model(source, out, scheme, ready, plan=plan, threads=threads, progress=progress)
