"""What is said of an adapter that was trained by another recipe than the profile's."""

from __future__ import annotations

import pytest

from exporter.adapters.expected import differences
from exporter.adapters.proof import MergeProof, TargetRecord
from exporter.catalog.schema import AdapterRecipe

LAYER = "model.language_model.layers.0."
QUERY, UP = f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.up_proj"
PROJECTOR = "model.multi_modal_projector.linear_1"


def merged(scaling: float, *modules: str) -> MergeProof:
    targets = tuple(
        TargetRecord(0, f"{module}.weight", "linear", 4, scaling, 0.1, 8, 8) for module in modules
    )
    return MergeProof("", "", (), targets, (), "own", 9, 72, {})


@pytest.mark.parametrize(
    ("proof", "recipe", "said"),
    [
        (merged(2.0, QUERY), AdapterRecipe(("q_proj",), 2.0), ""),
        (merged(2.0, QUERY, UP), AdapterRecipe(("all-linear",), 2.0), ""),
        (merged(2.0, QUERY), AdapterRecipe(("q_proj",)), ""),
        (merged(1.0), AdapterRecipe(("q_proj",), 2.0), ""),
        (merged(1.0, QUERY), AdapterRecipe(("all-linear",), 2.0), "scaling 1 (2)"),
        (
            merged(0.5, QUERY, UP),
            AdapterRecipe(("q_proj", "multi_modal_projector.linear_1"), 0.25),
            "scaling 0.5 (0.25); not on multi_modal_projector.linear_1; also on up_proj",
        ),
        (
            merged(1.0, PROJECTOR),
            AdapterRecipe(("a", "b", "c", "d", "e", "linear_1"), 1.0),
            "not on a, b, c, d and 1 more",
        ),
    ],
)
def test_differences(proof: MergeProof, recipe: AdapterRecipe, said: str) -> None:
    assert differences(proof, recipe) == (f"unlike the profile's recipe: {said}" if said else "")
