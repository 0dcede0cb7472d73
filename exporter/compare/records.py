"""The comparison as data: what compare.json and cases.jsonl hold (schema version 1)."""

from __future__ import annotations

from typing import Literal

import msgspec

from exporter.compare.gpu import GpuUse
from exporter.compare.verdict import GateReport

SCHEMA = 1


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A strict, immutable record."""


class Figure(Record, frozen=True):
    """A value with its 95 per cent interval (None: no interval) and the cases behind it."""

    value: float
    low: float | None
    high: float | None
    images: int
    patients: int


class Speed(Record, frozen=True):
    """Medians over `runs` captions in `rounds` interleaved processes; milliseconds.

    per_token is the median over captions of (total - first token) / (tokens - 1); tokens_per_second
    is 1000 / per_token. p90 are early-stopping bounds, None from fewer than 64 runs. `spread` is
    the interquartile range of the total over its median.
    """

    runs: int
    rounds: int
    images: int
    threads: int
    prepare: float
    vision: float
    first_token: float
    per_token: float | None
    tokens_per_second: float | None
    total: float
    first_token_p90: float | None
    total_p90: float | None
    spread: float
    load: float


class Memory(Record, frozen=True):
    """Bytes, medians over the speed processes; None where the system does not say.

    gpu: what the GPU's side says (None: the model ran on the CPU).
    """

    processes: int
    peak: int | None
    peak_load: int | None
    unique: int | None
    peak_was_reset: bool
    gpu: GpuUse | None = None


class Distribution(Record, frozen=True):
    """As `quality.distribution.Distribution`; None for an infinite standard error."""

    images: int
    tokens: int
    kl_mean: float
    kl_standard_error: float | None
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity_ratio: float
    captions: int
    identical: int
    first_divergent: float | None


class Truth(Record, frozen=True):
    """Facts against ground truth: `right` of `total` stated by the truth, `stated` by the model."""

    right: int
    total: int
    stated: int
    recall: Figure
    precision: float | None
    by_kind: dict[str, tuple[int, int]]
    by_finding: dict[str, tuple[int, int]] = {}


class Moved(Record, frozen=True):
    """Facts against the reference's captions; flips is images with at least one of all images."""

    kept: int
    lost: int
    added: int
    flipped: int
    flips: Figure
    flipped_by_kind: dict[str, int]


class Length(Record, frozen=True):
    """Generated tokens, their ratio to the reference's, captions cut by the length limit."""

    tokens: int
    ratio: float
    truncated: int | None


class Slice(Record, frozen=True):
    """Some figures on the images of one modality."""

    images: int
    patients: int
    rouge1: float | None
    right: int | None
    total: int | None
    flips: int
    kl_mean: float | None


class Robustness(Record, frozen=True):
    """One perturbation: images whose facts changed against the same model's clean caption.

    flipped: images with a fact turned over; difference: share changed less the reference's, paired
    (None for the reference).
    """

    changed: Figure
    flipped: int
    difference: Figure | None = None


class Row(Record, frozen=True):
    """All figures of one model; differences are this model minus the reference, paired.

    `captions` are the caption metrics of `captions/table.py` by figure, `robustness` is by
    perturbation (empty: not asked).
    """

    name: str
    role: Literal["reference", "noise floor", "candidate"]
    runtime: str
    threads: int
    model_sha256: str
    versions: dict[str, str]
    parts: dict[str, int]
    bytes: int
    ratio: float
    length: Length
    speed: Speed | None = None
    memory: Memory | None = None
    rouge1: Figure | None = None
    rouge1_difference: Figure | None = None
    captions: dict[str, Figure] = {}
    caption_differences: dict[str, Figure] = {}
    truth: Truth | None = None
    recall_difference: Figure | None = None
    moved: Moved | None = None
    distribution: Distribution | None = None
    by_modality: dict[str, Slice] = {}
    robustness: dict[str, Robustness] = {}
    device: str = "cpu"


class ChangeRow(Record, frozen=True):
    """One fact that changed against the reference: lost, added or flipped."""

    outcome: str
    kind: str
    text: str


class CaptionRow(Record, frozen=True):
    """What one model said of one image.

    `ids` are the generated tokens, `blank` those for a blank image (None: not asked) and `prompt` the
    digest of the input tokens: with them a later `medexport check` needs no reference model.
    `perturbed` are the texts for the perturbed image, by perturbation (empty: not asked).
    """

    text: str
    tokens: int
    identical: bool
    kl_mean: float | None
    rouge1: float | None
    right: int | None
    changes: tuple[ChangeRow, ...]
    ids: tuple[int, ...] = ()
    stopped: bool | None = True
    blank: tuple[int, ...] | None = None
    prompt: str | None = None
    perturbed: dict[str, str] = {}


class CaseRow(Record, frozen=True):
    """One image with what every model said; `image` is the file's path, in files only its name."""

    id: str
    image: str
    patient: str
    modality: str
    truth: str | None
    facts: int | None
    captions: dict[str, CaptionRow]
    sha256: str = ""


class Comparison(Record, frozen=True):
    """Everything that was measured; rows in the order given, the noise floor after the reference.

    `gates` holds a verdict per candidate, and the noise floor's last: the gate on no change at all.
    `not_computed` says of caption metrics that were asked for what was looked for.
    """

    schema: int
    summary: str
    reference: str
    prompt: str
    max_new_tokens: int
    images: int
    patients: int
    captioned: int
    modalities: dict[str, int]
    machine: dict[str, str]
    method: dict[str, str]
    rows: tuple[Row, ...]
    cases: tuple[CaseRow, ...] = ()
    gates: tuple[GateReport, ...] = ()
    not_computed: dict[str, str] = {}

    def gate(self, name: str) -> GateReport:
        """The verdict on the candidate called `name`. Raises KeyError."""
        return {gate.candidate: gate for gate in self.gates}[name]

    def row(self, name: str) -> Row:
        """The row called `name`. Raises KeyError."""
        return {row.name: row for row in self.rows}[name]
