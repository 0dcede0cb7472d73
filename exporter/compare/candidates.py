"""What is compared, and what it weighs on disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exporter.core.digest import list_files
from exporter.core.errors import WrongUsage
from exporter.runtimes.providers import Device

NOISE_FLOOR = "noise floor"
RuntimeName = Literal["ort", "torch", "predictions"]


@dataclass(frozen=True)
class Candidate:
    """One model folder under a name; "ort" reads its graphs, "torch" its weights.

    For "predictions" `model_dir` is a file of captions that some other system wrote. `dtype` is the
    float type that "torch" computes in.
    """

    name: str
    model_dir: Path
    runtime: RuntimeName = "ort"
    device: Device = "cpu"
    dtype: str = "float32"


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Raise `WrongUsage` unless there is a reference and all names differ and are usable."""
    names = [c.name for c in candidates]
    if not names or candidates[0].runtime == "predictions":
        raise WrongUsage("nothing to compare with: expected a model as the reference")
    double = {n for n in names if names.count(n) > 1 or n == NOISE_FLOOR}
    if double:
        raise WrongUsage(f"candidate name '{sorted(double)[0]}' is used twice or reserved")
    for candidate in candidates:
        if not re.fullmatch(r"[\w.+-]+", candidate.name):
            raise WrongUsage(
                f"candidate name {candidate.name!r}; expected letters, digits and . _ + -"
            )
        if candidate.runtime == "predictions":
            continue
        if not candidate.model_dir.is_dir():
            raise WrongUsage(
                f"{candidate.model_dir}: no such folder; expected the exported model of "
                f"'{candidate.name}'"
            )


def part_bytes(candidate: Candidate) -> dict[str, int]:
    """Bytes on disk by part: one entry per graph with its external data, or "weights", and "files"."""
    if candidate.runtime == "predictions":
        return {}
    parts: dict[str, int] = {}
    for path in list_files(candidate.model_dir):
        if candidate.runtime == "ort" and path.parent.name == "onnx":
            part = path.name.split(".")[0]
        else:
            part = "weights" if path.suffix == ".safetensors" else "files"
        size = (candidate.model_dir / path).stat().st_size
        parts[part] = parts.get(part, 0) + size
    return dict(sorted(parts.items()))
