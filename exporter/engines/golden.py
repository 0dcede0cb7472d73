"""The golden self-test: engines must say of the golden cases what the graph they are built from says.

Expected are the tokens that a bundle's own comparison recorded for these very images and this prompt;
where it has none, the ONNX graph is asked on the spot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from exporter.core.artifact import write_atomic
from exporter.core.cases import prompt_for
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused, ParityFailed
from exporter.core.progress import Progress, silent
from exporter.engines.record import EngineRecord
from exporter.runtimes.base import Captioner
from exporter.runtimes.images import open_image
from exporter.runtimes.trt_engine import REBUILD

FILE = "self-test.json"


@dataclass(frozen=True)
class GoldenCase:
    """An image and the tokens of its caption as recorded; None: the graph is asked. `modality` goes
    into an instruction that names it.
    """

    id: str
    image: Path
    tokens: tuple[int, ...] | None = None
    modality: str = ""


@dataclass(frozen=True)
class Golden:
    """What engines are asked, and how many tokens at most."""

    cases: Sequence[GoldenCase]
    prompt: str
    max_new_tokens: int


class GoldenResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One case. `differs_at`: index of the first token that differs, None when all are equal;
    `gap`: by how much (in logits) the engine itself prefers its token there to the expected one, None
    where one of the two texts ends or the case is equal. `source`: "recorded" or "onnx".
    """

    id: str
    source: str
    tokens: int
    differs_at: int | None
    gap: float | None


class SelfTest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished self-test of the engines with these digests; `step_graph`: whether the decode step
    ran as a CUDA graph, and if not, why.
    """

    engines: dict[str, str]
    prompt: str
    max_new_tokens: int
    cases: tuple[GoldenResult, ...]
    step_graph: str = ""

    @property
    def passed(self) -> bool:
        """Whether every case has the same tokens."""
        return bool(self.cases) and all(c.differs_at is None for c in self.cases)


def self_test(
    engine: Captioner,
    graph: Callable[[], Captioner],
    golden: Golden,
    records: Sequence[EngineRecord],
    *,
    progress: Progress = silent,
) -> SelfTest:
    """Caption every golden case with the engines and compare the tokens.

    `graph` opens the ONNX graph; it is called once, and only if a case has no recorded tokens. Raises `InputRefused` without cases.
    """
    if not golden.cases:
        raise InputRefused("no golden cases: the self-test needs at least one image")
    results = []
    opened: Captioner | None = None
    for done, case in enumerate(golden.cases):
        progress(done, len(golden.cases), case.id)
        image, asked = open_image(case.image), prompt_for(golden.prompt, case.modality)
        said = engine.caption(image, asked, golden.max_new_tokens).tokens
        expected = case.tokens
        if expected is None:
            opened = opened or graph()
            expected = opened.caption(image, asked, golden.max_new_tokens).tokens
        where = first_difference(said, expected)
        gap = None
        if where is not None and where < min(len(said), len(expected)):
            row = engine.score(image, asked, said[:where])[-1]
            gap = float(np.float64(row[said[where]]) - np.float64(row[expected[where]]))
        source = "onnx" if case.tokens is None else "recorded"
        results.append(GoldenResult(case.id, source, len(expected), where, gap))
    progress(len(golden.cases), len(golden.cases))
    return SelfTest(
        engines={r.part: r.digests.engine for r in records},
        prompt=golden.prompt,
        max_new_tokens=golden.max_new_tokens,
        cases=tuple(results),
    )


def first_difference(said: Sequence[int], expected: Sequence[int]) -> int | None:
    """Index of the first token that differs, one text's end where it is the other's start, or None."""
    for index, (a, b) in enumerate(zip(said, expected, strict=False)):
        if a != b:
            return index
    return None if len(said) == len(expected) else min(len(said), len(expected))


def require_passed(found: SelfTest) -> None:
    """Raise `ParityFailed` naming the first case whose captions differ."""
    wrong = [c for c in found.cases if c.differs_at is not None]
    if not wrong:
        return
    first = wrong[0]
    gap = (
        "" if first.gap is None else f", where the engine prefers its own by {first.gap:.3g} logits"
    )
    raise ParityFailed(
        f"self-test: {len(wrong)} of {len(found.cases)} golden captions differ from the graph's, first "
        f"'{first.id}' at token {first.differs_at}{gap}; the engines are deleted, the ONNX graph stays "
        "in use"
    )


def write_self_test(found: SelfTest, path: Path) -> None:
    """Write the result."""
    write_atomic(path, canonical_json(msgspec.to_builtins(found)))


def read_self_test(folder: Path) -> SelfTest:
    """The result beside the engines. Raises `InputRefused` when there is none."""
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=SelfTest)
    except FileNotFoundError as error:
        raise InputRefused(f"{folder}: the engines were never tested; {REBUILD}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputRefused(f"{path}: not a self-test ({error}); {REBUILD}") from error
