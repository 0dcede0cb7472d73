"""The TensorRT runtime on the stand-ins against onnxruntime on the same standard graphs.

What the engines compute is onnxruntime's in both cases: these tests are about everything around it,
where keys and values lie, which places the mask shows, what a captured step reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from exporter.core.blocks import BlockFormat
from exporter.core.errors import InputRefused
from exporter.engines.record import read_record
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.trt import PARTS, TrtCaptioner
from exporter.runtimes.trt_decoder import CacheLayout
from exporter.runtimes.trt_memory import ALIGNMENT
from tests.support.fake_tensorrt import FakeTensorRT
from tests.support.family_cases import CASES, FamilyCase
from tests.support.host_memory import HostMemory
from tests.support.tensorrt_site import (
    PROMPT,
    build_there,
    export_standard,
    pictures,
    write_standard,
)
from tests.unit.graphs.packing import quantize_folder

# Trained without an instruction.
WORDLESS = ("vit-gpt2", "cnn-transformer")


@dataclass(frozen=True)
class Pair:
    """The same graphs with engines and in onnxruntime."""

    engines: TrtCaptioner
    graphs: OrtCaptioner
    memory: HostMemory
    trt: FakeTensorRT


def open_pair(exported: Path, engines: Path, memory: HostMemory | None = None) -> Pair:
    memory = memory or HostMemory()
    trt = FakeTensorRT(memory)
    build_there(trt, exported, engines)
    model = exported / "model"
    return Pair(
        TrtCaptioner(model, engines, trt, memory), OrtCaptioner(model, threads=1), memory, trt
    )


def larger() -> list[Image.Image]:
    """Two pictures no smaller than those that the profiles were measured with."""
    random = np.random.default_rng(6)
    shapes = ((96, 120, 3), (150, 90, 3))
    return [Image.fromarray(random.integers(0, 256, s, dtype=np.uint8)) for s in shapes]


@pytest.fixture(scope="module")
def standard(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_standard(tiny, tmp_path_factory.mktemp("standard") / "exported")


@pytest.fixture
def pair(standard: Path, tmp_path: Path) -> Pair:
    return open_pair(standard, tmp_path / "engines")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_says_what_the_graphs_say(case: FamilyCase, tmp_path: Path) -> None:
    exported = write_standard(case.write(tmp_path / "m"), tmp_path / "x")
    pair = open_pair(exported, tmp_path / "e")
    prompt = "" if case.name in WORDLESS else PROMPT
    said = set()
    for picture in larger():
        wanted = pair.graphs.caption(picture, prompt, 16)
        assert pair.engines.caption(picture, prompt, 16).tokens == wanted.tokens
        said.update(wanted.tokens)
        forced, logits = (
            c.score(picture, prompt, wanted.tokens) for c in (pair.engines, pair.graphs)
        )
        np.testing.assert_allclose(forced, logits, atol=1e-5 * np.abs(logits).max())
    assert len(said) > 1  # no single token over and over
    assert pair.engines.engine.decoder.step_graph == "captured"
    pair.engines.close()
    assert pair.memory.blocks == {}


def test_graphs_that_compute_in_float16_keep_their_cache_in_it(tiny: Path, tmp_path: Path) -> None:
    pair = open_pair(export_standard(tiny, tmp_path / "x", "float16"), tmp_path / "e")
    picture = pictures()[0]
    wanted = pair.graphs.caption(picture, PROMPT, 16)
    assert pair.engines.caption(picture, PROMPT, 16).tokens == wanted.tokens
    decoder = read_record(tmp_path / "e", PARTS[2])
    assert decoder.types["HALF"] > decoder.types["FLOAT"]
    # Two layers of keys and values, 8 rows (2 heads and padding) of 257 places of 16 float16 each.
    assert 4 * 8 * 257 * 32 in {len(b) for b in pair.memory.blocks.values()}


def test_packed_weights_say_what_the_graph_says(tiny: Path, tmp_path: Path) -> None:
    names = [f"model.text_model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up")]
    quantize_folder(tiny, tmp_path / "q", dict.fromkeys(names, BlockFormat(4, 64, True)))
    pair = open_pair(export_standard(tmp_path / "q", tmp_path / "x"), tmp_path / "e")
    wanted = pair.graphs.caption(pictures()[0], PROMPT, 16)
    assert pair.engines.caption(pictures()[0], PROMPT, 16).tokens == wanted.tokens
    assert read_record(tmp_path / "e", PARTS[2]).types["INT4"] == 2


def test_texts_of_different_lengths_follow_each_other(pair: Pair) -> None:
    # Small bucket, the whole context, small again: shapes and addresses change between them.
    picture = pictures()[0]
    for length in (5, 500, 7, 300, 1):
        wanted = pair.graphs.caption(picture, PROMPT, length)
        assert pair.engines.caption(picture, PROMPT, length).tokens == wanted.tokens


def test_a_step_is_captured_once_and_launched_for_every_later_token(pair: Pair) -> None:
    first = pair.engines.caption(pictures()[0], PROMPT, 20)
    assert (pair.memory.captures, len(first.tokens)) == (1, 20)
    # The first token comes from the prefill, the second from the plain run before the capture.
    assert pair.memory.launches == 18
    second = pair.engines.caption(pictures()[2], PROMPT, 20)
    assert (pair.memory.captures, len(second.tokens)) == (1, 20)
    assert pair.memory.launches == 18 + 19


def test_an_engine_that_cannot_be_captured_runs_plainly_and_says_so(
    standard: Path, tmp_path: Path
) -> None:
    pair = open_pair(standard, tmp_path / "e", HostMemory(capturable=False))
    wanted = pair.graphs.caption(pictures()[0], PROMPT, 12).tokens
    assert pair.engines.caption(pictures()[0], PROMPT, 12).tokens == wanted
    note = pair.engines.engine.decoder.step_graph
    assert note.startswith("not captured: CUDA driver") and pair.memory.launches == 0


def test_the_context_ends_where_the_models_does(pair: Pair) -> None:
    wanted = pair.graphs.caption(pictures()[0], PROMPT, 10_000)
    said = pair.engines.caption(pictures()[0], PROMPT, 10_000)
    assert said.tokens == wanted.tokens and not said.stopped
    assert said.prompt_tokens + len(said.tokens) == 512
    pair.engines.engine.step(5)  # the place that the last token of the caption would take
    with pytest.raises(ValueError, match="behind the last position"):
        pair.engines.engine.step(5)


def test_a_step_before_a_prompt_is_an_error(pair: Pair) -> None:
    with pytest.raises(ValueError, match="step before start"):
        pair.engines.engine.step(5)


def test_a_prompt_longer_than_the_engine_takes_is_refused_in_one_line(pair: Pair) -> None:
    with pytest.raises(InputRefused) as error:
        pair.engines.caption(pictures()[0], "word " * 75, 4)
    assert str(error.value) == (
        "engine 'embed_tokens': input_ids of shape [1, 344]; it was built for [1, 1] to [1, 310]: "
        "use another input, or the ONNX graph"
    )
    # And the next one works.
    wanted = pair.graphs.caption(pictures()[0], PROMPT, 4).tokens
    assert pair.engines.caption(pictures()[0], PROMPT, 4).tokens == wanted


def test_another_layout_is_refused(standard: Path, tmp_path: Path) -> None:
    pair = open_pair(standard, tmp_path / "e")
    (tmp_path / "e" / f"{PARTS[2]}.engine").write_bytes(
        (tmp_path / "e" / f"{PARTS[1]}.engine").read_bytes()
    )
    with pytest.raises(InputRefused, match="expected a decoder with prefill and decode"):
        TrtCaptioner(standard / "model", tmp_path / "e", pair.trt, pair.memory)


def test_types_without_numpy_are_refused_by_name(
    pair: Pair, standard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(kind: object) -> object:
        raise TypeError("no numpy type")

    monkeypatch.setattr(pair.trt, "nptype", none)
    with pytest.raises(InputRefused, match="pixel_values of type"):
        TrtCaptioner(standard / "model", tmp_path / "engines", pair.trt, pair.memory)


def test_memory_that_was_never_written_does_not_reach_the_text(pair: Pair) -> None:
    # Fresh memory is full of NaN here; a masked place with NaN would make every logit NaN.
    pair.engines.caption(pictures()[0], PROMPT, 3)
    row = pair.engines.engine.step(7)
    assert np.isfinite(row).all()


@given(
    heads=st.integers(1, 40),
    head_dim=st.integers(1, 160),
    itemsize=st.sampled_from([2, 4]),
    length=st.integers(1, 4097),
)
def test_tensors_of_the_cache_are_aligned_at_any_length(
    heads: int, head_dim: int, itemsize: int, length: int
) -> None:
    layout = CacheLayout(6, heads, head_dim * itemsize)
    assert layout.rows >= heads
    assert all(layout.offset(i, length) % ALIGNMENT == 0 for i in range(6))
    # Rows of all tensors are equally far apart: one strided copy moves a place of all of them.
    assert layout.offset(1, length) == layout.rows * length * layout.width
    assert layout.size(length) == layout.offset(6, length)
    assert layout.rows - heads < ALIGNMENT
