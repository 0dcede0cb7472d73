"""Building: what the library is asked for, what lies beside the engines, and how it fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import onnx
import pytest

from exporter.core.blocks import BlockFormat
from exporter.core.digest import sha256_file
from exporter.core.errors import EnvironmentLacks, InputRefused, WrongUsage
from exporter.engines.build import LOG, BuildRequest, build_engines, build_on
from exporter.engines.options import FLAGS, EngineOptions
from exporter.engines.profiles import read_profiles
from exporter.engines.record import read_record, this_system
from exporter.engines.timing import cache_key
from exporter.runtimes.trt import PARTS
from tests.support.fake_tensorrt import FakeTensorRT
from tests.support.fake_tensorrt_types import BuilderFlag, MemoryPoolType
from tests.support.host_memory import FACTS, HostMemory
from tests.support.tensorrt_site import Site, build_there, export_standard
from tests.unit.graphs.packing import quantize_folder


@pytest.fixture
def trt() -> FakeTensorRT:
    return FakeTensorRT(HostMemory())


def test_the_folder_holds_engines_records_log_and_timing_cache(
    site: Site, exported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engines"
    steps: list[tuple[int, int]] = []
    report = build_engines(
        exported / "model",
        exported / "export.json",
        out,
        progress=lambda done, total, what="": steps.append((done, total)),
    )
    key = cache_key(FACTS, "10.16.1.11", EngineOptions())
    names = {f"{p}.{s}" for p in PARTS for s in ("engine", "json")}
    assert {p.name for p in out.iterdir()} == names | {LOG, f"timing-{key[:16]}.cache"}
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert report.bytes == sum((out / f"{p}.engine").stat().st_size for p in PARTS)
    for part in PARTS:
        record = read_record(out, part)
        graph = exported / "model" / "onnx" / f"{part}.onnx"
        assert record.digests.graph == sha256_file(graph)
        assert record.digests.engine == sha256_file(out / f"{part}.engine")
        assert record.device == FACTS and record.system == this_system()
        assert record.tensorrt == "10.16.1.11" and record.seconds > 0
        assert record.timing_cache.key == key
    log = (out / LOG).read_text()
    assert [line for line in log.splitlines() if line.startswith("==")] == [
        f"== {p}" for p in PARTS
    ]
    assert "VERBOSE: building" in log
    assert "cuStreamDestroy_v2" in site.cuda.calls


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
def test_networks_are_strongly_typed_in_every_version(
    version: str, exported: Path, tmp_path: Path
) -> None:
    # The flag has another number in TensorRT 11; the stand-in refuses any other value.
    build_there(FakeTensorRT(HostMemory(), version), exported, tmp_path / "e")
    assert read_record(tmp_path / "e", PARTS[0]).tensorrt == version


def test_profiles_reach_the_builder_in_order(
    trt: FakeTensorRT, exported: Path, tmp_path: Path
) -> None:
    build_there(trt, exported, tmp_path / "e")
    vision, embed, decoder = trt.seen.profiles
    assert (len(vision), len(embed), len(decoder)) == (1, 1, 2)
    prefill, decode = decoder
    assert prefill.shapes["past_key_values.0.key"][2] == [1, 2, 0, 16]
    assert decode.shapes["past_key_values.0.key"] == [
        [1, 2, 1, 16],
        [1, 2, 256, 16],
        [1, 2, 511, 16],
    ]
    assert decode.numbers == {"num_logits_to_keep": [[1], [1], [1]]}


@pytest.mark.parametrize("field", FLAGS)
def test_each_option_sets_its_flag_and_nothing_else(
    field: str, trt: FakeTensorRT, exported: Path, tmp_path: Path
) -> None:
    options = EngineOptions(**{field: True}, workspace=5 << 20, level=1)
    build_there(trt, exported, tmp_path / "e", options)
    assert trt.seen.flags == {BuilderFlag[FLAGS[field]]}
    assert trt.seen.pools == {MemoryPoolType.WORKSPACE: 5 << 20}
    assert trt.seen.level == 1


def test_without_options_no_flag_is_set_not_even_tf32(
    trt: FakeTensorRT, exported: Path, tmp_path: Path
) -> None:
    build_there(trt, exported, tmp_path / "e")
    assert trt.seen.flags == set() and trt.seen.pools == {}


@pytest.mark.parametrize("options", [EngineOptions(level=6), EngineOptions(workspace=0)])
def test_options_out_of_range_are_wrong_usage(
    options: EngineOptions, trt: FakeTensorRT, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(WrongUsage, match="expected"):
        build_there(trt, exported, tmp_path / "e", options)
    assert not (tmp_path / "e").exists()


def test_the_timing_cache_key_follows_everything_timings_depend_on() -> None:
    base = cache_key(FACTS, "10.16.1.11", EngineOptions())
    others = [
        cache_key(msgspec.structs.replace(FACTS, name="NVIDIA L4"), "10.16.1.11", EngineOptions()),
        cache_key(
            msgspec.structs.replace(FACTS, compute_capability="9.0"), "10.16.1.11", EngineOptions()
        ),
        cache_key(msgspec.structs.replace(FACTS, cuda="12.8"), "10.16.1.11", EngineOptions()),
        cache_key(FACTS, "10.15.0", EngineOptions()),
        cache_key(FACTS, "10.16.1.11", EngineOptions(tf32=True)),
        cache_key(FACTS, "10.16.1.11", EngineOptions(workspace=1)),
    ]
    assert len({base, *others}) == 7
    # The same card with another driver for the same CUDA, or another amount of memory, measures alike.
    same = msgspec.structs.replace(FACTS, driver="581.1", memory=1)
    assert cache_key(same, "10.16.1.11", EngineOptions()) == base


def test_an_earlier_timing_cache_is_used_when_it_is_for_the_same_build(
    trt: FakeTensorRT, exported: Path, tmp_path: Path
) -> None:
    first = build_there(trt, exported, tmp_path / "a")
    request = BuildRequest(
        trt, FACTS, exported / "model", read_profiles(exported / "export.json"), EngineOptions(),
        reuse=first.folder,
    )  # fmt: skip
    again = build_on(request, tmp_path / "b")
    assert all(r.timing_cache.reused for r in again.records)
    other = build_on(replace(request, options=EngineOptions(level=5)), tmp_path / "c")
    # Its own first engine starts empty, later ones go on with what that one measured.
    assert [r.timing_cache.reused for r in other.records] == [False, True, True]
    trt.timing_cache_taken = False
    refused = build_on(request, tmp_path / "d")
    assert not any(r.timing_cache.reused for r in refused.records)


def test_types_of_the_network_say_where_weights_are_packed(
    trt: FakeTensorRT, tmp_path: Path
) -> None:
    from tests.support.tiny import write_tiny_model

    source = write_tiny_model(tmp_path / "m", tied=True)
    names = [f"model.text_model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    formats = {names[0]: BlockFormat(4, 64, True), names[1]: BlockFormat(4, 64, True)}
    formats[names[2]] = BlockFormat(8, 32, True)
    quantize_folder(source, tmp_path / "q", formats)
    report = build_there(trt, export_standard(tmp_path / "q", tmp_path / "x"), tmp_path / "e")
    vision, _, decoder = report.records
    assert decoder.types["INT4"] == 2 and decoder.types["INT8"] == 1
    assert not vision.types.keys() & {"INT4", "INT8"}
    # Float matrices are stored in float16 behind a Cast, and nothing is computed in it.
    graph = onnx.load_model(tmp_path / "x" / "model" / "onnx" / f"{PARTS[2]}.onnx").graph
    halves = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert decoder.types["HALF"] == len(halves) > 0


def test_a_graph_that_the_parser_does_not_take_is_one_line(
    trt: FakeTensorRT, exported: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(exported, tmp_path / "x"))
    path = copied / "model" / "onnx" / f"{PARTS[1]}.onnx"
    model = onnx.load_model(path)
    for index in range(5):
        node = onnx.helper.make_node(
            "MatMulNBits",
            ["inputs_embeds"],
            [f"o{index}"],
            name=f"my/{index}",
            domain="com.microsoft",
        )
        model.graph.node.append(node)
    onnx.save_model(model, path)
    with pytest.raises(InputRefused) as caught:
        build_there(trt, copied, tmp_path / "e")
    said = str(caught.value)
    assert "node 'my/0' (MatMulNBits): Plugin not found, are the plugin" in said
    assert "(and 2 more)" in said and "\n" not in said
    log = tmp_path / f"e.{LOG}"
    assert str(log) in said and "== embed_tokens" in log.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == [log.name, "x"]


def test_a_build_that_fails_keeps_its_log_and_nothing_else(
    trt: FakeTensorRT, exported: Path, tmp_path: Path
) -> None:
    trt.build_fails = "Could not find any implementation for\n node decoder"
    with pytest.raises(
        EnvironmentLacks, match="Could not find any implementation for node"
    ) as error:
        build_there(trt, exported, tmp_path / "e")
    assert "NVIDIA Test 1000" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [f"e.{LOG}"]
    assert "ERROR: Could not find any" in (tmp_path / f"e.{LOG}").read_text()


def test_a_missing_graph_and_an_existing_folder_are_refused(
    trt: FakeTensorRT, exported: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(exported, tmp_path / "x"))
    with pytest.raises(InputRefused, match="output folder exists"):
        build_there(trt, copied, copied)
    (copied / "model" / "onnx" / f"{PARTS[0]}.onnx").unlink()
    with pytest.raises(InputRefused, match="no such file"):
        build_there(trt, copied, tmp_path / "e")


def test_profiles_of_another_graph_are_refused(
    trt: FakeTensorRT, exported: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(exported, tmp_path / "x"))
    found = json.loads((copied / "export.json").read_text())
    vision = found["standard"]["profiles"][PARTS[0]][PARTS[0]]
    vision["feature_index"] = {"min": [1], "opt": [1], "max": [1]}
    (copied / "export.json").write_text(json.dumps(found))
    with pytest.raises(InputRefused, match="the graph has"):
        build_there(trt, copied, tmp_path / "e")
    del vision["feature_index"]
    found["standard"]["profiles"][PARTS[2]]["prefill"]["num_logits_to_keep"]["values"] = False
    (copied / "export.json").write_text(json.dumps(found))
    with pytest.raises(InputRefused, match="shapes follow from the values of num_logits_to_keep"):
        build_there(trt, copied, tmp_path / "e")


def test_without_the_library_or_a_gpu_the_environment_lacks_it(
    monkeypatch: pytest.MonkeyPatch, site: Site, exported: Path, tmp_path: Path
) -> None:
    given = (exported / "model", exported / "export.json", tmp_path / "e")
    site.cuda.devices = 0
    with pytest.raises(EnvironmentLacks, match="0 GPUs"):
        build_engines(*given)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(EnvironmentLacks, match="tensorrt-cu12.*tensorrt-cu13.*pypi.nvidia.com"):
        build_engines(*given)
