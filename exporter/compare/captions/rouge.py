"""ROUGE as caption metrics: ROUGE-1 and ROUGE-L, and ROUGE-2 and ROUGE-Lsum for summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from exporter.compare.captions.base import Pair, Tally, mean_tally
from exporter.compare.quality.rouge import rouge1, rouge_l, rouge_l_sum, rouge_n


class Rouge:
    """`CaptionMetric`: mean ROUGE-1 and ROUGE-L F over pairs, in 0..1."""

    how = "F-measure, lowercase, no stemmer, mean over pairs"

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally]:
        """Figures rouge1 and rougeL."""
        return {
            "rouge1": mean_tally([rouge1(p.truth, p.said) for p in pairs]),
            "rougeL": mean_tally([rouge_l(p.truth, p.said) for p in pairs]),
        }


class SummaryRouge:
    """`CaptionMetric`: mean ROUGE-2 and ROUGE-Lsum F over pairs, in 0..1; one sentence per line."""

    how = "F-measure, lowercase, no stemmer, sentences by line, mean over pairs"

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally]:
        """Figures rouge2 and rougeLsum."""
        return {
            "rouge2": mean_tally([rouge_n(p.truth, p.said, 2) for p in pairs]),
            "rougeLsum": mean_tally([rouge_l_sum(p.truth, p.said) for p in pairs]),
        }
