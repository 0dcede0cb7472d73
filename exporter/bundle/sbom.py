"""sbom.cdx.json: a CycloneDX bill of materials of the model and of what made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exporter.bundle.manifest import FileEntry, Lineage, Manifest, Source

SPEC = "1.6"


def bill_of_materials(manifest: Manifest, files: Sequence[FileEntry]) -> dict[str, Any]:
    """CycloneDX JSON: the model with its files, its sources as pedigree, its tools.

    It has no time stamp and no serial number, so that equal inputs give equal bytes.
    """
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest.name,
        "description": manifest.statement,
        "pedigree": {"ancestors": [_ancestor(kind, s) for kind, s in _sources(manifest.lineage)]},
        "properties": [
            {"name": "medexport:scheme", "value": manifest.scheme},
            {"name": "medexport:target", "value": manifest.target},
            {"name": "medexport:dialect", "value": manifest.dialect},
        ],
        "components": [_file(entry) for entry in files],
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "version": 1,
        "metadata": {
            "tools": {"components": [_library(n, v) for n, v in sorted(manifest.tools.items())]},
            "component": model,
        },
        "components": [],
    }


def _sources(lineage: Lineage) -> list[tuple[str, Source]]:
    pairs = [("base", lineage.base), *(("adapter", a) for a in lineage.adapters)]
    pairs += [("evaluation", lineage.evaluation)] if lineage.evaluation else []
    pairs += [("calibration", lineage.calibration)] if lineage.calibration else []
    return pairs


def _ancestor(kind: str, source: Source) -> dict[str, Any]:
    data = kind in ("evaluation", "calibration")
    return {
        "type": "data" if data else "machine-learning-model",
        "name": source.name,
        "hashes": [{"alg": "SHA-256", "content": source.sha256}],
        "properties": [{"name": "medexport:role", "value": kind}],
    }


def _file(entry: FileEntry) -> dict[str, Any]:
    hashes = [{"alg": "SHA-256", "content": entry.sha256}]
    return {"type": "file", "name": f"model/{entry.path}", "hashes": hashes}


def _library(name: str, version: str) -> dict[str, Any]:
    if name == "python":
        return {"type": "platform", "name": name, "version": version}
    return {
        "type": "library",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version}",
    }
