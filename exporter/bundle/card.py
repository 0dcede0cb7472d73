"""MODEL_CARD.md: what is known about the bundle, and the blanks that a human must fill."""

from __future__ import annotations

from collections import Counter
from typing import Any

from exporter.bundle.manifest import Manifest, Source

BLANK = "_to be filled in and signed by the person who releases this bundle_"


def model_card(manifest: Manifest) -> str:
    """Markdown with Hugging Face front matter, from the manifest alone (no dates: reproducible)."""
    base = manifest.lineage.base
    hub = base.details.get("hub")
    head = ["---", "library_name: onnx", f"base_model: {hub or base.name}"]
    head += ["base_model_relation: quantized", f"license: {base.details.get('licence', 'unknown')}"]
    head += ["tags: [onnx, medexport, vision-language]", "---", ""]
    body = [
        f"# {manifest.name}",
        "",
        manifest.statement,
        "",
        "## Made from",
        "",
        "| part | name | SHA-256 of its content |",
        "|---|---|---|",
        *(_source("base", base)),
        *(line for adapter in manifest.lineage.adapters for line in _source("adapter", adapter)),
        *(_source("evaluation set", manifest.lineage.evaluation)),
        *(_source("calibration set", manifest.lineage.calibration)),
        "",
        "## Weights",
        "",
        f"Scheme `{manifest.scheme}`, dialect `{manifest.dialect}`, target `{manifest.target}`.",
        "",
        "| stored as | matrices |",
        "|---|---|",
        *(f"| {what} | {n} |" for what, n in sorted(_storage(manifest.layers).items())),
        f"| float | {len(manifest.floats)} (each with its reason in manifest.json) |",
        "",
        "## Checks made at build time",
        "",
        "| check | result |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in sorted(manifest.checks.items())),
        "",
        "Details: `reports/`. Files: `medexport verify` compares each with `manifest.json`.",
        "",
        "## For the release",
        "",
        *(
            f"- {what}: {BLANK}"
            for what in (
                "Intended use",
                "Out of scope",
                "Population and sites of the data",
                "Known failure modes",
                "Reviewed by, date, signature",
            )
        ),
        "",
    ]
    return "\n".join(head + body)


def _source(kind: str, source: Source | None) -> list[str]:
    return [f"| {kind} | {source.name} | `{source.sha256}` |"] if source else []


def _storage(layers: tuple[dict[str, Any], ...]) -> Counter[str]:
    def words(layer: dict[str, Any]) -> str:
        kind = "symmetric" if layer["symmetric"] else "asymmetric"
        return f"{layer['bits']} bits, blocks of {layer['block']}, {kind} ({layer['method']})"

    return Counter(words(layer) for layer in layers)
