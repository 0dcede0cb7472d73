"""Tensors of a published checkpoint that nothing here computes: left out by name, with the reason.

Heads of pre-training and summaries that no output uses stand in some files of a model and not in
others, whatever config.json says. Merging leaves them out, so that what follows knows every tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from exporter.core.tensors import Checkpoint


def left_out(checkpoint: Checkpoint, stems: Mapping[str, str]) -> dict[str, str]:
    """The tensors of `checkpoint` below `stems` (stem to reason), each with its reason.

    Stems are whole path elements of newest names, ``*`` stands for any one; a stem that no tensor has
    is no error.
    """
    return {
        name: reason
        for name in checkpoint.tensors
        for stem, reason in stems.items()
        if _below(name, stem)
    }


def without(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """`checkpoint` (as stored, or renamed) without the tensors `names`."""
    kept = Checkpoint(())
    kept.metadata = checkpoint.metadata
    kept.tensors = {n: info for n, info in checkpoint.tensors.items() if n not in names}
    return kept


def _below(name: str, stem: str) -> bool:
    found, wanted = name.split("."), stem.split(".")
    heads = zip(found, wanted, strict=False)
    return len(found) >= len(wanted) and all(w in (f, "*") for f, w in heads)
