"""`medexport engine build` and `check`: output, exit codes, one line for each error."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import msgspec
import pytest

from exporter.cli.main import run
from exporter.engines.site import site_folder
from exporter.pipeline.evaluation import open_evaluation
from exporter.runtimes.ort import OrtCaptioner
from tests.support.host_memory import FACTS
from tests.support.tensorrt_site import PROMPT, TOKENS, Site

BUILD = ("--cases", "2", "--threads", "1")


@pytest.fixture
def here(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "tiny"))


def test_build_then_check(site: Site, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["engine", "build", str(here), *BUILD, "--level", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    folder = site_folder(here, FACTS)
    assert said[-1] == str(folder)
    assert "self-test: 2 captions as expected (onnx)" in said
    assert "decode step as CUDA graph: captured" in said
    assert site.trt.seen.level == 1
    assert run(["engine", "check", str(here), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "ready": True, "runtime": "tensorrt", "fallback": None, "folder": str(folder),
        "gpu": "NVIDIA Test 1000", "tensorrt": "10.16.1.11",
    }  # fmt: skip
    assert run(["engine", "check", str(here)]) == 0
    assert capsys.readouterr().out.startswith("ready: ")
    assert run(["verify", str(here)]) == 0


def test_build_as_json_is_one_document(
    site: Site, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "elsewhere"
    flags = ["--workspace", "64", "--version-compatible", "--json", "--out", str(out)]
    assert run(["engine", "build", str(here), *BUILD, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(out) and len(found["engines"]) == 3
    assert found["engines"][0]["options"]["workspace"] == 64 << 20
    assert found["engines"][0]["options"]["version_compatible"] is True
    assert [c["differs_at"] for c in found["self_test"]["cases"]] == [None, None]
    assert run(["engine", "check", str(here), "--engines", str(out)]) == 0


def test_captions_of_the_bundles_own_comparison_are_what_is_expected(
    site: Site, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = open_evaluation("phantoms-eval", limit=2, prompt=PROMPT, max_new_tokens=TOKENS).cases
    write_comparison(here, cases, change=0)
    arguments = ["engine", "build", str(here), *BUILD, "--no-verify"]
    assert run(arguments) == 0
    assert "(recorded)" in capsys.readouterr().out
    write_comparison(here, cases, change=1)
    assert run(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 2 golden captions differ" in line and "the engines are deleted" in line


def write_comparison(bundle: Path, cases: object, *, change: int) -> None:
    """compare.json and cases.jsonl as the comparison writes them, with the graph's own captions."""
    from exporter.compare.records import SCHEMA, CaptionRow, CaseRow, Comparison
    from exporter.core.digest import sha256_file
    from exporter.runtimes.images import open_image

    graph = OrtCaptioner(bundle / "model", threads=1)
    rows = []
    for case in cases:
        tokens = graph.caption(open_image(case.image), PROMPT, TOKENS).tokens
        ids = (tokens[0] + change, *tokens[1:])
        caption = CaptionRow("text", len(ids), True, None, None, None, (), ids)
        rows.append(
            CaseRow(
                case.id, case.image.name, case.patient, case.modality, None, None,
                {"fp16": caption}, sha256_file(case.image),
            )
        )  # fmt: skip
    comparison = Comparison(
        schema=SCHEMA, summary="", reference="fp16", prompt=PROMPT, max_new_tokens=TOKENS,
        images=2, patients=2, captioned=2, modalities={}, machine={}, method={}, rows=(),
    )  # fmt: skip
    (bundle / "reports" / "compare.json").write_bytes(msgspec.json.encode(comparison))
    lines = b"".join(msgspec.json.encode(r) + b"\n" for r in rows)
    (bundle / "reports" / "cases.jsonl").write_bytes(lines)


def no_library(site: Site, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "tensorrt", None)


def old_library(site: Site, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    site.trt.__version__ = "8.6.1"


def no_gpu(site: Site, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    site.cuda.devices = 0


def other_dialect(site: Site, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    from exporter.bundle.manifest import encode_manifest, read_manifest

    changed = msgspec.structs.replace(read_manifest(bundle), dialect="ort")
    (bundle / "manifest.json").write_bytes(encode_manifest(changed))


def bundle_of_a_task(site: Site, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    from exporter.bundle.manifest import encode_manifest, read_manifest

    manifest = read_manifest(bundle)
    usage = msgspec.structs.replace(manifest.usage, task="text-encoder")
    changed = msgspec.structs.replace(manifest, usage=usage, dialect="ort")
    (bundle / "manifest.json").write_bytes(encode_manifest(changed))


def no_profiles(site: Site, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    from exporter.bundle.manifest import encode_manifest, list_entries, read_manifest

    (bundle / "reports" / "export.json").unlink()
    changed = msgspec.structs.replace(read_manifest(bundle), files=list_entries(bundle))
    (bundle / "manifest.json").write_bytes(encode_manifest(changed))


def changed_bundle(site: Site, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    (bundle / "sbom.cdx.json").write_text("{}")


def no_bundle(site: Site, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(bundle)


def wrong_captions(site: Site, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    site.trt.disturb = 50.0


def no_kernel(site: Site, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    site.trt.build_fails = "no kernel"


OF_THE_BUNDLE = [
    (other_dialect, "--format tensorrt"),
    (bundle_of_a_task, "a text-encoder model; engines are built for models that caption"),
    (no_profiles, "has no reports/export.json"),
    (no_bundle, "no such folder"),
]
ERRORS = [
    (no_library, 5, "tensorrt-cu12"),
    (old_library, 5, "TensorRT 8.6.1; expected 10.3"),
    (no_gpu, 5, "0 GPUs"),
    (other_dialect, 3, "dialect is 'ort'"),
    (no_profiles, 3, "has no reports/export.json"),
    (changed_bundle, 3, "not what was packaged"),
    (no_bundle, 3, "no such folder"),
    (wrong_captions, 1, "golden captions differ"),
    (no_kernel, 5, "no kernel"),
]


@pytest.mark.parametrize(("change", "code", "says"), ERRORS)
def test_each_way_to_fail_is_one_line_and_leaves_no_engines(
    change: object, code: int, says: str, site: Site, here: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert callable(change)
    change(site, here, monkeypatch)
    assert run(["engine", "build", str(here), *BUILD, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("medexport: ")
    assert not site_folder(here, FACTS).exists()


@pytest.mark.parametrize("command", ["build", "check"])
@pytest.mark.parametrize(("change", "says"), OF_THE_BUNDLE)
def test_the_bundle_is_looked_at_before_the_library(
    command: str, change: object, says: str, site: Site, here: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nobody installs TensorRT to learn that the bundle is not for it."""
    no_library(site, here, monkeypatch)
    assert callable(change)
    change(site, here, monkeypatch)
    assert run(["engine", command, str(here)]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert says in line and "tensorrt-cu12" not in line


def test_check_says_why_not_and_what_is_used_instead(
    site: Site, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["engine", "check", str(here), "--json"]) == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["ready"] is False and found["runtime"] == "onnxruntime"
    assert found["fallback"] in captured.err
    assert "until then the ONNX graphs are used" in captured.err
    assert "run `medexport engine build BUNDLE`" in captured.err
    no_library(site, here, monkeypatch)
    assert run(["engine", "check", str(here)]) == 5
    assert "tensorrt-cu13" in capsys.readouterr().err
    assert run(["engine", "check", str(here / "nothing")]) == 3


def test_wrong_options_are_wrong_usage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--level", "9"], ["--workspace", "0"], ["--cases", "0"]):
        assert run(["engine", "build", str(here), *wrong]) == 2
