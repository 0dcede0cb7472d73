"""Zero-shot classification and retrieval with two encoders that share a space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL.Image import Image

from exporter.core.errors import InputRefused, WrongUsage
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, ZeroShotPreparer
from exporter.runtimes.graphs import Graphs

Float32 = NDArray[np.float32]
BATCH = 16


class ZeroShot:
    """Images and texts in one space, as CLIP has it (arXiv 2103.00020) or SigLIP (arXiv 2303.15343)."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._preparer: ZeroShotPreparer = graphs.preparer
        self._scoring: tuple[float, float | None] | None = None

    @property
    def template(self) -> str:
        """The model's text around a label."""
        return self._preparer.template

    @property
    def logit_scale(self) -> float:
        """What a cosine is multiplied by, exponentiated; the text graph gives it with any text."""
        return self._asked()[0]

    @property
    def logit_bias(self) -> float | None:
        """What is added to a scaled cosine where each label is scored by itself; None where labels share
        one probability.
        """
        return self._asked()[1]

    def _asked(self) -> tuple[float, float | None]:
        if self._scoring is None:
            self.embed_texts([self.template.format("image")])
        assert self._scoring is not None
        return self._scoring

    def embed_images(self, images: Sequence[Image]) -> Float32:
        """Unit vectors ``[images, size]``. Raises `InputRefused` where one has no direction."""
        parts = [
            self._graphs.run(VISION_GRAPH, self._preparer.images(images[i : i + BATCH]))
            for i in range(0, len(images), BATCH)
        ]
        return unit_rows(np.concatenate([p["image_embeds"] for p in parts]), "image")

    def embed_texts(self, texts: Sequence[str]) -> Float32:
        """Unit vectors ``[texts, size]``. Raises `InputRefused` where one has no direction."""
        parts = [
            self._graphs.run(TEXT_GRAPH, self._preparer.texts(texts[i : i + BATCH]))
            for i in range(0, len(texts), BATCH)
        ]
        bias = parts[0].get("logit_bias")
        self._scoring = float(parts[0]["logit_scale"]), None if bias is None else float(bias)
        return unit_rows(np.concatenate([p["text_embeds"] for p in parts]), "text")

    def scores(
        self, images: Sequence[Image], labels: Sequence[str], template: str | None = None
    ) -> NDArray[np.float64]:
        """Probability of each label for each image, ``[images, labels]``; rows sum to 1 unless the model
        has a `logit_bias`.

        `template` has one ``{}`` for the label (None: the model's own). Raises `WrongUsage` without
        a label or with another template.
        """
        texts = self.embed_texts(label_texts(labels, template or self.template))
        return label_scores(self.embed_images(images), texts, self.logit_scale, self.logit_bias)


def label_texts(labels: Sequence[str], template: str) -> list[str]:
    """The label inside the template. Raises `WrongUsage` without labels or without one ``{}``."""
    if not labels:
        raise WrongUsage("no labels; expected at least one to choose from")
    if template.count("{}") != 1 or template.replace("{}", "").count("{"):
        raise WrongUsage(
            f"the template is {template!r}; expected one {{}} for the label, as in 'a photo of {{}}'"
        )
    return [template.replace("{}", label) for label in labels]


def label_scores(
    images: Float32, texts: Float32, scale: float, bias: float | None = None
) -> NDArray[np.float64]:
    """Softmax over texts of `scale` times the cosine, from unit vectors, ``[images, texts]``.

    With a `bias` each pair has a probability of its own: the sigmoid of scaled cosine plus bias.
    """
    logits = scale * (images.astype(np.float64) @ texts.astype(np.float64).T)
    if bias is not None:
        # The same as 1 / (1 + exp(-x)), without its overflow.
        alone: NDArray[np.float64] = np.exp(-np.logaddexp(0, -(logits + bias)))
        return alone
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return scores


def retrieval_ranks(similarity: ArrayLike, relevant: ArrayLike) -> NDArray[np.int64]:
    """Rank, from 1, of each query's best relevant item; both are ``[queries, items]``.

    An item that ties with the relevant one stands before it, so that a model to which all items are
    alike finds nothing. Raises ValueError for a query without a relevant item.
    """
    values, wanted = np.asarray(similarity, dtype=np.float64), np.asarray(relevant, dtype=bool)
    if values.ndim != 2 or values.shape != wanted.shape:
        raise ValueError(f"shapes {values.shape} and {wanted.shape}; expected two equal matrices")
    if not wanted.any(axis=1).all():
        raise ValueError("a query has no relevant item")
    best = np.where(wanted, values, -np.inf).max(axis=1, keepdims=True)
    ranks: NDArray[np.int64] = 1 + ((values >= best) & ~wanted).sum(axis=1)
    return ranks


def unit_rows(rows: Float32, what: str) -> Float32:
    """Rows of length 1. Raises `InputRefused` for one that is zero or not finite."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    bad = int((~np.isfinite(lengths) | (lengths == 0)).sum())
    if bad:
        raise InputRefused(
            f"{bad} of {len(rows)} {what} vectors are zero or not finite; the model overflowed or "
            "its weights are damaged"
        )
    units: Float32 = (rows / lengths).astype(np.float32)
    return units
