"""How merged adapters differ from the recipe that a profile gives for its model."""

from __future__ import annotations

import math

from exporter.adapters.patterns import named
from exporter.adapters.proof import MergeProof
from exporter.catalog.schema import AdapterRecipe

ALL_LINEAR = "all-linear"


def differences(proof: MergeProof, recipe: AdapterRecipe) -> str:
    """One line on what `proof` has otherwise than `recipe`: scaling, targets; empty where nothing.

    A recipe of "all-linear" names no module, so that its targets are not compared. It is
    information: an adapter trained by another recipe is none the worse.
    """
    found = []
    scalings = sorted({target.scaling for target in proof.targets})
    expected = recipe.scaling
    if expected is not None and not all(math.isclose(s, expected, rel_tol=1e-6) for s in scalings):
        found.append(f"scaling {_listed([f'{s:g}' for s in scalings])} ({expected:g})")
    if proof.targets and ALL_LINEAR not in recipe.targets:
        modules = [target.tensor.removesuffix(".weight") for target in proof.targets]
        absent = [t for t in recipe.targets if not any(named(m, [t]) for m in modules)]
        other = {m.rpartition(".")[2] for m in modules if not named(m, recipe.targets)}
        if absent:
            found.append(f"not on {_listed(absent)}")
        if other:
            found.append(f"also on {_listed(sorted(other))}")
    return f"unlike the profile's recipe: {'; '.join(found)}" if found else ""


def _listed(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
