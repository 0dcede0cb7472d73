"""The command line starts fast and the deployed side needs no build-side package."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "peft", "huggingface_hub")
RUNS = 7
ALLOWED_S = 0.5


def start(*arguments: str) -> float:
    """Seconds of one Python start with these arguments; it must end with status 0."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
    )
    return time.perf_counter() - begin


def loaded_after(code: str) -> set[str]:
    """Top-level packages in sys.modules after running `code` in a fresh Python."""
    script = f"import sys\n{code}\nprint('\\n'.join({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_help_imports_nothing_heavy():
    code = (
        "from click.testing import CliRunner\n"
        "from exporter.cli.main import cli\n"
        "result = CliRunner().invoke(cli, ['--help'])\n"
        "assert result.exit_code == 0 and 'build' in result.output, result.output\n"
    )
    assert not loaded_after(code) & {*HEAVY, "numpy", "PIL"}


def test_help_costs_less_than_half_a_second_over_a_bare_start():
    start("-m", "exporter", "--help")  # writes the byte code
    bare, ours = [], []
    for _ in range(RUNS):
        bare.append(start("-c", "pass"))
        ours.append(start("-m", "exporter", "--help"))
    extra = statistics.median(ours) - statistics.median(bare)
    assert extra < ALLOWED_S, f"bare {sorted(bare)}, help {sorted(ours)}"


DEPLOYED = ("core", "catalog", "families", "runtimes", "bundle", "engines")
# A torch class of a family is named, not imported, by the family's own file.
BUILD_ONLY = ("exporter.families.reference.", "exporter.runtimes.torch_reference")


def modules(room: str) -> list[str]:
    """Every module of a room and of the rooms inside it, sorted."""
    files = sorted((ROOT / "exporter" / room).rglob("*.py"))
    inside = [p.relative_to(ROOT).with_suffix("").parts for p in files if p.stem != "__init__"]
    return [".".join(parts) for parts in inside]


@pytest.mark.parametrize("room", DEPLOYED)
def test_the_deployed_rooms_import_no_build_side_package(room):
    names = [name for name in modules(room) if not name.startswith(BUILD_ONLY)]
    found = loaded_after("\n".join(f"import {n}" for n in names))
    assert not found & {"torch", "transformers", "onnx", "peft", "huggingface_hub"}


def test_rooms_inside_rooms_are_looked_at_too():
    light = {name for room in DEPLOYED for name in modules(room)}
    assert {"exporter.runtimes.tasks.zero_shot", "exporter.families.captioners.llava"} <= light
    # What is left out is there, and is what needs torch.
    for left_out in BUILD_ONLY:
        assert any(name.startswith(left_out) for name in light), left_out
    (first, *_) = sorted(name for name in light if name.startswith("exporter.families.reference."))
    assert "torch" in loaded_after(f"import {first}")
