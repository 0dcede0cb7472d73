"""Tensors of a base that no graph reads: training leaves an adapter of theirs as it was."""

from __future__ import annotations

from exporter.adapters.base import BaseModel
from exporter.core.errors import InputRefused
from exporter.families.table import FAMILIES


def unread_tensors(base: BaseModel) -> frozenset[str]:
    """Newest names of the captioner's tensors that its features and logits do not depend on.

    LLaVA's features are taken before the tower's last block, and Moondream's region head makes no
    text: a LoRA pair there has no gradient, and its B stays zero. Empty for other models, and for a
    network that no graph can be written of, of which this is not known.
    """
    kind = base.config.get("model_type")
    for family in FAMILIES.values():
        if kind in family.MODEL_TYPES:
            try:
                specs = family.decoder_spec(base.config), family.tower_spec(base.config)
            except InputRefused:
                return frozenset()
            return frozenset(t.name for spec in specs for t in spec.tensors() if not t.used)
    return frozenset()
