"""Puts an exported model, its reports and its manifest into one folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from exporter.bundle.card import model_card
from exporter.bundle.manifest import (
    MANIFEST,
    SCHEMA,
    Lineage,
    Manifest,
    Usage,
    encode_manifest,
    list_entries,
    read_manifest,
)
from exporter.bundle.sbom import bill_of_materials
from exporter.bundle.sign import sign_bundle
from exporter.core.artifact import need_space
from exporter.core.digest import canonical_json, list_files
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json

QUANTIZATION, TRADEOFF, EXPORT = "quantization.json", "tradeoff.json", "export.json"


@dataclass(frozen=True)
class BundleParts:
    """What goes into a bundle. `reports` maps names inside reports/ to files."""

    name: str
    exported: Path
    scheme: str
    target: str
    usage: Usage
    lineage: Lineage
    tools: Mapping[str, str]
    checks: Mapping[str, Any]
    statement: str
    reports: Mapping[str, Path] = field(default_factory=dict)


def package(out: Path, parts: BundleParts, key: Path | None = None) -> Manifest:
    """Write the bundle into the existing empty folder `out` and sign it when `key` is given.

    Raises `InputRefused` when the exported folder is incomplete, `EnvironmentLacks` on a full disk.
    """
    model = parts.exported / "model"
    if not (model / "onnx").is_dir():
        raise InputRefused(
            f"{parts.exported}: no model/onnx folder; expected what `medexport export` writes"
        )
    need_space(out, sum((model / p).stat().st_size for p in list_files(model)))
    # Copies, never links: onnx refuses external data with more than one name.
    shutil.copytree(model, out / "model", copy_function=shutil.copyfile)
    (out / "reports").mkdir()
    for name, source in parts.reports.items():
        shutil.copyfile(source, out / "reports" / name)
    tradeoff = parts.exported / TRADEOFF
    if tradeoff.is_file():
        shutil.copyfile(tradeoff, out / "reports" / TRADEOFF)
    export = read_json(parts.exported / EXPORT)
    if export["dialect"] != "ort":
        # Optimization profiles, for whoever builds engines of these graphs.
        shutil.copyfile(parts.exported / EXPORT, out / "reports" / EXPORT)
    layers, floats, settings = _storage(parts.exported, export)
    manifest = Manifest(
        schema=SCHEMA,
        name=parts.name,
        scheme=parts.scheme,
        target=parts.target,
        dialect=str(export["dialect"]),
        usage=parts.usage,
        lineage=parts.lineage,
        layers=layers,
        floats=floats,
        tools=dict(parts.tools),
        checks=dict(parts.checks),
        statement=parts.statement,
        files=(),
        settings=settings,
        allocation=_allocation(parts.exported),
    )
    (out / "MODEL_CARD.md").write_text(model_card(manifest), encoding="utf-8")
    (out / "sbom.cdx.json").write_bytes(
        canonical_json(bill_of_materials(manifest, list_entries(out / "model")))
    )
    return _seal(out, manifest, key)


def _storage(
    exported: Path, export: Mapping[str, Any]
) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...], dict[str, Any]]:
    """Quantized matrices, float tensors and methods' settings: from quantization.json, or all float
    without one.
    """
    plan = exported / QUANTIZATION
    if plan.is_file():
        found = read_json(plan)
        return tuple(found["layers"]), tuple(found["floats"]), found.get("settings", {})
    reason = f"the scheme stores {export['float_storage']}"
    return (), tuple({"name": name, "reason": reason} for name in sorted(export["bits"])), {}


def _allocation(exported: Path) -> dict[str, Any] | None:
    """How a mixed scheme came to its bits, from quantization.json."""
    plan = exported / QUANTIZATION
    return read_json(plan).get("allocation") if plan.is_file() else None


def _seal(out: Path, manifest: Manifest, key: Path | None) -> Manifest:
    sealed = msgspec.structs.replace(manifest, files=list_entries(out))
    (out / MANIFEST).write_bytes(encode_manifest(sealed))
    if key:
        sign_bundle(out, key)
    return read_manifest(out)
