from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from exporter.core.blocks import QDATA, SCALES, ZEROS, BlockFormat, PackedMatrix, dequantize
from exporter.core.errors import EnvironmentLacks, InputRefused, MedexportError, WrongUsage
from exporter.core.nf4 import NF4_DATA, NF4_SCALES, Nf4Matrix, dequantize_nf4
from exporter.quantizers import rtn, run
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import SCHEMES, find_scheme
from tests.unit.quantizers.conftest import Writer, shapes

Tensors = dict[str, NDArray[Any]]
HEAD, EMBEDDING = "lm_head.weight", "model.text_model.embed_tokens.weight"
DOWN = "model.text_model.layers.0.mlp.down_proj.weight"


def quantize(source: Path, name: str = "int4-rtn", threads: int = 2) -> Path:
    out = source.with_name(f"{source.name}-{name}-{threads}")
    out.mkdir()
    quantize_model(source, out, find_scheme(name), threads=threads)
    return out


def rebuilt(folder: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """All tensors in float32 by the safetensors package and quantization.json alone."""
    tensors = load_file(folder / "model.safetensors")
    document = json.loads((folder / "quantization.json").read_text())
    found = {}
    for row in document["layers"]:
        if row.get("code") == "nf4":
            stored = tensors.pop(row["name"] + NF4_DATA), tensors.pop(row["name"] + NF4_SCALES)
            nf4 = Nf4Matrix(row["rows"], row["columns"], row["block"], *stored)
            assert nf4.nbytes == row["bytes"]
            found[row["name"]] = dequantize_nf4(nf4)
            continue
        name, fmt = row["name"], BlockFormat(row["bits"], row["block"], row["symmetric"])
        zeros = None if fmt.symmetric else tensors.pop(name + ZEROS)
        parts = tensors.pop(name + QDATA), tensors.pop(name + SCALES), zeros
        matrix = PackedMatrix(fmt, row["columns"], *parts)
        assert matrix.nbytes == row["bytes"]
        found[name] = dequantize(matrix)
    floats = {row["name"] for row in document["floats"]}
    assert tensors.keys() == floats
    return found | {n: t.astype(np.float32) for n, t in tensors.items()}, document


@pytest.mark.parametrize(
    "name", [s.name for s in SCHEMES.values() if s.quantizes and not s.calibrated]
)
def test_what_is_written_stands_for_the_source(write_model: Writer, name: str) -> None:
    source = write_model()
    original = load_file(source / "model.safetensors")

    found, document = rebuilt(quantize(source, name))

    assert document["schema"] == 1
    assert document["scheme"] == name
    assert {n: t.shape for n, t in found.items()} == shapes()
    errors = {row["name"]: row["relative_error"] for row in document["layers"]}
    limits = {4: 0.12, 8: 0.012}
    bits = {row["name"]: row["bits"] for row in document["layers"]}
    for key, values in original.items():
        w = values.astype("f8")
        lost = np.linalg.norm(found[key] - w) / np.linalg.norm(w)
        assert lost == pytest.approx(errors.get(key, 0), rel=1e-3)
        assert lost < limits.get(bits.get(key, 16), 1e-12)
    assert all(row["reason"] for row in document["floats"])


def test_the_report_says_what_the_folder_holds(write_model: Writer) -> None:
    source = write_model()
    out = source.with_name("out")
    out.mkdir()

    report = quantize_model(source, out, find_scheme("int4-rtn"), threads=1)

    stored = load_file(out / "model.safetensors")
    assert report.stored_bytes == sum(t.nbytes for t in stored.values())
    assert report.source_bytes == 2 * sum(int(np.prod(s)) for s in shapes().values())
    assert report.document() == json.loads((out / "quantization.json").read_text())
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "quantization.json",
    }


def test_bytes_do_not_depend_on_threads(
    write_model: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model()
    monkeypatch.setattr(rtn, "CHUNK", 500)  # many pieces, so that threads could get them mixed up
    monkeypatch.setattr(run, "AHEAD", 30_000)

    folders = [quantize(source, threads=n) for n in (1, 3, 8)]

    for name in ("model.safetensors", "quantization.json"):
        contents = {(f / name).read_bytes() for f in folders}
        assert len(contents) == 1


def test_progress_counts_every_weight(write_model: Writer) -> None:
    source, seen = write_model(), []
    out = source.with_name("out")
    out.mkdir()

    quantize_model(
        source,
        out,
        find_scheme("int8"),
        threads=2,
        progress=lambda done, total, what="": seen.append((done, total, what)),
    )

    total = sum(int(np.prod(s)) for s in shapes().values())
    assert [t for _, t, _ in seen] == [total] * len(shapes())
    assert [d for d, _, _ in seen] == sorted({d for d, _, _ in seen})
    assert seen[-1][0] == total
    assert {w for _, _, w in seen} == shapes().keys()


def test_a_shared_head_is_stored_once_and_the_config_says_so(write_model: Writer) -> None:
    def share(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].copy()

    out = quantize(write_model(share))

    found, document = rebuilt(out)
    assert found.keys() == shapes().keys() - {HEAD}
    assert [r["kind"] for r in document["layers"] if r["name"] == EMBEDDING] == ["embedding"]
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_float32_source_is_stored_as_float16(write_model: Writer) -> None:
    norm = "model.text_model.norm.weight"

    def widen(tensors: Tensors) -> None:
        for name in (norm, DOWN):
            tensors[name] = tensors[name].astype(np.float32)

    plain, wide = (quantize(write_model(change)) for change in (None, widen))

    assert (plain / "model.safetensors").read_bytes() == (wide / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "value"), [(DOWN, np.nan), (DOWN, np.inf), ("model.text_model.norm.weight", np.nan)]
)
def test_a_bad_value_is_refused_by_name(write_model: Writer, name: str, value: float) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[name].flat[7] = value

    with pytest.raises(InputRefused, match=name.replace(".", r"\.")) as caught:
        quantize(write_model(spoil))
    assert "\n" not in str(caught.value)


def test_a_float_beyond_float16_is_refused(write_model: Writer) -> None:
    def grow(tensors: Tensors) -> None:
        tensors["model.text_model.norm.weight"] = np.full(96, 7e4, np.float32)

    with pytest.raises(InputRefused, match=r"norm\.weight.*65504"):
        quantize(write_model(grow))


def test_a_quantized_folder_and_a_float_scheme_are_refused(write_model: Writer) -> None:
    source = write_model()
    with pytest.raises(WrongUsage, match="fp16 quantizes nothing"):
        quantize(source, "fp16")
    with pytest.raises(InputRefused, match="already quantized"):
        quantize(quantize(source, "int8"), "int4-rtn")


def test_a_full_disk_is_said_before_anything_is_written(
    write_model: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model()
    out = source.with_name("out")
    out.mkdir()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))

    with pytest.raises(EnvironmentLacks, match="disk space"):
        quantize_model(source, out, find_scheme("int8"), threads=1)
    assert list(out.iterdir()) == []


def test_a_layer_left_out_by_the_writer_is_found(
    write_model: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run._write_tensors

    def forgetful(checkpoint: Any, plan: Any, *rest: Any) -> dict[str, float]:
        kept = [p for p in plan if p.name != DOWN]
        return write(checkpoint, kept, *rest) | {DOWN: 0.0}

    monkeypatch.setattr(run, "_write_tensors", forgetful)

    with pytest.raises(MedexportError, match=r"3 tensors are not as planned.*down_proj"):
        quantize(write_model())
