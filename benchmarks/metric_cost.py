"""CPU seconds of each caption metric per 1,000 captions, one thread, with tiny models.

    python -m benchmarks.metric_cost

Captions are those of the phantoms, each held against another one's. What a random 3-layer model of
width 32 costs is tokenizing and everything around the model; real weights add their own forward passes.
The figures go into `exporter/compare/captions/table.py`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from exporter.calibrate.sets import open_set
from exporter.compare.captions.base import NotComputed, Pair
from exporter.compare.captions.run import MetricPaths, open_metrics
from exporter.compare.captions.table import CAPTION_METRICS
from tests.unit.compare import tiny_metrics

CAPTIONS = 1000


def pairs() -> list[Pair]:
    cases = open_set("phantoms-eval").cases()
    made = []
    for i in range(CAPTIONS):
        case, other = cases[i % len(cases)], cases[(7 * i + 1) % len(cases)]
        made.append(Pair(str(i), case.caption or "", other.caption or "", case.image))
    return made


def write_all(folder: Path, captions: list[Pair]) -> None:
    tiny_metrics.write_bert(folder / "bertscore")
    tiny_metrics.write_bleurt(folder / "bleurt")
    tiny_metrics.write_alignscore(folder / "alignscore")
    tiny_metrics.write_chexbert(folder / "chexbert")
    tiny_metrics.write_clip(folder / "similarity")
    texts = sorted({t for p in captions for t in (p.truth, p.said)})
    words = sorted({w for t in texts for w in t.lower().replace(".", "").split()})
    rows = [f"C{i:07d}\tT047\t{w}" for i, w in enumerate(words)]
    (folder / "concepts.tsv").write_text("\n".join(["cui\ttypes\tterm", *rows]) + "\n")
    entities = tiny_metrics.RADGRAPH["0"]["entities"]
    annotated = {str(i): {"text": t, "entities": entities} for i, t in enumerate(texts)}
    (folder / "radgraph.json").write_text(json.dumps(annotated))


def main() -> None:
    import torch

    torch.set_num_threads(1)
    captions = pairs()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_all(folder, captions)
        paths = MetricPaths({}, {"MEDEXPORT_METRICS": str(folder)})
        opened = open_metrics([row.name for row in CAPTION_METRICS], paths)
        assert not opened.not_computed, opened.not_computed
        for name, metric in opened.ready.items():
            metric.score(captions[:8])
            seconds = []
            for _ in range(3):
                start = time.process_time()
                assert not isinstance(metric.score(captions), NotComputed)
                seconds.append(time.process_time() - start)
            sys.stdout.write(f"{name:12} {float(np.median(seconds)):.2g} s\n")


if __name__ == "__main__":
    main()
