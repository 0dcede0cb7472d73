"""Shapes of models that are a trained plug-in over a frozen one."""

from __future__ import annotations

from dataclasses import replace

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import ModelShape, linear, norm, other
from exporter.families.shapes.text import clip


def medbridge(facts: ConfigFacts) -> ModelShape:
    """A CLIP that sees an image in several views, and blocks of queries that look at them."""
    frozen, b = clip(facts), "bridge_config."
    assert frozen.tower is not None
    tower = replace(frozen.tower, tiles=1 + facts.size(b + "grid") ** 2)
    hidden, rows = tower.hidden, tower.sequence
    inner = facts.size(b + "intermediate_size", default=tower.inner)
    queries, layers = facts.size(b + "num_queries"), facts.size(b + "num_hidden_layers")
    weights = (
        *other("vision", queries, hidden),
        # Queries and outputs of both attentions, keys and values of the second.
        *linear("vision", hidden, hidden, count=6 * layers, bias=True, rows_in=queries),
        *linear("vision", hidden, hidden, count=2 * layers, bias=True, rows_in=rows),
        *linear("vision", inner, hidden, count=layers, bias=True, rows_in=queries),
        *linear("vision", hidden, inner, count=layers, bias=True, rows_in=queries),
        *norm("vision", hidden, count=3 * layers + 2),
        *linear("vision", hidden, hidden, bias=True),
    )
    return replace(frozen, weights=(*frozen.weights, *weights), tower=tower)
