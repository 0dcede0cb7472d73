"""How well the LLaVA demo does on the held-out phantoms: ``python tools/evaluate_llava.py``.

Captions the evaluation set greedily with transformers alone (its processor, its model, its generate;
float16 weights computed in float32) and counts as tools/evaluate_demo.py does. Writes the figures
into evaluation.json beside the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exporter.calibrate.sets import open_set  # noqa: E402
from exporter.compare.quality.facts import extract_facts  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "profiles" / "demo" / "llava")
    parser.add_argument("--eval", default="phantoms-eval")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = open_set(options.eval)
    captioner = Captioner(options.model)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for sample in images.samples:
        text = captioner.caption(Image.open(sample.image_path), images.prompt)
        expected = {f.key for f in extract_facts(sample.caption).facts}
        found = {f.key for f in extract_facts(text).facts}
        row = (len(expected & found), len(expected), text == sample.caption, 1)
        for name in ("all", sample.modality):
            counts[name] = [a + b for a, b in zip(counts[name], row, strict=True)]
    figures = {
        "set": images.name,
        "images": len(images.samples),
        "patients": len({s.patient for s in images.samples}),
        "base": {name: shares(*row) for name, row in counts.items()},
    }
    text = json.dumps(figures, indent=2)
    (options.model / "evaluation.json").write_text(text + "\n")
    print(text)


class Captioner:
    """The model and its processor as transformers loads them from the folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self._processor = AutoProcessor.from_pretrained(folder)
        self._model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    def caption(self, image: Image.Image, prompt: str) -> str:
        """The greedy caption of an image, at most 64 tokens."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self._processor(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            out = self._model.generate(**inputs, max_new_tokens=64, do_sample=False)
        made = out[0, inputs["input_ids"].shape[1] :]
        return str(self._processor.decode(made, skip_special_tokens=True)).strip()


def shares(right: int, facts: int, exact: int, captions: int) -> dict[str, Any]:
    """The row of the figures for some counts."""
    return {
        "facts_right": round(right / facts, 4),
        "facts": facts,
        "exact_captions": round(exact / captions, 4),
        "captions": captions,
    }


if __name__ == "__main__":
    main()
