"""The export as a whole: files, determinism, external data, and what it refuses."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from exporter.core.digest import sha256_tree
from exporter.core.errors import EnvironmentLacks, InputRefused, ParityFailed
from exporter.core.tensors import Checkpoint
from exporter.graphs import writer
from exporter.graphs.check import check_graphs
from exporter.graphs.export import export_model

from .conftest import Decoder, Model, make_model, relative, save, session, text_logits

Out = Callable[[str], Path]
LAYER = "model.text_model.layers.0.self_attn.k_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(make_model({}, {}), tmp_path / "source")


def change(source: Path, name: str, value: np.ndarray | None) -> None:
    """Replace, add or (None) remove one tensor."""
    path = source / "model.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


def test_files_interface_and_report(source: Path, out: Out) -> None:
    folder = out("e")
    seen: list[tuple[int, int]] = []
    report = export_model(
        source, folder, progress=lambda done, total, what="": seen.append((done, total))
    )
    names = [p.name for p in report.parts]
    assert names == ["vision_encoder", "embed_tokens", "decoder_model_merged"]
    files = {p.name for p in (folder / "model" / "onnx").iterdir()}
    assert files == {f"{n}.onnx" for n in names}
    assert report.bytes == sum(p.stat().st_size for p in (folder / "model" / "onnx").iterdir())
    written = json.loads((folder / "export.json").read_text())
    assert written["float_storage"] == "float16"
    tensors = Checkpoint.open(source).tensors
    assert written["bits"].keys() == tensors.keys()
    assert seen[-1] == (len(tensors), len(tensors))
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    decoder = session(folder / "model", "decoder_model_merged")
    inputs = {i.name: (i.type, i.shape) for i in decoder.get_inputs()}
    assert inputs["num_logits_to_keep"] == ("tensor(int64)", [])
    past = inputs["past_key_values.1.value"]
    assert past == ("tensor(float)", ["batch_size", 2, "past_sequence_length", 16])
    outputs = [o.name for o in decoder.get_outputs()]
    assert outputs == [
        "logits",
        *(f"present.{n}.{part}" for n in range(2) for part in ("key", "value")),
    ]


def test_two_exports_are_byte_identical(source: Path, out: Out) -> None:
    export_model(source, out("a"))
    export_model(source, out("b"))
    assert sha256_tree(out("c").parent / "a") == sha256_tree(out("d").parent / "b")


def test_large_weights_go_to_a_file_of_their_own(
    source: Path, tmp_path: Path, out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(source, out("inline"), float_storage="float32")
    # The embedding stays inside, the other two graphs get a data file.
    monkeypatch.setattr(writer, "INLINE_LIMIT", 100_000)
    report = export_model(source, out("external"), float_storage="float32")
    folder = tmp_path / "external" / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {
        "vision_encoder.onnx": 1,
        "decoder_model_merged.onnx": 1,
    }
    part = report.parts[2]
    data = folder / "onnx" / "decoder_model_merged.onnx_data"
    assert data.stat().st_size == part.data_bytes
    model = onnx.load(folder / "onnx" / "decoder_model_merged.onnx", load_external_data=False)
    offsets = [
        int(e.value) for t in model.graph.initializer for e in t.external_data if e.key == "offset"
    ]
    assert len(offsets) > 5
    assert all(o % writer.ALIGNMENT == 0 for o in offsets)
    ids = np.random.default_rng(0).integers(0, 100, (1, 9))
    a, _ = Decoder(tmp_path / "inline" / "model").run(ids)
    b, _ = Decoder(folder).run(ids)
    np.testing.assert_array_equal(a, b)
    check_graphs(folder)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputRefused, match="too short"):
        check_graphs(folder)


def test_bfloat16_checkpoint(tmp_path: Path, out: Out) -> None:
    source = save(make_model({}, {}).bfloat16(), tmp_path / "m")
    export_model(source, out("e"), float_storage="float32")
    ids = np.random.default_rng(0).integers(0, 100, (1, 9))
    reference = text_logits(Model.from_pretrained(source, dtype="float32"), ids)
    assert relative(Decoder(tmp_path / "e" / "model").run(ids)[0], reference) < 1e-4


def test_a_head_in_the_file_is_used_although_the_config_says_tied(tmp_path: Path, out: Out) -> None:
    # What modules_to_save leaves behind; transformers unties as well.
    model = make_model({}, {})
    source = save(model, tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    export_model(source, out("e"), float_storage="float32")
    ids = np.random.default_rng(0).integers(0, 100, (1, 9))
    got, _ = Decoder(tmp_path / "e" / "model").run(ids)
    assert relative(got, text_logits(model, ids)) < 1e-4


def test_check_runs_each_graph(source: Path, tmp_path: Path, out: Out) -> None:
    export_model(source, out("e"))
    checks = {c.name: c for c in check_graphs(tmp_path / "e" / "model")}
    assert checks["decoder_model_merged"].operators["GroupQueryAttention"] == 2
    assert checks["vision_encoder"].operators["MultiHeadAttention"] == 2
    assert checks["vision_encoder"].shapes == ((1, 4, 64), (2, 4, 64))


def test_check_finds_values_that_are_not_finite(source: Path, tmp_path: Path, out: Out) -> None:
    weight = load_file(source / "model.safetensors")[LAYER]
    weight[0, 0] = np.nan
    change(source, LAYER, weight)
    export_model(source, out("e"), float_storage="float32")
    with pytest.raises(ParityFailed, match="not finite"):
        check_graphs(tmp_path / "e" / "model")


def test_buffers_of_old_checkpoints_are_reported_as_unused(source: Path, out: Out) -> None:
    name = "model.text_model.layers.0.self_attn.rotary_emb.inv_freq"
    change(source, name, np.ones(8, np.float32))
    report = export_model(source, out("e"))
    assert list(report.unused) == [name]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (LAYER, None, "no tensor"),
        (LAYER, np.zeros((32, 63), np.float32), r"expected floating point \[32, 64\]"),
        (LAYER, np.zeros((32, 64), np.int32), "is I32"),
        (LAYER, np.full((32, 64), 1e6, np.float32), "float16 cannot hold"),
        ("model.text_model.layers.2.mlp.up_proj.weight", np.zeros(4, np.float32), "no place"),
        ("lm_head.weight", None, "no tensor 'lm_head.weight'"),
    ],
)
def test_bad_tensors_are_refused(
    name: str, value: np.ndarray | None, message: str, source: Path, out: Out
) -> None:
    change(source, name, value)
    with pytest.raises(InputRefused, match=message):
        export_model(source, out("e"))


def test_head_dim_that_the_attention_op_cannot_do_is_refused(tmp_path: Path, out: Out) -> None:
    source = save(make_model({"head_dim": 24}, {}), tmp_path / "m")
    with pytest.raises(InputRefused, match="multiple of 16"):
        export_model(source, out("e"))


def test_full_disk_is_told_before_writing(
    source: Path, out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil._ntuple_diskusage(10, 5, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    folder = out("e")
    with pytest.raises(EnvironmentLacks, match="disk space"):
        export_model(source, folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [{"name": "x", "kind": "linear", "bits": 4, "block": 32, "symmetric": True, "columns": 64}],
        [
            {
                "name": LAYER,
                "kind": "linear",
                "bits": 5,
                "block": 32,
                "symmetric": True,
                "columns": 64,
            }
        ],
        [
            {
                "name": LAYER,
                "kind": "linear",
                "bits": 4,
                "block": 24,
                "symmetric": True,
                "columns": 64,
            }
        ],
        [{"name": LAYER, "kind": "linear"}],
    ],
)
def test_bad_quantization_record_is_refused(
    layers: list[dict[str, object]], source: Path, out: Out
) -> None:
    change(source, LAYER, None)
    change(source, f"{LAYER}.qdata", np.zeros((32, 2, 16), np.uint8))
    change(source, f"{LAYER}.scales", np.zeros((32, 2), np.float16))
    (source / "quantization.json").write_text(json.dumps({"schema": 1, "layers": layers}))
    with pytest.raises(InputRefused, match="quantize it again|expected 4 or 8"):
        export_model(source, out("e"))


def test_packed_tensors_without_record_are_refused(source: Path, out: Out) -> None:
    change(source, f"{LAYER}.qdata", np.zeros((32, 2, 16), np.uint8))
    with pytest.raises(InputRefused, match="no quantization.json"):
        export_model(source, out("e"))


def test_memory_does_not_grow_with_the_number_of_layers(
    tmp_path: Path, out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "INLINE_LIMIT", 0)
    wide = {"hidden_size": 256, "intermediate_size": 512}
    peaks, sizes = [], []
    for layers in (2, 12):
        model = make_model({**wide, "num_hidden_layers": layers}, {})
        source = save(model, tmp_path / f"m{layers}")
        folder = out(f"e{layers}")
        tracemalloc.start()
        report = export_model(source, folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(report.bytes)
    assert sizes[1] - sizes[0] > 5 * peaks[0]
    # What grows is the graph itself: nodes and names, not weights.
    assert peaks[1] < 1.3 * peaks[0]
