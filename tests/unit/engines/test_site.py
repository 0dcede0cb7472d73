"""Rebuild on site, the golden self-test, and the graph as an announced fallback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.bundle.verify import verify_bundle
from exporter.core.errors import EnvironmentLacks, InputRefused, ParityFailed
from exporter.engines.build import build_engines
from exporter.engines.golden import FILE, Golden, GoldenCase, first_difference
from exporter.engines.machine import engine_folder, site_folder
from exporter.engines.options import EngineOptions
from exporter.engines.site import open_captioner, prove_engines, rebuild
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.trt import PARTS, TrtCaptioner
from tests.support.host_memory import FACTS
from tests.support.tensorrt_site import PROMPT, TOKENS, Site, pictures, write_bundle


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.png" for i in range(3)]
    for path, picture in zip(paths, pictures(), strict=True):
        picture.save(path)
    return paths


@pytest.fixture
def golden(images: list[Path]) -> Golden:
    return Golden([GoldenCase(p.stem, p) for p in images], PROMPT, TOKENS)


@pytest.fixture
def fresh(exported: Path, tmp_path: Path) -> Path:
    return write_bundle(exported, tmp_path / "tiny")


def record(bundle: Path) -> Path:
    return bundle / "reports" / "export.json"


def test_a_rebuild_goes_beside_the_bundle_which_still_verifies(
    site: Site, fresh: Path, golden: Golden
) -> None:
    made = rebuild(fresh, record(fresh), golden, threads=1)
    folder = fresh.parent / "tiny.engines" / "nvidia-test-1000-sm89"
    assert made.report.folder == folder == site_folder(fresh, FACTS)
    assert (folder / FILE).is_file() and made.test.passed
    assert made.test.step_graph == "captured"
    assert {c.source for c in made.test.cases} == {"onnx"}
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]
    verify_bundle(fresh)
    assert site.memory.blocks == {}


def test_recorded_tokens_are_believed_over_asking_the_graph(
    site: Site, fresh: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = OrtCaptioner(fresh / "model", threads=1)
    said = [graph.caption(p, PROMPT, TOKENS).tokens for p in pictures()]
    cases = [GoldenCase(p.stem, p, t) for p, t in zip(images, said, strict=True)]
    monkeypatch.delattr("exporter.engines.site.OrtCaptioner")
    made = rebuild(fresh, record(fresh), Golden(cases, PROMPT, TOKENS))
    assert {c.source for c in made.test.cases} == {"recorded"}


def test_engines_that_say_something_else_are_deleted_and_the_earlier_ones_stay(
    site: Site, fresh: Path, golden: Golden
) -> None:
    first = rebuild(fresh, record(fresh), golden, threads=1).report.folder
    before = {p.name: p.read_bytes() for p in first.iterdir()}
    site.trt.disturb = 50.0
    with pytest.raises(
        ParityFailed, match=r"3 of 3 golden captions differ.*'0' at token 0"
    ) as error:
        rebuild(fresh, record(fresh), golden, threads=1)
    assert "the engines are deleted, the ONNX graph stays in use" in str(error.value)
    failed = first.with_name(f"{first.name}.new.{FILE}")
    assert sorted(p.name for p in first.parent.iterdir()) == [first.name, failed.name]
    assert [c["differs_at"] for c in json.loads(failed.read_text())["cases"]] == [0, 0, 0]
    assert {p.name: p.read_bytes() for p in first.iterdir()} == before
    assert site.memory.blocks == {}


def test_the_first_difference_is_reported_with_how_sure_the_engine_was(
    site: Site, exported: Path, tmp_path: Path, images: list[Path]
) -> None:
    graph = OrtCaptioner(exported / "model", threads=1)
    picture = pictures()[0]
    said = graph.caption(picture, PROMPT, TOKENS).tokens
    changed = (*said[:2], (said[2] + 1) % 200, *said[3:])
    golden = Golden([GoldenCase("a", images[0], changed)], PROMPT, TOKENS)
    report = build_engines(exported / "model", exported / "export.json", tmp_path / "e")
    logits = graph.score(picture, PROMPT, said[:2])[-1]
    gap = logits[said[2]] - logits[changed[2]]
    with pytest.raises(ParityFailed, match=rf"'a' at token 2, .* by {gap:.3g} logits"):
        prove_engines(exported / "model", report, golden)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("said", "expected", "where"),
    [
        ((1, 2, 3), (1, 2, 3), None),
        ((1, 2, 3), (1, 9, 3), 1),
        ((1, 2), (1, 2, 3), 2),
        ((1, 2, 3), (1,), 1),
        ((), (), None),
        ((), (4,), 0),
    ],
)
def test_where_two_captions_part(
    said: tuple[int, ...], expected: tuple[int, ...], where: int | None
) -> None:
    assert first_difference(said, expected) == where


def test_without_golden_cases_nothing_is_put_in_place(site: Site, fresh: Path) -> None:
    with pytest.raises(InputRefused, match="no golden cases"):
        rebuild(fresh, record(fresh), Golden([], PROMPT, TOKENS))
    assert list((fresh.parent / "tiny.engines").iterdir()) == []


def test_engines_are_used_where_they_pass(site: Site, fresh: Path, golden: Golden) -> None:
    rebuild(fresh, record(fresh), golden, threads=1)
    lines: list[str] = []
    with open_captioner(fresh, announce=lines.append) as opened:
        assert (opened.runtime, opened.fallback) == ("tensorrt", "")
        assert isinstance(opened.captioner, TrtCaptioner)
        said = opened.captioner.caption(pictures()[0], PROMPT, TOKENS)
    assert lines == [] and site.memory.blocks == {}
    assert said.tokens == OrtCaptioner(fresh / "model", threads=1).caption(
        pictures()[0], PROMPT, TOKENS
    ).tokens  # fmt: skip


def test_the_fallback_is_announced(
    site: Site, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with open_captioner(fresh, threads=1, announce=lines.append) as opened:
        assert opened.runtime == "onnxruntime" and "no engines for" in opened.fallback
        assert isinstance(opened.captioner, OrtCaptioner)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with open_captioner(fresh, threads=1, announce=lines.append) as opened:
        assert "'tensorrt' is not installed" in opened.fallback
    assert all(line.startswith("not TensorRT but the ONNX graph") for line in lines)
    assert len(lines) == 2 and not any("\n" in line for line in lines)


def test_a_failure_while_captioning_is_no_reason_to_fall_back(
    site: Site, fresh: Path, golden: Golden
) -> None:
    rebuild(fresh, record(fresh), golden, threads=1)
    lines: list[str] = []

    def fail() -> None:
        with open_captioner(fresh, announce=lines.append):
            raise EnvironmentLacks("the GPU was unplugged")

    with pytest.raises(EnvironmentLacks, match="unplugged"):
        fail()
    assert lines == [] and site.memory.blocks == {}


def test_the_bundles_own_engines_are_used_until_the_site_builds_some(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    assert engine_folder(bundle, FACTS) == site_folder(bundle, FACTS)
    packaged = bundle / "model" / "engines" / FACTS.slug
    packaged.mkdir(parents=True)
    assert engine_folder(bundle, FACTS) == packaged
    site_folder(bundle, FACTS).mkdir(parents=True)
    assert engine_folder(bundle, FACTS) == site_folder(bundle, FACTS)


def test_streamed_weights_keep_a_budget_and_no_cuda_graph(
    site: Site, fresh: Path, golden: Golden
) -> None:
    site.trt.streams_weights = True
    made = rebuild(
        fresh, record(fresh), golden, options=EngineOptions(weight_streaming=True), threads=1
    )
    assert made.test.step_graph == "not captured: the engine streams its weights"
    assert site.memory.captures == 0


def test_the_self_test_file_says_what_was_asked(site: Site, fresh: Path, golden: Golden) -> None:
    made = rebuild(fresh, record(fresh), golden, threads=1)
    found = json.loads((made.report.folder / FILE).read_text())
    assert found["prompt"] == PROMPT and found["max_new_tokens"] == TOKENS
    assert set(found["engines"]) == set(PARTS)
    assert [c["differs_at"] for c in found["cases"]] == [None] * 3
    assert np.all([c["tokens"] > 0 for c in found["cases"]])
