from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from exporter.compare.parity import check_parity, logit_error, relative_error
from exporter.core.cases import Case
from exporter.core.errors import ParityFailed, WrongUsage
from tests.unit.compare.conftest import PROMPT, Models


def check(
    models: Models, cases: tuple[Case, ...], exported: Path, **candidates: tuple[Path, Path]
) -> dict:
    report = check_parity(models.source, exported, candidates, cases, PROMPT, 12, threads=1)
    return report.to_json()


def test_true_exports_pass(models: Models, cases: tuple[Case, ...]) -> None:
    found = check(
        models,
        cases,
        models.fp32,
        fp16=(models.source, models.fp16),
        int8=(models.int8_weights, models.int8),
    )
    errors = {(c["model"], c["graph"]): c["relative_error"] for c in found["checks"]}
    assert set(errors) == {
        (model, graph)
        for model in ("fp32 export", "fp16", "int8")
        for graph in ("vision_encoder", "decoder_model_merged")
    }
    assert errors["fp32 export", "decoder_model_merged"] < 1e-5
    assert errors["fp16", "decoder_model_merged"] < 1e-5
    assert 1e-5 < errors["int8", "decoder_model_merged"] < 0.1
    assert found["captions"] == 4
    assert len(found["tile_counts"]) > 1
    assert len(found["prompt_lengths"]) > 2
    assert "identical to torch on 4 images" in found["summary"]


@pytest.mark.parametrize("graph", ["vision_encoder", "decoder_model_merged"])
def test_one_wrong_graph_is_named(
    models: Models, cases: tuple[Case, ...], tmp_path: Path, graph: str
) -> None:
    broken = tmp_path / "model"
    copytree(models.fp16, broken)
    for file in (models.other / "onnx").glob(f"{graph}*"):
        (broken / "onnx" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ParityFailed, match=rf"{graph} of fp16 on case c\d .*expected at most 0.0002"
    ):
        check(models, cases, models.fp32, fp16=(models.source, broken))


def test_int8_weights_under_another_models_name_fail(
    models: Models, cases: tuple[Case, ...]
) -> None:
    with pytest.raises(ParityFailed, match="of int8 on case"):
        check(models, cases, models.fp32, int8=(models.int8_weights, models.other))


def test_another_model_as_float32_export_fails(models: Models, cases: tuple[Case, ...]) -> None:
    with pytest.raises(ParityFailed, match="of fp32 export"):
        check(models, cases, models.other)


def test_without_cases(models: Models) -> None:
    with pytest.raises(WrongUsage, match="at least one image"):
        check(models, (), models.fp32)


def test_errors_are_relative_and_infinite_for_what_is_not_finite() -> None:
    a = np.array([[3.0, 4.0]])
    assert relative_error(a, a * 1.1) == pytest.approx(0.1)
    assert relative_error(a, np.array([[3.0, np.nan]])) == float("inf")
    assert relative_error(a, a[:, :1]) == float("inf")
    assert logit_error(a, a + 5) < 1e-12
