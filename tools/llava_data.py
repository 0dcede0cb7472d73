"""Phantoms as the LLaVA demo's training reads them: pictures, class labels, captions."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from exporter.calibrate.phantoms.samples import Phantom, draw_phantoms
from exporter.calibrate.phantoms.scene import REGIONS, SIDES, SIZES_MM, Item, Scene
from tools.llava_files import IMAGE, MEAN, STD

IMAGES, CHUNK = 4, 100
ABSENT = -1
FINDINGS = sorted({k.name for r in REGIONS for k in r.findings})
DEVICES = sorted({k.name for r in REGIONS for k in r.devices})
PLACES = sorted({p for r in REGIONS for k in r.findings for p in k.places})
LABELS: dict[str, int] = {
    "region": len(REGIONS),
    "device": len(DEVICES) + 1,
    "device side": len(SIDES),
    **{
        f"{label} {group}": size
        for group in (0, 1)
        for label, size in (
            ("finding", len(FINDINGS) + 1),
            ("side", len(SIDES)),
            ("grade", 3),
            ("size", len(SIZES_MM)),
            ("place", len(PLACES)),
        )
    },
}
"""Labels and how many classes each has."""


@dataclass(frozen=True)
class Data:
    """Drawn phantoms: pictures uint8 ``[n, 112, 112]``, labels int64 ``[n, len(LABELS)]``, captions."""

    pictures: NDArray[np.uint8]
    labels: NDArray[np.int64]
    captions: list[str]

    def pixels(self, rows: Sequence[int]) -> torch.Tensor:
        """What CLIPImageProcessor makes of some pictures: float32 ``[rows, 3, 112, 112]``."""
        gray = torch.from_numpy(self.pictures[np.asarray(rows)]).float().div(255)[:, None]
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        return (gray - mean) / std


def draw_data(split: str, patients: int, work: Path, processes: int) -> Data:
    """Phantoms of `patients` patients of a split, drawn once and then read from `work`."""
    path = work / f"{split}-{patients}.npz"
    if not path.exists():
        jobs = [(split, i, min(CHUNK, patients - i)) for i in range(0, patients, CHUNK)]
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            rows = [row for part in pool.imap(draw_chunk, jobs) for row in part]
        np.savez(
            path,
            pictures=np.stack([r[0] for r in rows]),
            labels=np.array([r[1] for r in rows], np.int64),
            captions=np.array([r[2] for r in rows]),
        )
    stored = np.load(path)
    return Data(stored["pictures"], stored["labels"], stored["captions"].tolist())


def draw_chunk(job: tuple[str, int, int]) -> list[tuple[NDArray[np.uint8], list[int], str]]:
    """Picture, labels and caption of some patients' phantoms."""
    split, first, count = job
    phantoms = draw_phantoms(split, count, IMAGES, first)
    return [(picture(p), labels_of(p.scene), p.caption) for p in phantoms]


def picture(phantom: Phantom) -> NDArray[np.uint8]:
    """The picture as the image processor resizes it: both edges to 112, bicubic."""
    size = (IMAGE, IMAGE)
    return np.asarray(Image.fromarray(phantom.pixels).resize(size, Image.Resampling.BICUBIC))


def labels_of(scene: Scene) -> list[int]:
    """The class of each of LABELS; -1 where the label does not apply."""
    device = scene.device
    row = [
        next(i for i, r in enumerate(REGIONS) if r.anatomy == scene.region.anatomy),
        DEVICES.index(device.kind.name) + 1 if device else 0,
        _side(device),
    ]
    for group in (0, 1):
        item = next((f for f in scene.findings if f.kind.group == group), None)
        row += [
            FINDINGS.index(item.kind.name) + 1 if item else 0,
            _side(item),
            ABSENT if item is None or item.grade is None else item.grade,
            ABSENT if item is None or item.mm is None else SIZES_MM.index(item.mm),
            ABSENT if item is None or item.place is None else PLACES.index(item.place),
        ]
    return row


def _side(item: Item | None) -> int:
    return ABSENT if item is None or item.side is None else SIDES.index(item.side)
