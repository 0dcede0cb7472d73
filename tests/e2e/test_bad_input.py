"""Bad input gets one clear line, the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exporter.cli.main import run
from exporter.core.data import data_root
from exporter.pipeline.build import BuildResult
from tests.support.tiny import write_tiny_model

DEMO = data_root("profiles") / "demo"


class Attempt:
    """Runs a command line that must fail, and checks how."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.out = folder / "out" / "bundle"

    def fails(self, code: int, *words: str, args: list[object]) -> str:
        self._capsys.readouterr()
        assert run([str(a) for a in args]) == code
        out, err = self._capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("medexport: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        assert out == ""
        for word in words:
            assert word in lines[0], lines[0]
        left = [p.name for p in self.out.parent.glob("**/*")] if self.out.parent.exists() else []
        assert [n for n in left if n == "bundle" or n.endswith(".partial")] == []
        return lines[0]

    def build(self, code: int, *words: str, weights: Path | None = None, **options: str) -> str:
        args: list[object] = ["build", "--int4", "--offline", "--out", self.out]
        args += ["--weights", weights] if weights else []
        for name, value in ({"model": "demo", "limit": "2"} | options).items():
            args += [f"--{name}", value]
        return self.fails(code, *words, args=args)


@pytest.fixture
def attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Attempt:
    return Attempt(tmp_path, capsys)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO / "model", tmp_path / "weights"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO / "adapter", tmp_path / "adapter"))


def test_unknown_profile_suggests_the_nearest(attempt: Attempt) -> None:
    attempt.build(2, "no model profile 'smolvml-500m'", "smolvlm-500m", model="smolvml-500m")


def test_unknown_target_scheme_and_set(attempt: Attempt) -> None:
    attempt.build(2, "no target 'cpu-avx3'", "cpu-avx2", target="cpu-avx3")
    attempt.fails(
        2,
        "no scheme 'int5'",
        args=["build", "--model", "demo", "--scheme", "int5", "--out", attempt.out],
    )
    attempt.build(2, "no image set 'phantom-eval'", eval="phantom-eval")


def test_no_scheme_or_two(attempt: Attempt) -> None:
    attempt.fails(2, "exactly one of", args=["build", "--model", "demo"])
    attempt.fails(2, "exactly one of", args=["build", "--model", "demo", "--int4", "--int8"])


def test_existing_output_is_kept(attempt: Attempt) -> None:
    kept = attempt.folder / "kept"
    kept.mkdir()
    (kept / "mine").write_text("mine")
    args: list[object] = ["build", "--model", "demo", "--int4", "--out", kept]
    attempt.fails(3, "output folder exists", args=args)
    assert (kept / "mine").read_text() == "mine"


def test_weights_not_in_the_cache_and_offline(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(attempt.folder / "hub"))
    attempt.build(5, "HuggingFaceTB/SmolVLM-500M-Instruct", "--weights DIR", model="smolvlm")


def test_weights_of_another_model(attempt: Attempt, weights: Path) -> None:
    attempt.build(
        3,
        "this is not SmolVLM-500M-Instruct",
        "--model demo",
        weights=weights,
        model="smolvlm-500m",
    )


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def declare_too_much(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes((1 << 40).to_bytes(8, "little") + data[8:])


def pickle_inside(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04\x95")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = load_file(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map["lm_head.weight"] = "model-00002-of-00002.safetensors"
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_runs_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["_attn_implementation_internal"] = "evil/kernel"
    (folder / "config.json").write_text(json.dumps(config))


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    tensors[name][0, 0] = np.nan
    save_file(tensors, folder / "model.safetensors")


def one_tensor_too_few(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(n for n in tensors if n.endswith("down_proj.weight")))
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "truncated"),
        (declare_too_much, "header of 1099511627776 bytes"),
        (pickle_inside, "pickle"),
        (pickle_only, "expected safetensors"),
        (missing_shard, "shard 'model-00002-of-00002.safetensors' is missing"),
        (no_config, "config.json"),
        (config_not_json, "not JSON"),
        (config_runs_code, "_attn_implementation_internal"),
        (not_a_number, "q_proj.weight"),
        (one_tensor_too_few, "down_proj.weight"),
    ],
)
def test_damaged_checkpoints(
    attempt: Attempt, weights: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(weights)
    attempt.build(3, words, weights=weights)


def test_missing_folders(attempt: Attempt) -> None:
    attempt.build(3, "no such folder", weights=attempt.folder / "nowhere")
    attempt.build(3, "adapter_config.json", adapter=str(attempt.folder / "nowhere"))


def test_adapter_for_another_base(attempt: Attempt, tmp_path: Path) -> None:
    base = tmp_path / "other"
    base.mkdir()
    write_tiny_model(base)
    attempt.fails(
        3, "adapter",
        args=["build", "--model", base, "--adapter", DEMO / "adapter", "--int4", "--no-compare", "--out", attempt.out],
    )  # fmt: skip


def test_adapter_that_changes_nothing(attempt: Attempt, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = {n: np.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
    save_file(changed, adapter / "adapter_model.safetensors")
    attempt.build(3, "change", adapter=str(adapter))


def test_adapter_as_pickle(attempt: Attempt, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    attempt.build(3, "adapter_model", adapter=str(adapter))


def test_full_disk(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    attempt.build(5, "disk")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": "many"}, "Expected `int`, got `str`"),
        ({"surprise": 1}, "unknown field"),
        ({"prompts": {}}, "missing required field"),
        ({"prompts": ["a"]}, "Expected `object`, got `array`"),
    ],
)
def test_wrong_types_in_a_profile(attempt: Attempt, change: dict[str, object], words: str) -> None:
    import yaml

    profile = yaml.safe_load((data_root("profiles") / "models" / "demo.yaml").read_text())
    path = attempt.folder / "demo.yaml"
    path.write_text(yaml.safe_dump(profile | change))
    attempt.build(3, words, "demo.yaml", model=str(path))


def test_profile_that_is_not_yaml(attempt: Attempt) -> None:
    path = attempt.folder / "demo.yaml"
    path.write_text("a: [")
    attempt.build(3, "not YAML", model=str(path))


def bomb(path: Path) -> None:
    """A PNG of 70 bytes that declares 32,000 by 32,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 32_000, 32_000, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def test_images_that_are_none(attempt: Attempt, demo_build: BuildResult) -> None:
    (attempt.folder / "text.png").write_text("not an image")
    bomb(attempt.folder / "bomb.png")
    for name, words in (("text.png", "image"), ("bomb.png", "pixels"), ("none.png", "none.png")):
        attempt.fails(3, words, args=["run", demo_build.bundle, attempt.folder / name])


def test_run_refuses_a_changed_bundle(attempt: Attempt, demo_build: BuildResult) -> None:
    copy = attempt.folder / "copy"
    shutil.copytree(demo_build.bundle, copy)
    with (copy / "model/tokenizer.json").open("a") as file:
        file.write(" ")
    image = next((data_root("calibration") / "phantoms-eval" / "images").iterdir())
    attempt.fails(3, "tokenizer.json", args=["run", copy, image])
    attempt.fails(3, "tokenizer.json", args=["verify", copy])
