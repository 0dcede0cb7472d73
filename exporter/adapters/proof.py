"""What merge.json records: that each target changed, by how much, from which files."""

from __future__ import annotations

from typing import Any

import msgspec


class AdapterRecord(msgspec.Struct, frozen=True):
    """One adapter of a merge, with the SHA-256 of its two files."""

    name: str
    method: str
    targets: int
    config_sha256: str
    weights_sha256: str


class TargetRecord(msgspec.Struct, frozen=True):
    """One low-rank change: `relative_delta` is ||dW|| / ||W|| (Frobenius, against the weight just before
    this adapter, the one at that place); `changed_values` of `values` differ after rounding to float16.
    """

    adapter: int
    tensor: str
    kind: str
    rank: int
    scaling: float
    relative_delta: float
    changed_values: int
    values: int


class ReplacedRecord(msgspec.Struct, frozen=True):
    """One tensor taken whole from an adapter (modules_to_save or a bias); null delta: the base's is zero."""

    adapter: int
    tensor: str
    relative_delta: float | None
    changed_values: int
    values: int


class MergeProof(msgspec.Struct, frozen=True):
    """The record of a merge. `head`: 'tied' (stored once), 'untied' (by this merge), 'own' or
    'none'. `left_out`: tensors of the base that are not in the merged file, and why.
    """

    statement: str
    base_sha256: str
    adapters: tuple[AdapterRecord, ...]
    targets: tuple[TargetRecord, ...]
    replaced: tuple[ReplacedRecord, ...]
    head: str
    tensors: int
    parameters: int
    stored_as: dict[str, int]
    left_out: dict[str, str] = {}
    schema: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain values for canonical JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found
