"""Merges LoRA adapters into a float checkpoint, one tensor in memory at a time."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.adapters.base import BaseModel, open_base
from exporter.adapters.proof import AdapterRecord, MergeProof, ReplacedRecord, TargetRecord
from exporter.adapters.read import Adapter
from exporter.adapters.recipe import Recipe, merge_tensor, open_recipe
from exporter.core.artifact import need_space
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import copy_small_files
from exporter.core.progress import Progress, silent
from exporter.core.tensors import FLOATS, ITEM_BYTES, SafetensorsWriter
from exporter.families.checkpoints import complete_published
from exporter.families.config import with_tied

PROOF = "merge.json"
# Room for the small files and the header beside the tensors.
SPARE_BYTES = 64 << 20
DTYPE_KEYS = ("dtype", "torch_dtype")


def merge_adapters(
    checkpoint: Path, adapters: Sequence[Path], out: Path, *, progress: Progress = silent
) -> MergeProof:
    """Write `checkpoint` with `adapters` merged in sequence, as float16, into the empty folder `out`.

    The tensors get their newest names. Writes the small files (those too that a published layout
    leaves out), model.safetensors and merge.json. Without adapters it is a float16 copy.
    A tied head that the adapters move apart from the embedding is stored on its own, and config.json
    says so. Peak memory is about twice the largest tensor in float32. Raises `InputRefused` (base or
    adapter not acceptable, adapter that changes nothing, values beyond float16) and
    `EnvironmentLacks` (disk space).
    """
    base = open_base(checkpoint)
    recipe = open_recipe(base, adapters)
    head = _head_state(recipe)
    names = sorted({*base.tensors.tensors, *((base.head,) if head in ("own", "untied") else ())})
    entries = {name: _entry(base, name) for name in names}
    size = sum(ITEM_BYTES[dtype] * int(np.prod(shape)) for dtype, shape in entries.values())
    need_space(out, size + SPARE_BYTES)
    copy_small_files(checkpoint, out)
    complete_published(checkpoint, out)
    (out / "config.json").write_bytes(canonical_json(_merged_config(base.config, head)))
    targets: list[TargetRecord] = []
    replaced: list[ReplacedRecord] = []
    with SafetensorsWriter(out / "model.safetensors", entries, {"format": "pt"}) as writer:
        for done, name in enumerate(names):
            progress(done, len(names), name)
            merged = merge_tensor(recipe, name)
            writer.write(name, merged.values)
            targets += merged.targets
            replaced += merged.replaced
    progress(len(names), len(names))
    proof = _prove(recipe, head, entries, targets, replaced)
    (out / PROOF).write_bytes(canonical_json(proof.to_json()))
    return proof


def _entry(base: BaseModel, name: str) -> tuple[str, tuple[int, ...]]:
    info = base.tensors.info(base.source(name))
    return ("F16" if info.dtype in FLOATS else info.dtype), info.shape


def _head_state(recipe: Recipe) -> str:
    """'own', 'none', 'tied', or 'untied' when the adapters change head and embedding differently."""
    base = recipe.base
    if not base.head:
        return "none"
    if not base.tied:
        return "own"
    if base.embedding not in recipe.steps and base.head not in recipe.steps:
        return "tied"
    # Only trained tied (peft's ensure_weight_tying) do both come out the same.
    embedding = merge_tensor(recipe, base.embedding).values
    same = np.array_equal(embedding, merge_tensor(recipe, base.head).values)
    return "tied" if same else "untied"


def _merged_config(config: dict[str, Any], head: str) -> dict[str, Any]:
    """config.json of the merged model: float16, and whether the head is tied as it is now."""
    merged = copy.deepcopy(config)
    if head != "none":
        merged = with_tied(merged, head == "tied")
    if not any(key in merged for key in DTYPE_KEYS):
        merged["dtype"] = "float16"
    for part in (merged, *(v for v in merged.values() if isinstance(v, dict))):
        for key in DTYPE_KEYS:
            if key in part:
                part[key] = "float16"
    text = merged.get("text_config")
    if head != "none" and isinstance(text, dict) and "tie_word_embeddings" in text:
        text["tie_word_embeddings"] = head == "tied"
    return merged


def _prove(
    recipe: Recipe,
    head: str,
    entries: dict[str, tuple[str, tuple[int, ...]]],
    targets: list[TargetRecord],
    replaced: list[ReplacedRecord],
) -> MergeProof:
    base = recipe.base
    changing = {r.adapter for r in targets if r.changed_values}
    changing |= {r.adapter for r in replaced if r.changed_values}
    for index, (adapter, _) in enumerate(recipe.adapters):
        if index not in changing:
            raise InputRefused(f"{adapter.folder}: adapter changes nothing; expected a trained one")
    records = tuple(_record(a, len(p.updates)) for a, p in recipe.adapters)
    return MergeProof(
        statement=_statement(len(records), targets, len(replaced)),
        base_sha256=base.digest(),
        adapters=records,
        targets=tuple(targets),
        replaced=tuple(replaced),
        head=head,
        tensors=len(entries),
        parameters=sum(int(np.prod(shape)) for _, shape in entries.values()),
        stored_as=dict(sorted(Counter(i.dtype for i in base.tensors.tensors.values()).items())),
        left_out=dict(sorted(base.left_out.items())),
    )


def _record(adapter: Adapter, targets: int) -> AdapterRecord:
    config = adapter.config
    method = "DoRA" if config.use_dora else "LoRA"
    return AdapterRecord(
        adapter.name,
        f"rs{method}" if config.use_rslora else method,
        targets,
        adapter.config_sha256,
        adapter.weights_sha256,
    )


def _statement(adapters: int, targets: Sequence[TargetRecord], replaced: int) -> str:
    if not adapters:
        return "no adapter: a float16 copy of the base"
    changed = sum(bool(target.changed_values) for target in targets)
    idle = len(targets) - changed
    left = f", {idle} that no graph reads are as they were" if idle else ""
    return (
        f"{adapters} adapter(s) merged in sequence: {changed} weights changed, each by a non-zero amount "
        f"that float16 keeps{left}, {replaced} tensors replaced; no unexpected key, none missing"
    )
