"""Ways to break a model on purpose, one at a time, and to ask it without a process of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from safetensors.numpy import load_file, save_file

from exporter.compare.jobs import Job, JobCase, JobResult
from exporter.compare.worker import Probed, answer
from exporter.core.artifact import write_atomic
from exporter.core.digest import sha256_file
from exporter.families.base import Preparer, PromptInputs
from exporter.runtimes.base import Caption
from exporter.runtimes.ort import OrtCaptioner

Tensors = dict[str, NDArray[np.generic]]
WEIGHTS = "model.safetensors"
SIDES = (("left", "right"), (" left", " right"), ("Left", "Right"), (" Left", " Right"))


def altered(source: Path, out: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of the model folder `source` with its tensors changed in place by `change`."""
    shutil.copytree(source, out)
    tensors: Tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, out / WEIGHTS)
    return out


def swap_sides_in_head(folder: Path) -> Callable[[Tensors], None]:
    """Every token for left is written where right is meant, and the other way round."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pairs = [tuple(tokenizer.encode(w, add_special_tokens=False).ids for w in p) for p in SIDES]
    single = [(a[0], b[0]) for a, b in pairs if len(a) == len(b) == 1]
    assert single, "the tokenizer has no token for a side"

    def change(tensors: Tensors) -> None:
        head = tensors["lm_head.weight"]
        for left, right in single:
            head[[left, right]] = head[[right, left]]

    return change


def double_scales(tensors: Tensors) -> None:
    """One decoder layer's scales doubled: all its matrices twice as large."""
    names = [n for n in tensors if "text_model.layers.1." in n and n.endswith(".scales")]
    assert names
    for name in names:
        tensors[name] = tensors[name] * np.float16(2)


def blind(tensors: Tensors) -> None:
    """What connects the vision part to the text is zero: no image gets through."""
    names = [n for n in tensors if "modality_projection" in n and n.endswith("weight")]
    assert names
    for name in names:
        tensors[name] = np.zeros_like(tensors[name])


def two_bits(tensors: Tensors) -> None:
    """All decoder matrices rounded to -2, -1, 0 or 1 times half the largest of their block of 32."""
    for name, tensor in tensors.items():
        if "text_model.layers" not in name or tensor.ndim != 2:
            continue
        blocks = tensor.astype(np.float32).reshape(-1, 32)
        step = np.maximum(np.abs(blocks).max(1, keepdims=True) / 2, 1e-8)
        rounded = step * np.clip(np.round(blocks / step), -2, 1)
        tensors[name] = rounded.reshape(tensor.shape).astype(tensor.dtype)


def other_adapter(adapter: Path, out: Path, seed: int = 3) -> Path:
    """An adapter of the same shapes and size of change that was trained on something else.

    The columns of each matrix A are exchanged at random: the same numbers, aimed at other inputs.
    """
    shutil.copytree(adapter, out)
    rng = np.random.default_rng(seed)
    path = out / "adapter_model.safetensors"
    tensors: Tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            tensors[name] = np.ascontiguousarray(tensor[:, rng.permutation(tensor.shape[1])])
    save_file(tensors, path)
    return out


def shift_tokenizer(folder: Path, out: Path) -> Path:
    """Each ordinary token has the number of its neighbour, as after a wrongly added word."""
    shutil.copytree(folder, out)
    path = out / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    special = {t["content"] for t in data["added_tokens"]}
    vocabulary: dict[str, int] = data["model"]["vocab"]
    ordinary = sorted((i, t) for t, i in vocabulary.items() if t not in special)
    numbers = [i for i, _ in ordinary]
    for (_, token), number in zip(ordinary, [*numbers[1:], numbers[0]], strict=True):
        vocabulary[token] = number
    path.write_text(json.dumps(data), encoding="utf-8")
    return out


class Cut:
    """A runtime that stops after `length` tokens, whatever it is asked for."""

    def __init__(self, inner: OrtCaptioner, length: int) -> None:
        self._inner, self._length = inner, length
        self.preparer: Preparer = inner.preparer

    def caption(self, image: Image, prompt: str, max_new_tokens: int) -> Caption:
        return self._inner.caption(image, prompt, min(max_new_tokens, self._length))

    def score(self, image: Image, prompt: str, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self._inner.score(image, prompt, tokens)


class Unseen:
    """A runtime whose vision features are zero for images of some sizes or pixels (`which`)."""

    def __init__(self, inner: OrtCaptioner, which: Callable[[Image], bool]) -> None:
        self._inner, self._which = inner, which
        self.preparer: Preparer = inner.preparer
        self._features = inner.engine.features
        self._off = False
        inner.engine.features = self._seen  # type: ignore[method-assign]

    def _seen(self, inputs: PromptInputs) -> NDArray[np.float32]:
        found = self._features(inputs)
        return np.zeros_like(found) if self._off else found

    def caption(self, image: Image, prompt: str, max_new_tokens: int) -> Caption:
        self._off = self._which(image)
        return self._inner.caption(image, prompt, max_new_tokens)

    def score(self, image: Image, prompt: str, tokens: Sequence[int]) -> NDArray[np.float32]:
        self._off = self._which(image)
        return self._inner.score(image, prompt, tokens)


class Bench:
    """Asks models in this process the same cases, as the comparison's workers would."""

    def __init__(self, folder: Path, cases: Sequence[JobCase], prompt: str, length: int) -> None:
        self._folder, self._cases = folder, tuple(cases)
        self._prompt, self._length = prompt, length
        self.reference: Job | None = None

    def ask_reference(self, model: Path) -> JobResult:
        """The reference's answers; its logits stay on disk for the candidates."""
        job = replace_job(self._job("reference", model), logits_bytes=1 << 30)
        self.reference = job
        result = answer(job, OrtCaptioner(model, threads=1), 0.0)
        write_atomic(Path(job.folder) / "result.json", msgspec.json.encode(result))
        return result

    def ask(self, name: str, captioner: Probed) -> JobResult:
        """A candidate's answers and how far its distribution is from the reference's."""
        assert self.reference is not None
        job = replace_job(
            self._job(name, Path(self.reference.model_dir)),
            role="candidate",
            reference=self.reference.folder,
        )
        return answer(job, captioner, 0.0)

    def _job(self, name: str, model: Path) -> Job:
        return Job(
            name=name, role="reference", runtime="ort", model_dir=str(model), model_sha256="",
            threads=1, prompt=self._prompt, max_new_tokens=self._length, cases=self._cases,
            folder=str(self._folder / name), probes=min(64, len(self._cases)),
        )  # fmt: skip


def replace_job(job: Job, **changes: object) -> Job:
    """A job with some fields changed."""
    return msgspec.structs.replace(job, **changes)


def job_cases(cases: Sequence[tuple[str, Path]]) -> list[JobCase]:
    """Cases as the worker is told of them."""
    return [JobCase(name, str(image), sha256_file(image)) for name, image in cases]
