"""Whole comparisons of small real models, one process each: what is written, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest

from exporter.compare.speed import SpeedPlan
from exporter.compare.tasks.comparison import (
    TaskComparison,
    compare_tasks,
    read_task_comparison,
)
from exporter.compare.tasks.jobs import TaskJob, TaskJobCase, read_array, run_task_job
from exporter.compare.tasks.records import TaskCase
from exporter.core.errors import GateFailed, GateInconclusive, InputRefused, WrongUsage
from exporter.core.text_cases import TextCase
from tests.unit.compare.tasks.fakes import image_cases

pytest.importorskip("torch")

QUICK = SpeedPlan(rounds=1, seconds=0.1, most=3)
NO_SPEED = SpeedPlan(seconds=0.0)


@dataclass(frozen=True)
class Models:
    """A tiny CLIP as it is and with 8-bit weights, another CLIP, and a classifier of texts."""

    fp16: Path
    int8: Path
    other: Path
    classifier: Path


def exported(source: Path, out: Path) -> Path:
    from exporter.graphs.export import export_model

    out.mkdir()
    export_model(source, out, float_storage="float16")
    return out / "model"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    from exporter.quantizers.run import quantize_model
    from exporter.quantizers.schemes import SCHEMES
    from tests.support.tiny_bert import write_tiny_bert
    from tests.support.tiny_clip import write_tiny_clip

    root = tmp_path_factory.mktemp("models")
    source, other = write_tiny_clip(root / "source"), write_tiny_clip(root / "other", seed=1)
    quantized = root / "quantized"
    quantized.mkdir()
    quantize_model(source, quantized, SCHEMES["int8"], threads=1)
    names = {"0": "normal", "1": "abnormal"}
    classifier = write_tiny_bert(
        root / "classifier",
        architecture="BertForSequenceClassification",
        id2label=names,
        label2id={v: int(k) for k, v in names.items()},
    )
    return Models(
        fp16=exported(source, root / "fp16"),
        int8=exported(quantized, root / "int8"),
        other=exported(other, root / "other-fp16"),
        classifier=exported(classifier, root / "classifier-fp16"),
    )


@dataclass(frozen=True)
class Done:
    """A comparison and where its files are."""

    comparison: TaskComparison
    out: Path


@pytest.fixture(scope="module")
def done(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Done:
    cases = image_cases(tmp_path_factory.mktemp("images"), 18)
    out = tmp_path_factory.mktemp("out")
    candidates = {"int8": models.int8, "fp16": models.fp16, "other": models.other}
    comparison = compare_tasks(
        "zero-shot", candidates, "fp16", cases, out,
        threads=1, speed=QUICK, lineage={"base": "a <tiny> model"},
    )  # fmt: skip
    return Done(comparison, out)


def test_every_model_has_a_row_and_a_verdict(done: Done) -> None:
    c = done.comparison
    assert [r.name for r in c.rows] == ["fp16", "noise floor", "int8", "other"]
    assert [r.role for r in c.rows] == ["reference", "noise floor", "candidate", "candidate"]
    assert [g.candidate for g in c.gates] == ["int8", "other", "noise floor"]
    assert (c.count, c.patients, c.unit) == (18, 9, "images")
    assert c.row("int8").ratio < 0.9 and c.row("noise floor").ratio == 1.0
    assert c.row("fp16").figures["worst cosine"].value == 1.0
    assert c.row("int8").figures["worst cosine"].value > 0.99
    assert c.row("noise floor").figures["worst cosine"].value > 1 - 1e-6


def test_speed_and_memory_are_of_each_model_alone(done: Done) -> None:
    for name in ("fp16", "int8", "other"):
        row = done.comparison.row(name)
        assert row.speed is not None and row.memory is not None
        assert set(row.speed.steps) == {"image", "text"}
        assert row.speed.steps["image"].runs == 3 and row.speed.steps["image"].median > 0
    assert done.comparison.row("noise floor").speed is None


def test_verdicts_are_exit_codes(done: Done) -> None:
    with pytest.raises(GateFailed, match="'other' against 'fp16': FAIL .*image vectors") as failed:
        done.comparison.enforce("other")
    assert failed.value.exit_code == 1
    verdict = done.comparison.gate("noise floor").verdict
    assert verdict == "INCONCLUSIVE"  # 18 images decide nothing
    with pytest.raises(GateInconclusive, match="149 would decide") as open_:
        done.comparison.enforce("noise floor")
    assert open_.value.exit_code == 4
    done.comparison.enforce("noise floor", smoke=True)


def test_the_files_are_those_of_a_bundle(done: Done) -> None:
    names = sorted(p.name for p in done.out.iterdir())
    assert names == ["cases.jsonl", "compare.json", "junit.xml", "report.html"]
    read = read_task_comparison(done.out / "compare.json")
    assert read == msgspec.structs.replace(done.comparison, cases=())
    lines = (done.out / "cases.jsonl").read_bytes().splitlines()
    cases = [msgspec.json.decode(line, type=TaskCase) for line in lines]
    assert [c.id for c in cases] == [f"c{i:03d}" for i in range(18)]
    assert cases[0].image == "000.png" and set(cases[0].answers) == {
        "fp16", "noise floor", "int8", "other",
    }  # fmt: skip


def test_another_schema_is_refused(done: Done, tmp_path: Path) -> None:
    found = json.loads((done.out / "compare.json").read_bytes())
    (tmp_path / "compare.json").write_text(json.dumps(found | {"schema": 99}), "utf-8")
    with pytest.raises(InputRefused, match="schema 99; expected 1"):
        read_task_comparison(tmp_path / "compare.json")
    (tmp_path / "compare.json").write_text("{}", "utf-8")
    with pytest.raises(InputRefused, match="not a task comparison"):
        read_task_comparison(tmp_path / "compare.json")


def test_the_table_fits_and_begins_with_the_verdict(done: Done) -> None:
    lines = done.comparison.to_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert re.match(r"(PASS|FAIL|INCONCLUSIVE) \(smoke test\): int8 against fp16", lines[0])
    assert any(line.startswith("ms per image") for line in lines)
    rows = [line for line in lines if line.startswith("retrieval image-text recall@")]
    assert [row.split("@")[1].split()[0] for row in rows] == ["1", "5", "10"]


def test_the_report_is_whole_and_safe(done: Done) -> None:
    page = (done.out / "report.html").read_text("utf-8")
    titles = re.findall(r"<h2 [^>]*>(.*?)</h2>", page)
    assert titles[:3] == ["Verdict", "Summary", "What changed"]
    assert titles[-1] == "For the person who signs"
    assert "a &lt;tiny&gt; model" in page and "<tiny>" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert all("alt=" in tag for tag in re.findall(r"<img [^>]*>", page))


def test_junit_counts_what_it_holds(done: Done) -> None:
    root = ET.fromstring((done.out / "junit.xml").read_bytes())
    suites = root.findall("testsuite")
    assert len(suites) == 3 and "other against fp16 (FAIL" in str(suites[1].get("name"))
    assert int(str(suites[1].get("failures"))) == len(suites[1].findall("testcase/failure")) > 0
    # A smoke test leaves things open, and that is no error.
    assert root.get("errors") == "0"
    assert int(str(root.get("tests"))) == len(root.findall(".//testcase"))


def job(model: Path, image: Path, folder: Path) -> TaskJob:
    case = TaskJobCase("c", "0" * 64, image=str(image))
    return TaskJob(
        task="zero-shot", name="m", role="candidate", model_dir=str(model), model_sha256="0" * 64,
        threads=1, cases=(case,), folder=str(folder), labels=("ct", "mri"), texts=("a cyst",),
    )  # fmt: skip


def test_a_process_gives_what_the_runtime_gives_and_is_not_run_twice(
    models: Models, tmp_path: Path
) -> None:
    from exporter.runtimes.graphs import OrtGraphs
    from exporter.runtimes.images import open_image
    from exporter.runtimes.tasks.zero_shot import ZeroShot

    image = image_cases(tmp_path, 1)[0].image
    asked = job(models.fp16, image, tmp_path / "work")
    result = run_task_job(asked)
    model = ZeroShot(OrtGraphs(models.fp16, threads=1))
    np.testing.assert_allclose(
        read_array(tmp_path / "work", "images"), model.embed_images([open_image(image)]), atol=1e-6
    )
    np.testing.assert_allclose(
        read_array(tmp_path / "work", "texts"), model.embed_texts(["a cyst"]), atol=1e-6
    )
    assert result.scale == pytest.approx(model.logit_scale)
    (tmp_path / "work" / "request.json").unlink()
    assert run_task_job(asked) == result
    assert not (tmp_path / "work" / "request.json").exists()
    # Another model under the same name is asked anew.
    other = msgspec.structs.replace(asked, model_sha256="1" * 64)
    assert run_task_job(other).job != result.job


def test_what_a_process_refuses_is_said_in_its_words(models: Models, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="candidate process of 'm': .*none.png: No such file"):
        run_task_job(job(models.fp16, tmp_path / "none.png", tmp_path / "work"))


def test_texts_with_a_classification_head(models: Models, tmp_path: Path) -> None:
    texts = [
        TextCase(f"t{i}", f"a lesion of {i} mm", f"p{i}", label=("normal", "abnormal")[i % 2])
        for i in range(4)
    ]
    comparison = compare_tasks(
        "text-encoder", {"fp16": models.classifier}, "fp16", texts, tmp_path,
        threads=1, speed=NO_SPEED,
    )  # fmt: skip
    floor = comparison.row("noise floor")
    assert floor.figures["label agreement"].value == 1.0 and "auroc" in floor.figures
    assert comparison.method["speed"] == "not measured"
    assert "texts" in comparison.to_text()


def test_masks_of_a_real_model(tmp_path: Path) -> None:
    from tests.support.tiny_clipseg import write_tiny_clipseg

    model = exported(write_tiny_clipseg(tmp_path / "source"), tmp_path / "fp16")
    (tmp_path / "out").mkdir()
    comparison = compare_tasks(
        "segmentation", {"fp16": model, "same": model}, "fp16", image_cases(tmp_path, 2),
        tmp_path / "out", threads=1, speed=NO_SPEED,
    )  # fmt: skip
    assert comparison.row("same").figures["worst Dice with reference"].value == 1.0
    assert comparison.labels == ("ct", "nodule")
    assert (
        comparison.cases[1].text == "nodule"
        and "pixels" in comparison.cases[1].answers["same"].said
    )


def test_summaries_of_a_real_model(tmp_path: Path) -> None:
    from tests.support.tiny_t5 import write_tiny_t5

    model = exported(write_tiny_t5(tmp_path / "source", n_positions=256), tmp_path / "fp16")
    texts = [
        TextCase(
            f"t{i}", f"CT of the chest. A nodule of {i} mm.", f"p{i}", summary=f"{i} mm nodule."
        )
        for i in range(2)
    ]
    (tmp_path / "out").mkdir()
    comparison = compare_tasks(
        "summary", {"fp16": model}, "fp16", texts, tmp_path / "out",
        prompt="summarize:", max_new_tokens=6, threads=1, speed=NO_SPEED,
    )  # fmt: skip
    floor = comparison.row("noise floor")
    assert floor.figures["identical"].value == 1.0 and floor.figures["KL"].value < 1e-6
    assert floor.figures["tokens"].value <= 6 and "ROUGE-1" in floor.differences


def test_wrong_questions(models: Models, tmp_path: Path) -> None:
    cases = image_cases(tmp_path, 2)
    folder = {"fp16": models.fp16}
    with pytest.raises(WrongUsage, match="no model 'int8'"):
        compare_tasks("zero-shot", folder, "int8", cases, tmp_path, threads=1)
    with pytest.raises(WrongUsage, match="expected one {} for the label"):
        compare_tasks("zero-shot", folder, "fp16", cases, tmp_path, prompt="a photo", threads=1)
    with pytest.raises(WrongUsage, match="expected at least one, of texts"):
        compare_tasks("summary", folder, "fp16", cases, tmp_path, threads=1)
    with pytest.raises(InputRefused, match="same id"):
        compare_tasks("zero-shot", folder, "fp16", [*cases, cases[0]], tmp_path, threads=1)
