"""The caption metrics: one row each, with what it needs and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exporter.compare.captions.alignscore import AlignScore
from exporter.compare.captions.base import CaptionMetric
from exporter.compare.captions.bertscore import BertScore
from exporter.compare.captions.bleu import Bleu
from exporter.compare.captions.bleurt import Bleurt
from exporter.compare.captions.chexbert import CheXbert
from exporter.compare.captions.concepts import Concepts
from exporter.compare.captions.radgraph import RadGraph
from exporter.compare.captions.rouge import Rouge, SummaryRouge
from exporter.compare.captions.similarity import Similarity

BUILD = ("torch", "transformers")


@dataclass(frozen=True)
class BuiltIn:
    """A metric that needs no weights; `seconds` per 1,000 captions, see `COST`.

    `usual`: computed when nothing is asked for.
    """

    name: str
    figures: tuple[str, ...]
    unit: str
    what: str
    seconds: float
    open: Callable[[], CaptionMetric]
    usual: bool = True


@dataclass(frozen=True)
class FromPath:
    """A metric over weights or data at a path.

    `file` is its name in the default folder, `holds` what stands there, `modules` come with `extra`.
    `seconds` per 1,000 captions with a tiny model, see `COST`.
    """

    name: str
    figures: tuple[str, ...]
    unit: str
    what: str
    seconds: float
    open: Callable[[Path], CaptionMetric]
    file: str
    holds: str
    modules: tuple[str, ...] = ()
    extra: str = ""


CaptionRow = BuiltIn | FromPath

# benchmarks/metric_cost.py measures these; a tiny model says what everything around the model costs.
COST = (
    "CPU seconds per 1,000 captions, one thread of an AVX-512 machine; where weights are needed: with "
    "random ones of 3 layers and width 32, so what real weights add is not in it"
)
CAPTION_METRICS: tuple[CaptionRow, ...] = (
    BuiltIn("rouge", ("rouge1", "rougeL"), "0..1", "ROUGE-1 and ROUGE-L F", 0.24, Rouge),
    BuiltIn(
        "bleu", tuple(f"{kind}bleu{n}" for kind in ("", "sentence_") for n in range(1, 5)), "0..100",
        "BLEU-1 to 4 of the corpus and mean of sentences, as sacrebleu", 0.3, Bleu,
    ),
    BuiltIn(
        "summary", ("rouge2", "rougeLsum"), "0..1", "ROUGE-2 and ROUGE-Lsum F, a sentence per line",
        0.24, SummaryRouge, usual=False,
    ),
    FromPath(
        "bertscore", ("bertscore_precision", "bertscore_recall", "bertscore_f1"), "-1..1",
        "BERTScore with idf", 0.29, BertScore, "bertscore",
        "a BERT, RoBERTa or DeBERTa folder (microsoft/deberta-xlarge-mnli)", BUILD, "build",
    ),
    FromPath(
        "bleurt", ("bleurt",), "about 0..1", "BLEURT", 1.3, Bleurt, "bleurt",
        "a BLEURT folder of a PyTorch port (BLEURT-20, BLEURT-20-D12)", BUILD, "build",
    ),
    FromPath(
        "similarity", ("similarity_cosine", "similarity_scaled"), "-1..1, 0..2.5",
        "image and caption in a CLIP-kind model", 1.4, Similarity, "similarity",
        "a CLIP folder", BUILD, "build",
    ),
    FromPath(
        "concepts", ("concepts_medcon", "concepts_all"), "0..1", "F1 of UMLS concepts", 0.1, Concepts,
        "concepts.tsv", "a concept dictionary (.tsv), or by option a MedCAT pack",
    ),
    FromPath(
        "alignscore", ("alignscore",), "0..1", "AlignScore nli_sp, ground truth as context", 7.8,
        AlignScore, "alignscore", "AlignScore's RoBERTa checkpoint as a folder", BUILD, "build",
    ),
    FromPath(
        "radgraph", tuple(f"radgraph_{x}" for x in ("simple", "partial", "complete")), "0..1",
        "F1 of RadGraph entities and relations", 0.041, RadGraph, "radgraph.json",
        "annotations of the texts that RadGraph wrote (.json)",
    ),
    FromPath(
        "chexbert", tuple(f"chexbert_{a}{n}" for n in (14, 5) for a in ("micro", "macro")), "0..1",
        "F1 of CheXbert observations", 1.7, CheXbert, "chexbert",
        "CheXbert's checkpoint as a folder", BUILD, "build",
    ),
)  # fmt: skip
BY_NAME = {row.name: row for row in CAPTION_METRICS}
USUAL = tuple(row.name for row in CAPTION_METRICS if isinstance(row, BuiltIn) and row.usual)
