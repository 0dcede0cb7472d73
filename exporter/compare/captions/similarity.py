"""Image-caption similarity with a CLIP-kind model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.compare.captions.base import Float64, NotComputed, Pair, Tally, mean_tally
from exporter.compare.captions.encoder import (
    BATCH,
    TextEncoder,
    embedding_rows,
    folder_tensors,
    load_module,
    open_tokenizer,
    require_torch,
)
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.runtimes.images import open_image

KINDS = {"clip": ("CLIPModel", "CLIPImageProcessor")}
SCALE = 2.5


class Similarity:
    """`CaptionMetric`: cosine of image and caption, and CLIPScore's 2.5 max(cosine, 0).

    The second can exceed 1. The ground truth plays no part. Needs the images.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises `InputRefused`, or `EnvironmentLacks` without torch."""
        require_torch()
        config = read_config(folder / "config.json")
        kind = KINDS.get(str(config.get("model_type")))
        if kind is None:
            raise InputRefused(
                f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}; expected "
                f"{' or '.join(KINDS)}"
            )
        model = load_module(kind[0], config, folder_tensors(folder), folder)
        tokenizer = open_tokenizer(folder, embedding_rows(model.text_model))
        text = config.get("text_config") or {}
        limit = int(text.get("max_position_embeddings") or 77)
        self._encoder = TextEncoder(tokenizer, model, text, limit)
        self._pixels = _image_processor(folder, kind[1])
        self.how = f"{kind[0]}, captions as they are, cut to {limit} tokens"

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally] | NotComputed:
        """Figures similarity_cosine and similarity_scaled."""
        images = [p.image for p in pairs if p.image is not None and p.image.is_file()]
        if len(images) < len(pairs):
            lost = next(p for p in pairs if p.image is None or not p.image.is_file())
            return NotComputed(f"no image of '{lost.id}'; give the images with --eval SET")
        cosines = (self._images(images) * self._texts([p.said for p in pairs])).sum(1)
        return {
            "similarity_cosine": mean_tally(cosines),
            "similarity_scaled": mean_tally(SCALE * np.maximum(cosines, 0.0)),
        }

    def _images(self, paths: Sequence[Path]) -> Float64:
        import torch

        rows = []
        for start in range(0, len(paths), BATCH):
            batch = [open_image(path) for path in paths[start : start + BATCH]]
            pixels = torch.from_numpy(self._pixels(batch, return_tensors="np")["pixel_values"])
            with torch.inference_mode():
                rows.append(_features(self._encoder.model.get_image_features(pixel_values=pixels)))
        return np.concatenate(rows)

    def _texts(self, texts: Sequence[str]) -> Float64:
        import torch

        found: dict[int, Float64] = {}
        for places, inputs in self._encoder.batches(self._encoder.tokenize(texts)):
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                vectors = _features(self._encoder.model.get_text_features(**inputs))
            found |= dict(zip(places, vectors, strict=True))
        return np.stack([found[i] for i in range(len(texts))])


def _features(output: Any) -> Float64:
    """Unit rows; transformers 5 wraps what 4 gave as a tensor."""
    tensor = getattr(output, "pooler_output", output)
    rows = tensor.numpy().astype(np.float64)
    unit: Float64 = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _image_processor(folder: Path, kind: str) -> Any:
    import transformers

    settings = read_config(folder / "preprocessor_config.json")
    name = f"{kind}Pil" if hasattr(transformers, f"{kind}Pil") else kind
    known = {
        k: v for k, v in settings.items() if k not in ("image_processor_type", "processor_class")
    }
    return getattr(transformers, name)(**known)
