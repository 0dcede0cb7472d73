"""One measured process: what it is asked, what it answers, and how it is started."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from exporter.compare.gpu import GpuUse
from exporter.compare.process import explain_end, run_worker
from exporter.core.artifact import write_atomic
from exporter.core.digest import sha256_json
from exporter.core.progress import Progress, silent

WORKER = "exporter.compare.worker"
Role = Literal["reference", "candidate", "speed"]


class JobCase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image to caption; the digest makes a cached result of another image useless."""

    id: str
    image: str
    sha256: str


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


def run_job(job: Job, progress: Progress = silent) -> JobResult:
    """Run `job` in a fresh process, or return its finished result if this very job was done before.

    Raises the worker's own error class, or `EnvironmentLacks` when it was killed, with its last
    lines.
    """
    folder = Path(job.folder)
    done = folder / "result.json"
    cached = finished(job)
    if cached is not None:
        return cached
    done.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    request, log = folder / "request.json", folder / "worker.log"
    write_atomic(request, msgspec.json.encode(job))
    code = run_worker(
        WORKER, request, log, threads=job.threads, total=len(job.cases), progress=progress
    )
    result = read_result(done) if done.is_file() else None
    if code != 0 or result is None:
        raise explain_end(f"the {job.role} process of '{job.name}'", code, log)
    return result


def finished(job: Job) -> JobResult | None:
    """The result of an earlier run of this very job, or None."""
    path = Path(job.folder) / "result.json"
    result = read_result(path) if path.is_file() else None
    return result if result is not None and result.job == job.digest else None


def read_result(path: Path) -> JobResult | None:
    """A finished result; None when the file is of another version or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=JobResult)
    except msgspec.DecodeError:
        return None
