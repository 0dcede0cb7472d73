"""What a worker asks of a loaded model, for each task; every step of every case is timed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.compare.jobs import Scores, compare_kept
from exporter.compare.tasks.jobs import TaskJob, TaskJobCase, Written, read_task_result
from exporter.core.artifact import need_space
from exporter.core.errors import InputRefused
from exporter.families.tasks import Task
from exporter.runtimes.graphs import Graphs
from exporter.runtimes.images import open_image
from exporter.runtimes.tasks.encode import TextEncoder
from exporter.runtimes.tasks.segment import Segmenter
from exporter.runtimes.tasks.summarise import Summariser
from exporter.runtimes.tasks.zero_shot import ZeroShot, label_texts

T = TypeVar("T")
P = ParamSpec("P")
# Called after each case; None: nobody waits for it.
Report = Callable[[TaskJobCase], None] | None
# The reference's logits are kept for so many bytes; summaries behind that are not scored.
LOGITS_BYTES = 4 << 30


class Clock:
    """Seconds of each step, by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def time(self, step: str, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """What `work` returns, and how long it took."""
        start = perf_counter()
        done = work(*args, **options)
        self.seconds[step].append(perf_counter() - start)
        return done


@dataclass
class Answered:
    """What a model said; fields as in `TaskResult`."""

    seconds: dict[str, list[float]]
    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    scale: float | None = None
    bias: float | None = None
    head: str | None = None
    head_labels: tuple[str, ...] = ()
    entities: list[list[tuple[str, int, int]]] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)


def zero_shot(job: TaskJob, graphs: Graphs, report: Report) -> Answered:
    """Arrays: images ``[cases, size]``, labels ``[labels, size]``, texts ``[texts, size]``."""
    model, clock = ZeroShot(graphs), Clock()
    images = []
    for case in job.cases:
        images.append(clock.time("image", model.embed_images, [_image(case)]))
        if report:
            report(case)
    prompts = label_texts(job.labels, job.template or model.template) if job.labels else []
    # One at a time, so that a text's time is its own, and padding that of no other.
    texts = [clock.time("text", model.embed_texts, [text]) for text in [*prompts, *job.texts]]
    whole = np.concatenate(texts) if texts else np.zeros((0, images[0].shape[1]), np.float32)
    arrays: dict[str, NDArray[np.generic]] = {
        "images": np.concatenate(images),
        "labels": whole[: len(prompts)],
        "texts": whole[len(prompts) :],
    }
    return Answered(dict(clock.seconds), arrays, scale=model.logit_scale, bias=model.logit_bias)


def segmentation(job: TaskJob, graphs: Graphs, report: Report) -> Answered:
    """Arrays: ``mask-{i}`` packed bool ``[texts, height, width]`` of case i, at the image's size, at 0.5."""
    model, clock = Segmenter(graphs), Clock()
    template = job.template or "{}"
    arrays: dict[str, NDArray[np.generic]] = {}
    for index, case in enumerate(job.cases):
        image, texts = _image(case), label_texts(case.texts, template)
        masks = clock.time("image and texts", model.segment, image, texts)
        arrays[f"mask-{index}"] = np.packbits(masks > 0.5, axis=-1)
        arrays[f"shape-{index}"] = np.array(masks.shape)
        if report:
            report(case)
    return Answered(dict(clock.seconds), arrays)


def text_encoder(job: TaskJob, graphs: Graphs, report: Report) -> Answered:
    """Arrays: vectors ``[cases, hidden]`` or, with a classification head, logits ``[cases, labels]``."""
    model, clock = TextEncoder(graphs), Clock()
    rows, entities = [], []
    for case in job.cases:
        text = _text(case)
        if model.head == "token":
            found = clock.time("text", model.entities, text)
            entities.append([(e.kind, e.start, e.end) for e in found])
        else:
            ask = model.embed if model.head == "none" else model.logits
            rows.append(clock.time("text", ask, [text]))
        if report:
            report(case)
    arrays: dict[str, NDArray[np.generic]] = {"rows": np.concatenate(rows)} if rows else {}
    return Answered(
        dict(clock.seconds), arrays, head=model.head, head_labels=model.labels, entities=entities
    )


def summary(job: TaskJob, graphs: Graphs, report: Report) -> Answered:
    """Greedy summaries; the reference's logits stay on disk for the candidates that follow."""
    model, clock = Summariser(graphs), Clock()
    logits = _Logits(job)
    written = []
    for index, case in enumerate(job.cases):
        text = f"{job.template.rstrip()} {_text(case)}" if job.template else _text(case)
        try:
            said = model.summarise(text, job.max_new_tokens)
        except InputRefused as error:
            raise InputRefused(f"{case.id}: {error}") from error
        clock.seconds["encode"].append(said.timing.prepare + said.timing.vision)
        clock.seconds["first token"].append(said.timing.first_token)
        if said.timing.decode:
            clock.seconds["token"].append(float(np.mean(said.timing.decode)))
        clock.seconds["summary"].append(said.timing.total)
        scores = None
        if job.role == "reference":
            logits.keep(index, model.score(text, said.tokens))
        elif job.role == "candidate" and (tokens := logits.tokens(index)) is not None:
            scores = logits.compare(index, model.score(text, tokens), tokens, case.id)
        written.append(Written(said.text, list(said.tokens), said.stopped, scores))
        if report:
            report(case)
    return Answered(dict(clock.seconds), written=written)


class _Logits:
    """The reference's logits, one file per case: written by its worker, read by the candidates'."""

    def __init__(self, job: TaskJob) -> None:
        self._folder = Path(job.reference or job.folder) / "logits"
        self._left = LOGITS_BYTES
        self._said: list[Written] = []
        if job.role == "candidate":
            result = read_task_result(self._folder.parent)
            if result is None or len(result.written) != len(job.cases):
                raise InputRefused(
                    f"{self._folder.parent}: not the reference's result for these texts; remove the "
                    "work folder"
                )
            self._said = result.written

    def keep(self, index: int, logits: NDArray[np.float32]) -> None:
        """Write one case's, until the budget is used: from there on none."""
        self._left = self._left - logits.nbytes if self._left >= logits.nbytes else -1
        if self._left >= 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            need_space(self._folder, logits.nbytes)
            np.save(self._path(index), logits)

    def tokens(self, index: int) -> list[int] | None:
        """The reference's tokens, where its logits were kept."""
        return self._said[index].tokens if self._path(index).is_file() else None

    def compare(
        self, index: int, own: NDArray[np.float32], tokens: list[int], where: str
    ) -> Scores:
        """Scores of a candidate's logits for the same tokens. Raises `InputRefused` naming the case."""
        return compare_kept(self._path(index), own, tokens, where)

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}.npy"


def _image(case: TaskJobCase) -> Image:
    if case.image is None:
        raise InputRefused(f"{case.id}: this task needs an image, and the case has none")
    return open_image(Path(case.image))


def _text(case: TaskJobCase) -> str:
    if case.text is None:
        raise InputRefused(f"{case.id}: this task needs a text, and the case has none")
    return case.text


ANSWERS: Mapping[Task, Callable[[TaskJob, Graphs, Report], Answered]] = {
    "zero-shot": zero_shot,
    "segmentation": segmentation,
    "text-encoder": text_encoder,
    "summary": summary,
}
