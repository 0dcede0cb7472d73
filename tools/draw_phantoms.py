"""Draw the shipped image sets: ``python tools/draw_phantoms.py``, or ``--check`` that they are so."""

from __future__ import annotations

import argparse
import filecmp
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exporter.calibrate.phantoms import samples  # noqa: E402
from exporter.core.digest import sha256_bytes  # noqa: E402
from tools.demo_files import PROMPT  # noqa: E402

STATEMENT = "Computer drawings, not medical images: no picture shows a patient or an organ."


@dataclass(frozen=True)
class SetPlan:
    """A set to draw: `images` per patient."""

    name: str
    split: str
    patients: int
    images: int


SETS = (
    SetPlan("phantoms-calib", "calib", 64, 4),
    SetPlan("phantoms-eval", "eval", 80, 3),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "calibration")
    parser.add_argument("--check", action="store_true", help="compare with what is there")
    options = parser.parse_args()
    if not options.check:
        for plan in SETS:
            print(write_set(plan, options.out / plan.name))
        return
    with tempfile.TemporaryDirectory() as folder:
        different = [n for plan in SETS for n in differences(plan, options.out, Path(folder))]
    if different:
        sys.exit(f"{len(different)} files differ from what is drawn now, first {different[0]}")
    print("all files are what is drawn now")


def write_set(plan: SetPlan, folder: Path) -> str:
    """Draw one set into `folder`; returns a line on it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for phantom in samples.draw_phantoms(plan.split, plan.patients, plan.images):
        data = png(phantom)
        (folder / "images" / f"{phantom.id}.png").write_bytes(data)
        lines.append(sample(phantom, data))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    (folder / "samples.jsonl").write_bytes(text)
    head = {
        "schema": 1,
        "name": plan.name,
        "version": samples.VERSION,
        "statement": STATEMENT,
        "licence": "Apache-2.0",
        "split": plan.split,
        "prompt": PROMPT,
        "samples": len(lines),
        "patients": plan.patients,
        "samples_sha256": sha256_bytes(text),
    }
    (folder / "set.json").write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
    return f"{folder}: {len(lines)} images of {plan.patients} patients"


def sample(phantom: samples.Phantom, data: bytes) -> dict[str, Any]:
    """The line of samples.jsonl for a phantom whose file holds `data`."""
    return {
        "id": phantom.id,
        "image": f"{phantom.id}.png",
        "sha256": sha256_bytes(data),
        "patient": phantom.patient,
        "modality": phantom.scene.region.modality,
        "caption": phantom.caption,
        "facts": phantom.facts,
    }


def png(phantom: samples.Phantom) -> bytes:
    """The picture as an 8-bit gray PNG."""
    buffer = io.BytesIO()
    Image.fromarray(phantom.pixels).save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


def differences(plan: SetPlan, shipped: Path, scratch: Path) -> list[str]:
    """Files of a set that are not byte for byte what is drawn now."""
    drawn = scratch / plan.name
    write_set(plan, drawn)
    names = {p.relative_to(drawn).as_posix() for p in drawn.rglob("*") if p.is_file()}
    there = shipped / plan.name
    names |= {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()}
    found = []
    for name in sorted(names):
        same = (drawn / name).is_file() and (there / name).is_file()
        if not same or not filecmp.cmp(drawn / name, there / name, shallow=False):
            found.append(f"{plan.name}/{name}")
    return found


if __name__ == "__main__":
    main()
