"""The whole comparison on a small real model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from exporter.compare import process
from exporter.compare.candidates import Candidate, part_bytes
from exporter.compare.compare import Plan, compare_models, read_comparison, write_reports
from exporter.compare.quality.rouge import rouge1
from exporter.compare.records import Comparison
from exporter.compare.speed import SpeedPlan
from exporter.compare.table import comparison_table
from exporter.core.cases import Case
from exporter.core.errors import InputRefused, WrongUsage
from exporter.runtimes.images import open_image
from tests.unit.compare.conftest import PROMPT, Models

TOKENS = 10
QUICK = Plan(SpeedPlan(rounds=2, seconds=1.0, fewest=2, most=2))
SILENT = Plan(SpeedPlan(seconds=0.0))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def run(models: Models, cases: tuple[Case, ...], work: Path) -> Callable[[], Comparison]:
    candidates = [
        Candidate("fp16", models.fp16),
        Candidate("int8", models.int8),
        Candidate("wrong", models.other),
    ]

    def compare() -> Comparison:
        return compare_models(candidates, cases, PROMPT, TOKENS, work, threads=2, plan=QUICK)

    return compare


@pytest.fixture(scope="module")
def comparison(run: Callable[[], Comparison]) -> Comparison:
    return run()


def test_rows_and_counts(comparison: Comparison, cases: tuple[Case, ...]) -> None:
    assert [(r.name, r.role) for r in comparison.rows] == [
        ("fp16", "reference"),
        ("noise floor", "noise floor"),
        ("int8", "candidate"),
        ("wrong", "candidate"),
    ]
    assert (comparison.images, comparison.patients, comparison.captioned) == (4, 2, 4)
    assert comparison.modalities == {"ct": 2, "mri": 2}
    assert comparison.row("noise floor").threads == 1
    assert comparison.row("fp16").threads == 2


def test_captions_and_kl_are_those_of_the_runtime_asked_directly(
    comparison: Comparison, models: Models, cases: tuple[Case, ...]
) -> None:
    from exporter.runtimes.ort import OrtCaptioner

    reference, candidate = (
        OrtCaptioner(models.fp16, threads=1),
        OrtCaptioner(models.int8, threads=1),
    )
    all_kl = []
    for case, row in zip(cases, comparison.cases, strict=True):
        image = open_image(case.image)
        said = reference.caption(image, PROMPT, TOKENS)
        assert row.captions["fp16"].text == said.text
        assert case.caption is not None
        assert row.captions["fp16"].rouge1 == rouge1(case.caption, said.text)
        p = special.softmax(reference.score(image, PROMPT, said.tokens).astype(float), -1)
        q = special.softmax(candidate.score(image, PROMPT, said.tokens).astype(float), -1)
        all_kl.append(stats.entropy(p, q, axis=-1))
        assert row.captions["int8"].kl_mean == pytest.approx(all_kl[-1].mean(), rel=1e-3)
    found = comparison.row("int8").distribution
    assert found is not None
    assert found.tokens == sum(map(len, all_kl))
    assert found.kl_mean == pytest.approx(np.concatenate(all_kl).mean(), rel=1e-3)


def test_the_noise_floor_is_far_below_and_the_wrong_model_far_above(comparison: Comparison) -> None:
    floor, int8, wrong = (comparison.row(n).distribution for n in ("noise floor", "int8", "wrong"))
    assert floor is not None
    assert int8 is not None
    assert wrong is not None
    assert floor.kl_mean < 1e-6
    assert floor.identical == 4
    assert floor.kl_mean < int8.kl_mean < wrong.kl_mean
    assert wrong.kl_mean > 100 * int8.kl_mean


def test_speed_and_memory_are_measured_in_interleaved_processes(
    comparison: Comparison, work: Path
) -> None:
    for name in ("fp16", "int8", "wrong"):
        row = comparison.row(name)
        assert row.speed is not None
        assert row.memory is not None
        assert (row.speed.runs, row.speed.rounds, row.memory.processes) == (4, 2, 2)
        assert 0 < row.speed.first_token <= row.speed.total
        assert row.speed.total_p90 is None, "four runs give no percentile"
        assert row.memory.peak is not None
        assert row.memory.unique is not None
        assert row.memory.unique <= row.memory.peak
    assert comparison.row("noise floor").speed is None
    order = sorted(work.glob("*-speed-*/result.json"), key=lambda p: p.stat().st_mtime_ns)
    assert [p.parent.name for p in order] == [
        "fp16-speed-0", "int8-speed-0", "wrong-speed-0",
        "fp16-speed-1", "int8-speed-1", "wrong-speed-1",
    ]  # fmt: skip


def test_bytes_are_those_on_disk(comparison: Comparison, models: Models) -> None:
    row = comparison.row("int8")
    files = [p for p in models.int8.rglob("*") if p.is_file()]
    assert row.bytes == sum(p.stat().st_size for p in files)
    assert set(row.parts) == {"vision_encoder", "embed_tokens", "decoder_model_merged", "files"}
    assert row.ratio == row.bytes / comparison.row("fp16").bytes
    assert part_bytes(Candidate("t", models.source, "torch"))["weights"] > 0


def test_a_finished_run_starts_no_process_again(
    run: Callable[[], Comparison], comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(process.subprocess, "Popen", refuse)
    assert run() == comparison


def test_no_logits_are_left(comparison: Comparison, work: Path) -> None:
    assert not list(work.rglob("*.npy"))


def test_reports_are_written_and_read(comparison: Comparison, tmp_path: Path) -> None:
    write_reports(comparison, tmp_path, {"base": "tiny <b>&", "adapters": []})
    found = read_comparison(tmp_path / "compare.json")
    assert found.rows == comparison.rows
    lines = (tmp_path / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 4
    assert first["image"] == "0.png"
    assert first["captions"]["int8"]["text"] == comparison.cases[0].captions["int8"].text
    everything = "".join(p.read_text(encoding="utf-8") for p in tmp_path.iterdir())
    assert str(Path(comparison.cases[0].image).parent) not in everything
    assert "tiny &lt;b&gt;&amp;" in everything


def test_the_table_names_every_row_and_its_cases(comparison: Comparison) -> None:
    table = comparison_table(comparison)
    for name in ("fp16", "noise floor", "int8", "wrong"):
        assert f"\n{name} " in table
    unwrapped = " ".join(table.split())
    assert "4 images of 2 patients" in unwrapped
    assert "smoke test" in unwrapped
    assert "1 instead of 2 threads" in unwrapped
    assert max(map(len, table.splitlines())) <= 100


class _Tags(HTMLParser):
    """Collects tags and refuses unbalanced ones."""

    VOID = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_accessible_self_contained_page(
    comparison: Comparison, tmp_path: Path
) -> None:
    write_reports(comparison, tmp_path, {"base": "tiny"})
    parser = _Tags()
    parser.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not parser.open
    assert ("html", {"lang": "en"}) in parser.seen
    for tag, attributes in parser.seen:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,"))
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    ids = [a["id"] for _, a in parser.seen if "id" in a]
    targets = [(a.get("href") or "")[1:] for tag, a in parser.seen if tag == "a"]
    assert len(ids) == len(set(ids))
    assert set(targets) <= set(ids)
    assert sum(tag == "h1" for tag, _ in parser.seen) == 1
    assert any(tag == "img" for tag, _ in parser.seen)


def test_without_ground_truth_only_the_reference_is_compared_with(
    models: Models, cases: tuple[Case, ...], tmp_path: Path
) -> None:
    bare = [replace(c, caption=None) for c in cases[:2]]
    candidates = [Candidate("fp16", models.fp16), Candidate("int8", models.int8)]
    found = compare_models(candidates, bare, PROMPT, 4, tmp_path, threads=1, plan=SILENT)
    row = found.row("int8")
    assert found.captioned == 0
    assert row.rouge1 is row.truth is row.recall_difference is row.speed is None
    assert row.moved is not None
    assert row.distribution is not None
    assert found.method["speed"] == "not measured"
    assert found.row("noise floor").threads == 2
    comparison_table(found)
    write_reports(found, tmp_path, {})


def test_another_model_under_the_same_name_is_measured_again(
    models: Models, cases: tuple[Case, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    candidates = [Candidate("fp16", models.fp16), Candidate("new", folder)]

    def kl() -> float:
        found = compare_models(
            candidates, cases[:1], PROMPT, 4, tmp_path / "work", threads=1, plan=SILENT
        )
        scored = found.row("new").distribution
        assert scored is not None
        return scored.kl_mean

    shutil.copytree(models.int8, folder)
    first = kl()
    shutil.rmtree(folder)
    shutil.copytree(models.other, folder)
    assert kl() > 10 * first


def test_logits_beyond_the_disk_budget_are_not_scored_and_n_says_so(
    models: Models, cases: tuple[Case, ...], tmp_path: Path
) -> None:
    vocabulary = json.loads((models.fp16 / "config.json").read_text())["text_config"]["vocab_size"]
    budget = Plan(SpeedPlan(seconds=0.0), logits_bytes=2 * 5 * vocabulary * 4)
    candidates = [Candidate("fp16", models.fp16), Candidate("int8", models.int8)]
    found = compare_models(candidates, cases, PROMPT, 4, tmp_path, threads=1, plan=budget)
    scored = found.row("int8").distribution
    assert scored is not None
    assert (scored.images, scored.captions) == (2, 4)


def test_usage_errors(models: Models, cases: tuple[Case, ...], tmp_path: Path) -> None:
    def compare(names: list[str], chosen: tuple[Case, ...] = cases) -> None:
        candidates = [Candidate(n, models.fp16) for n in names]
        compare_models(candidates, chosen, PROMPT, 4, tmp_path, threads=1, plan=SILENT)

    for names in ([], ["a", "a"], ["noise floor"], ["../a"]):
        with pytest.raises(WrongUsage):
            compare(names)
    with pytest.raises(WrongUsage, match="no cases"):
        compare(["a"], ())
    with pytest.raises(InputRefused, match="same id"):
        compare(["a"], (cases[0], cases[0]))
    with pytest.raises(InputRefused, match="no such image"):
        compare(["a"], (replace(cases[0], image=tmp_path / "none.png"),))


def test_other_schemas_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    path.write_text('{"schema": 99}', encoding="utf-8")
    with pytest.raises(InputRefused, match="schema"):
        read_comparison(path)


@pytest.mark.slow
def test_torch_and_the_float_export_are_the_same_model(
    models: Models, cases: tuple[Case, ...], tmp_path: Path
) -> None:
    candidates = [Candidate("torch", models.source, "torch"), Candidate("fp16", models.fp16)]
    found = compare_models(candidates, cases[:1], PROMPT, 6, tmp_path, threads=1, plan=SILENT)
    row = found.row("fp16")
    assert row.distribution is not None
    assert row.distribution.kl_mean < 1e-9
    assert row.distribution.identical == 1
    assert found.row("torch").parts.keys() == {"weights", "files"}
    assert "transformers" in found.row("torch").versions
