"""How well the demo model does on the held-out phantoms: ``python tools/evaluate_demo.py``.

Merges the adapter with the product's own merge, captions the evaluation set greedily in torch (float16
weights, computed in float32), and counts: a fact is right when the clinical fact reader finds it in
the caption as it was drawn. Writes the figures into profiles/demo/evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exporter.adapters.merge import merge_adapters  # noqa: E402
from exporter.calibrate.sets import ImageSet, open_set  # noqa: E402
from exporter.compare.quality.facts import extract_facts  # noqa: E402
from exporter.runtimes.images import open_image  # noqa: E402
from exporter.runtimes.torch_reference import TorchCaptioner  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=ROOT / "profiles" / "demo")
    parser.add_argument("--eval", default="phantoms-eval")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    images = open_set(options.eval)
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder)
        merge_adapters(options.demo / "model", [options.demo / "adapter"], merged)
        figures = {
            "set": images.name,
            "images": len(images.samples),
            "patients": len({s.patient for s in images.samples}),
            "base": score(options.demo / "model", images, options.threads),
            "base and adapter": score(merged, images, options.threads),
        }
    text = json.dumps(figures, indent=2)
    (options.demo / "evaluation.json").write_text(text + "\n")
    print(text)


def score(model: Path, images: ImageSet, threads: int) -> dict[str, Any]:
    """Shares of facts right and of captions exactly as written, over all and by modality."""
    captioner = TorchCaptioner(model, threads=threads)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for sample in images.samples:
        text = captioner.caption(open_image(sample.image_path), images.prompt, 64).text
        expected = {f.key for f in extract_facts(sample.caption).facts}
        found = {f.key for f in extract_facts(text).facts}
        row = (len(expected & found), len(expected), text == sample.caption, 1)
        for name in ("all", sample.modality):
            counts[name] = [a + b for a, b in zip(counts[name], row, strict=True)]
    return {
        name: {
            "facts_right": round(right / facts, 4),
            "facts": facts,
            "exact_captions": round(exact / captions, 4),
            "captions": captions,
        }
        for name, (right, facts, exact, captions) in counts.items()
    }


if __name__ == "__main__":
    main()
