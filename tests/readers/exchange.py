"""What the readers are asked and what they answer: two JSON files, one process per reader."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from exporter.core.modelfiles import read_config
from exporter.families.base import PromptInputs
from exporter.families.table import family_of
from exporter.runtimes.ort import OrtCaptioner

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """Images to caption with one prompt; what this package makes of them is the expected answer."""

    images: tuple[Image, ...]
    prompt: str
    max_new_tokens: int


@dataclass(frozen=True)
class Expected:
    """Prompt inputs and the greedy tokens (without stop token) of `OrtCaptioner`, one per image."""

    inputs: tuple[PromptInputs, ...]
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    stopped: tuple[bool, ...]


def expected(model_dir: Path, task: Task) -> Expected:
    """The answers of this package's own runtime."""
    captioner = OrtCaptioner(model_dir, threads=1)
    captions = [captioner.caption(i, task.prompt, task.max_new_tokens) for i in task.images]
    preparer = family_of(read_config(model_dir / "config.json")).open_preparer(model_dir)
    return Expected(
        tuple(preparer.prepare([i], task.prompt) for i in task.images),
        tuple(c.tokens for c in captions),
        tuple(c.text for c in captions),
        tuple(c.stopped for c in captions),
    )


def ask(
    command: Sequence[str | Path],
    model_dir: Path,
    task: Task,
    inputs: Sequence[PromptInputs],
    work: Path,
) -> list[dict[str, Any]]:
    """Run ``command REQUEST ANSWERS`` and return its answers, one object per image.

    The request names the model folder, the images as PNG, and the inputs this package prepares, so
    that a reader may take these or prepare its own.
    """
    work.mkdir(parents=True, exist_ok=True)
    cases = []
    for index, (image, prepared) in enumerate(zip(task.images, inputs, strict=True)):
        image.save(work / f"{index}.png")
        prepared.pixel_values.astype("<f4").tofile(work / f"{index}.f32")
        cases.append(
            {
                "image": str(work / f"{index}.png"),
                "input_ids": prepared.input_ids.tolist(),
                "pixels": str(work / f"{index}.f32"),
                "shape": [1, *prepared.pixel_values.shape],
            }
        )
    request = {
        "model": str(model_dir),
        "prompt": task.prompt,
        "max_new_tokens": task.max_new_tokens,
        "cases": cases,
    }
    (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
    line = [*map(str, command), str(work / "request.json"), str(work / "answers.json")]
    done = subprocess.run(line, cwd=work, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stderr[-3000:]}"
    answers: list[dict[str, Any]] = json.loads((work / "answers.json").read_text("utf-8"))
    assert len(answers) == len(task.images)
    return answers


def without_stop(tokens: Sequence[int], stops: Sequence[int]) -> tuple[int, ...]:
    """`tokens` without the stop token that some readers leave at the end."""
    return tuple(tokens[:-1] if tokens and tokens[-1] in stops else tokens)


def stop_ids(model_dir: Path) -> list[int]:
    """The stop tokens that generation_config.json lists."""
    declared = json.loads((model_dir / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    return declared if isinstance(declared, list) else [declared]


def mean_difference(prepared: PromptInputs, other: np.ndarray) -> float:
    """Mean absolute difference of normalised pixels (range -1 to 1)."""
    return float(np.abs(prepared.pixel_values - other.reshape(prepared.pixel_values.shape)).mean())
