"""One measured process: what it is asked, what it answers, and how it is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from exporter.compare.gpu import GpuUse
from exporter.compare.process import answered, ask, read_answer
from exporter.compare.quality.distribution import compare_logits
from exporter.core.cases import prompt_for
from exporter.core.digest import sha256_json
from exporter.core.errors import InputRefused
from exporter.core.progress import Progress, silent

WORKER = "exporter.compare.worker"
Role = Literal["reference", "candidate", "speed"]


class JobCase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image to caption; the digest makes a cached result of another image useless. `modality`
    goes into instructions that name it.
    """

    id: str
    image: str
    sha256: str
    modality: str = ""


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker does.

    role: "reference" captions, scores its own captions and keeps the logits in `folder`/logits up
    to `logits_bytes`; "candidate" captions and scores the tokens of the worker in `reference`;
    "speed" captions only, `repeat` tells one such process from the next. The first two also probe
    `probes` cases, spread over all: see `Probe`; and caption `perturbed` cases, spread alike, under
    each perturbation of `perturb`. `device` is "cpu" or "cuda", `dtype` the float type of "torch".
    """

    name: str
    role: Role
    runtime: str
    model_dir: str
    model_sha256: str
    threads: int
    prompt: str
    max_new_tokens: int
    cases: tuple[JobCase, ...]
    folder: str
    reference: str | None = None
    reference_job: str | None = None
    logits_bytes: int = 0
    repeat: int = 0
    probes: int = 0
    perturbed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def asked(self, case: JobCase) -> str:
        """The instruction that `case` gets. Raises `InputRefused` as `core.cases.prompt_for`."""
        return prompt_for(self.prompt, case.modality)

    @property
    def digest(self) -> str:
        """Digest of everything that determines the answer."""
        return sha256_json(msgspec.to_builtins(self))


class Scores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`quality.distribution.TokenScores` of one case as lists."""

    kl: list[float]
    agree: list[bool]
    reference_logprob: list[float]
    candidate_logprob: list[float]


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What else a model does with one case.

    blank: its greedy tokens for the same prompt and a gray image of the same size, as many as its
    caption has; prompt: digest of the input tokens; retold: the reference's tokens in this model's
    words (None for the reference itself).
    """

    blank: list[int]
    prompt: str
    retold: str | None = None


class CaseResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One caption with its times in seconds; `scores` where logits were compared.

    stopped: False when the length limit cut it, None where nobody said (predictions).

    perturbed: what the model says of the perturbed image, by the perturbation's name.
    """

    id: str
    text: str
    tokens: list[int]
    stopped: bool | None
    prompt_tokens: int
    prepare: float
    vision: float
    prefill: float
    decode: list[float]
    scores: Scores | None = None
    probe: Probe | None = None
    perturbed: dict[str, str] = {}

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return self.prepare + self.vision + self.prefill

    @property
    def total(self) -> float:
        """Seconds of the whole caption."""
        return self.first_token + sum(self.decode)


class JobResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker measured; memory in bytes, None where the system does not say.

    peak_load and peak_run are peaks of the resident set up to the end of loading and after it;
    they are one number where the peak cannot be reset (`peak_was_reset` False). `gpu` is what the
    GPU's side says (None: the model ran on the CPU).
    """

    job: str
    load_seconds: float
    peak_load: int | None
    peak_run: int | None
    unique: int | None
    peak_was_reset: bool
    versions: dict[str, str]
    cases: list[CaseResult]
    gpu: GpuUse | None = None


def compare_kept(
    logits: Path, own: NDArray[np.float32], tokens: Sequence[int], where: str
) -> Scores:
    """Scores of a candidate's logits ``[tokens, vocab]`` beside the reference's, which it kept in the file
    `logits`. Raises `InputRefused`, which names the case by `where`.
    """
    try:
        found = compare_logits(np.load(logits, allow_pickle=False), own, tokens)
    except ValueError as error:
        raise InputRefused(f"{where}: {error}") from error
    return Scores(
        kl=found.kl.tolist(),
        agree=found.agree.tolist(),
        reference_logprob=found.reference_logprob.tolist(),
        candidate_logprob=found.candidate_logprob.tolist(),
    )


def run_job(job: Job, progress: Progress = silent) -> JobResult:
    """Run `job` in a fresh process; see `process.ask`."""
    return ask(WORKER, job, JobResult, progress)


def finished(job: Job) -> JobResult | None:
    """The result of an earlier run of this very job, or None."""
    return answered(job, JobResult)


def read_result(path: Path) -> JobResult | None:
    """A finished result; None when there is none, or one of another version, or a damaged one."""
    return read_answer(path, JobResult)
