"""A bundle notices every change: bytes, names, links, extra files, and its own manifest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.bundle.manifest import (
    MANIFEST,
    SIGNATURE,
    Lineage,
    Source,
    Usage,
    encode_manifest,
    read_manifest,
)
from exporter.bundle.package import BundleParts, package
from exporter.bundle.sign import sign_bundle, write_keys
from exporter.bundle.verify import verify_bundle
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused


def write_parts(folder: Path) -> BundleParts:
    onnx = folder / "exported" / "model" / "onnx"
    onnx.mkdir(parents=True)
    (onnx / "decoder_model_merged.onnx").write_bytes(bytes(range(256)) * 3)
    (onnx / "embed_tokens.onnx").write_bytes(b"embedding")
    (onnx.parent / "config.json").write_text('{"model_type": "idefics3"}')
    layer = {"name": "a.weight", "bits": 4, "block": 32, "symmetric": False, "method": "rtn-mse"}
    plan = {"layers": [layer], "floats": [{"name": "n", "reason": "norm"}]}
    (folder / "exported" / "quantization.json").write_bytes(canonical_json(plan))
    export = {"dialect": "ort", "float_storage": "float16", "bits": {"a.weight": 4, "n": 16}}
    (folder / "exported" / "export.json").write_bytes(canonical_json(export))
    (folder / "parity.json").write_text("{}")
    return BundleParts(
        name="test",
        exported=folder / "exported",
        scheme="int4-rtn",
        target="cpu-avx2",
        usage=Usage(family="idefics3", prompt="Describe.", max_new_tokens=8),
        lineage=Lineage(
            base=Source(name="base", sha256="0" * 64, details={"licence": "apache-2.0"}),
            adapters=(Source(name="lora", sha256="1" * 64),),
        ),
        tools={"medexport": "0", "numpy": "2"},
        checks={"parity": "16 cases identical", "comparison": "not run"},
        statement="Drawings.",
        reports={"parity.json": folder / "parity.json"},
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    out = folder / "out"
    out.mkdir()
    package(out, write_parts(folder))
    return out


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_an_untouched_bundle_verifies(bundle: Path) -> None:
    found = verify_bundle(bundle)
    on_disk = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert {e.path for e in found.manifest.files} | {MANIFEST} == on_disk
    assert found.files == 6 and not found.signed and found.signer is None
    assert found.manifest.lineage.adapters[0].name == "lora"


def test_two_packagings_are_byte_identical(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    package(tmp_path / "again", write_parts(tmp_path))
    for path in sorted(p for p in bundle.rglob("*") if p.is_file()):
        assert (tmp_path / "again" / path.relative_to(bundle)).read_bytes() == path.read_bytes()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_is_found(bundle: Path, data: st.DataObject) -> None:
    files = sorted(p for p in bundle.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    change = data.draw(st.integers(1, 255))
    changed = bytearray(original)
    changed[place] ^= change
    try:
        path.write_bytes(bytes(changed))
        with pytest.raises(InputRefused):
            verify_bundle(bundle)
    finally:
        path.write_bytes(original)
    assert verify_bundle(bundle).files == 6


@pytest.mark.parametrize("size", [0, 1, 5])
def test_truncated_and_missing_files_are_named(copy: Path, size: int) -> None:
    target = copy / "model/onnx/embed_tokens.onnx"
    target.write_bytes(b"embedding"[:size])
    with pytest.raises(InputRefused, match="embed_tokens.onnx has"):
        verify_bundle(copy)
    target.unlink()
    with pytest.raises(InputRefused, match="embed_tokens.onnx is missing"):
        verify_bundle(copy)


def test_an_added_file_is_named(copy: Path) -> None:
    (copy / "model" / "extra.py").write_text("print()")
    with pytest.raises(InputRefused, match=r"model/extra\.py is not in the manifest"):
        verify_bundle(copy)


def test_links_are_refused(copy: Path, tmp_path: Path) -> None:
    target = copy / "model/onnx/embed_tokens.onnx"
    outside = tmp_path / "outside"
    shutil.copyfile(target, outside)
    target.unlink()
    target.symlink_to(outside)
    with pytest.raises(InputRefused, match="link or special file"):
        verify_bundle(copy)
    target.unlink()
    os.link(outside, target)
    with pytest.raises(InputRefused, match="2 hard links"):
        verify_bundle(copy)


def test_a_linked_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "model/onnx", tmp_path / "onnx")
    (copy / "model/onnx").symlink_to(tmp_path / "onnx")
    with pytest.raises(InputRefused, match="not in the manifest|link or special"):
        verify_bundle(copy)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "model\\x", "./model"])
def test_paths_that_leave_the_bundle_are_refused(copy: Path, path: str) -> None:
    import msgspec

    manifest = read_manifest(copy)
    entry = msgspec.structs.replace(manifest.files[0], path=path)
    bad = msgspec.structs.replace(manifest, files=(entry, *manifest.files[1:]))
    (copy / MANIFEST).write_bytes(encode_manifest(bad))
    with pytest.raises(InputRefused, match="leaves the bundle"):
        verify_bundle(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: {**m, "schema": 99}, "schema 99"),
        (lambda m: {**m, "scheme": "fp16"}, "own digest"),
        (lambda m: {**m, "surprise": 1}, "unknown field"),
        (lambda m: {**m, "files": "none"}, "Expected `array`"),
        (lambda m: {k: v for k, v in m.items() if k != "lineage"}, "missing required field"),
    ],
)
def test_changed_manifests_are_explained(copy: Path, change: object, words: str) -> None:
    manifest = json.loads((copy / MANIFEST).read_bytes())
    (copy / MANIFEST).write_bytes(canonical_json(change(manifest)))  # type: ignore[operator]
    with pytest.raises(InputRefused, match=words):
        verify_bundle(copy)


def test_signature_is_checked_by_us_and_by_openssl(copy: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "release")
    assert private.stat().st_mode & 0o777 == 0o600
    signer = sign_bundle(copy, private)
    assert verify_bundle(copy, public).signer == signer
    assert verify_bundle(copy).signed
    if shutil.which("openssl"):
        command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
        command += ["-in", copy / MANIFEST, "-sigfile", copy / SIGNATURE]
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    _, other = write_keys(tmp_path / "other")
    with pytest.raises(InputRefused, match="was not made by"):
        verify_bundle(copy, other)
    (copy / SIGNATURE).unlink()
    with pytest.raises(InputRefused, match="not signed"):
        verify_bundle(copy, public)
    with pytest.raises(InputRefused, match="never overwritten"):
        write_keys(tmp_path / "release")


def test_a_resealed_manifest_passes_without_a_key_but_not_with_one(
    copy: Path, tmp_path: Path
) -> None:
    """Why signatures: an attacker who rewrites the manifest is caught by the key alone."""
    import msgspec

    private, public = write_keys(tmp_path / "release")
    sign_bundle(copy, private)
    manifest = msgspec.structs.replace(read_manifest(copy), statement="Safe for everyone.")
    (copy / MANIFEST).write_bytes(encode_manifest(manifest))
    assert verify_bundle(copy).manifest.statement == "Safe for everyone."
    with pytest.raises(InputRefused, match="was not made by"):
        verify_bundle(copy, public)


def test_a_float_model_lists_every_tensor_as_float(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    (parts.exported / "quantization.json").unlink()
    (tmp_path / "out").mkdir()
    manifest = package(tmp_path / "out", parts)
    assert manifest.layers == ()
    assert [f["name"] for f in manifest.floats] == ["a.weight", "n"]


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="no such folder"):
        verify_bundle(tmp_path / "none")
    with pytest.raises(InputRefused, match=r"no manifest\.json"):
        verify_bundle(tmp_path)
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(InputRefused, match="damaged"):
        verify_bundle(tmp_path)


def test_the_bill_of_materials_names_sources_and_tools(bundle: Path) -> None:
    sbom = json.loads((bundle / "sbom.cdx.json").read_bytes())
    model = sbom["metadata"]["component"]
    assert sbom["bomFormat"] == "CycloneDX" and model["type"] == "machine-learning-model"
    assert [a["name"] for a in model["pedigree"]["ancestors"]] == ["base", "lora"]
    names = {c["name"] for c in model["components"]}
    assert "model/onnx/embed_tokens.onnx" in names
    tools = {t["name"] for t in sbom["metadata"]["tools"]["components"]}
    assert tools == {"medexport", "numpy"}


def test_the_card_leaves_human_fields_blank(bundle: Path) -> None:
    card = (bundle / "MODEL_CARD.md").read_text()
    assert "Drawings." in card and "4 bits, blocks of 32, asymmetric" in card
    assert card.count("to be filled in and signed") == 5
    assert "comparison | not run" in card
