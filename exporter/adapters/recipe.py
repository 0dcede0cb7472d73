"""Puts the plans of several adapters together: for each tensor, the steps in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.adapters.arithmetic import (
    apply_update,
    checked,
    count_changed,
    load_update,
    row_chunks,
    to_float16,
)
from exporter.adapters.base import BaseModel
from exporter.adapters.proof import ReplacedRecord, TargetRecord
from exporter.adapters.read import Adapter, read_adapter
from exporter.adapters.targets import AdapterPlan, BaseCopy, LoraUpdate, Replacement, plan_adapter
from exporter.adapters.unread import unread_tensors
from exporter.core.errors import InputRefused
from exporter.core.tensors import FLOATS, to_float32

# What training in bfloat16 may have rounded off the adapter's copy of a base weight.
COPY_TOLERANCE = 2.0**-7


@dataclass(frozen=True)
class BiasUpdate:
    """A low-rank pair's own bias (lora_bias): ``b += scaling * source``."""

    source: str
    scaling: float


@dataclass(frozen=True)
class Step:
    """One change of one tensor by the adapter at `index`."""

    index: int
    adapter: Adapter
    action: LoraUpdate | Replacement | BiasUpdate


@dataclass(frozen=True)
class Recipe:
    """Base, adapters with their plans, and for each touched tensor its steps in the adapters' order.

    Adapters apply in sequence: each to the model that those before it gave (for LoRA the sum of the
    deltas; for DoRA and replaced tensors the order counts).
    """

    base: BaseModel
    adapters: tuple[tuple[Adapter, AdapterPlan], ...]
    steps: dict[str, tuple[Step, ...]]


@dataclass(frozen=True)
class MergedTensor:
    """A merged tensor, rounded to float16 (or as stored when it is not floating point)."""

    values: NDArray[np.float16]
    targets: tuple[TargetRecord, ...]
    replaced: tuple[ReplacedRecord, ...]


def open_recipe(base: BaseModel, folders: Sequence[Path]) -> Recipe:
    """Read the adapters and resolve them against `base`. Raises `InputRefused`."""
    adapters = []
    steps: dict[str, list[Step]] = {}
    for index, folder in enumerate(folders):
        adapter = read_adapter(folder)
        plan = plan_adapter(adapter, base)
        for copy in plan.copies:
            # An earlier adapter's change would make this copy differ although the base is the same.
            if copy.tensor not in steps:
                _check_copy(adapter, base, copy)
        for replacement in plan.replacements:
            _add(steps, replacement.tensor, Step(index, adapter, replacement))
        for update in plan.updates:
            _add(steps, update.tensor, Step(index, adapter, update))
            if update.bias and update.b_bias:
                bias = BiasUpdate(update.b_bias, update.scaling)
                _add(steps, update.bias, Step(index, adapter, bias))
        adapters.append((adapter, plan))
    return Recipe(base, tuple(adapters), {name: tuple(found) for name, found in steps.items()})


def _add(steps: dict[str, list[Step]], tensor: str, step: Step) -> None:
    steps.setdefault(tensor, []).append(step)


def merge_tensor(recipe: Recipe, name: str) -> MergedTensor:
    """One tensor of the merged model. Raises `InputRefused` when an adapter leaves its target as it
    was after rounding to float16 (but where no graph reads it), or when the values do not fit float16.
    """
    base = recipe.base
    info = base.tensors.info(base.source(name))
    raw = base.tensors.raw(info.name)
    steps = recipe.steps.get(name, ())
    if not steps:
        return MergedTensor(_copied(name, raw, info.dtype), (), ())
    weight = to_float32(raw, info.dtype)
    values = _copied(name, raw, info.dtype)
    del raw
    targets: list[TargetRecord] = []
    replaced: list[ReplacedRecord] = []
    for step in steps:
        before = values
        if isinstance(step.action, LoraUpdate):
            relative = apply_update(weight, load_update(step.action, step.adapter.tensors))
            values = to_float16(name, weight)
            targets.append(_target(base, step, step.action, relative, before, values))
        else:
            new = _other(step.adapter, step.action, weight)
            values = to_float16(name, new)
            changed = count_changed(before, values)
            delta = _relative(weight, new)
            replaced.append(ReplacedRecord(step.index, name, delta, changed, new.size))
            weight = new
    return MergedTensor(values, tuple(targets), tuple(replaced))


def _copied(name: str, raw: NDArray[Any], dtype: str) -> NDArray[np.float16]:
    if dtype not in FLOATS:
        return raw
    if dtype == "F16":
        return checked(name, raw)
    if raw.ndim == 0:
        return to_float16(name, to_float32(raw, dtype))
    out = np.empty(raw.shape, np.float16)
    for rows in row_chunks(raw.shape):
        out[rows] = to_float16(name, to_float32(raw[rows], dtype))
    return out


def _target(
    base: BaseModel,
    step: Step,
    update: LoraUpdate,
    relative: float,
    before: NDArray[np.float16],
    after: NDArray[np.float16],
) -> TargetRecord:
    changed = count_changed(before, after)
    if changed == 0 and not (relative == 0 and update.tensor in unread_tensors(base)):
        raise InputRefused(
            f"{step.adapter.folder}: adapter changes nothing in '{update.tensor}' (relative delta "
            f"{relative:.3g}, 0 of {after.size} float16 values differ); expected a trained adapter: "
            "was it saved before training, or without its weights?"
        )
    return TargetRecord(
        step.index,
        update.tensor,
        update.kind,
        update.rank,
        update.scaling,
        relative,
        changed,
        after.size,
    )


def _other(
    adapter: Adapter, action: Replacement | BiasUpdate, weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    if isinstance(action, Replacement):
        return adapter.tensors.float32(action.source)
    bias = adapter.tensors.float32(action.source)
    return weight + np.float32(action.scaling) * bias


def _relative(before: NDArray[np.float32], after: NDArray[np.float32]) -> float | None:
    norm = float(np.linalg.norm(before))
    return float(np.linalg.norm(after - before)) / norm if norm else None


def _check_copy(adapter: Adapter, base: BaseModel, copy: BaseCopy) -> None:
    """Peft stores the frozen weight of an adapted embedding: the only trace of the base it was trained on."""
    source = base.tensors.info(base.source(copy.tensor))
    ours, theirs = base.tensors.raw(source.name), adapter.tensors.raw(copy.source)
    stored = adapter.tensors.info(copy.source).dtype
    for rows in row_chunks(ours.shape):
        a, b = to_float32(ours[rows], source.dtype), to_float32(theirs[rows], stored)
        if not np.allclose(a, b, rtol=COPY_TOLERANCE, atol=1e-6, equal_nan=False):
            raise InputRefused(
                f"{adapter.folder}: its copy of the base's '{copy.tensor}' differs from the checkpoint's "
                f"({base.folder.name}); expected the base that the adapter was trained on"
            )
