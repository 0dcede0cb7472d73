"""What the methods of a scheme are set to: part of cache keys, and of the record of a build."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from exporter.quantizers.awq import EXPONENTS, SEARCH_ROWS
from exporter.quantizers.gptq import GptqSettings
from exporter.quantizers.grid import SHRINKS, STEPS
from exporter.quantizers.hqq import HqqSettings
from exporter.quantizers.schemes import Scheme
from exporter.quantizers.smooth import SmoothSettings


def method_settings(scheme: Scheme) -> dict[str, Any]:
    """The settings of every method that `scheme` uses, by method; empty where there are none."""
    clipped = {"shrinks": list(SHRINKS), "steps": list(STEPS)}
    known: dict[str, Any] = {
        "rtn-mse": clipped,
        "hqq": asdict(HqqSettings()),
        "gptq": asdict(GptqSettings()),
        "awq": {"exponents": list(EXPONENTS), "search_rows": SEARCH_ROWS, "clip": clipped},
        "smoothquant": asdict(SmoothSettings()),
    }
    used = set(scheme.method.split("+"))
    if used & {"gptq", "awq"}:
        used.add("rtn-mse")  # what calibration does not see
    settings = {name: values for name, values in known.items() if name in used}
    return {**settings, "scales": {"positive": True}} if scheme.positive else settings
