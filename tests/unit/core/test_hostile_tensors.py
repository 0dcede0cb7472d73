"""Hostile safetensors files: each is refused in one line and in bounded memory."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint
from tests.unit.core.files import ONE, index, shards, write

HUGE = 2**50


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw_file(path: Path, header: bytes | object, data: bytes = b"", length: int = -1) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length < 0 else length) + text + data)
    return path


GOOD = entry([2], [0, 8])
HEADERS: dict[str, tuple[object, bytes]] = {
    "offsets beyond the file": ({"a": entry([2], [8, 16])}, b"\0" * 8),
    "end beyond the file": ({"a": entry([1 << 40], [0, 4 << 40])}, b"\0" * 8),
    "huge shape": ({"a": entry([HUGE, HUGE, HUGE], [0, 8])}, b"\0" * 8),
    "product that wraps to eight bytes": ({"a": entry([2**62 + 2], [0, 8])}, b"\0" * 8),
    "enormous numbers": ({"a": entry([10**4000, 10**4000], [0, 8])}, b"\0" * 8),
    "many axes": ({"a": entry([1] * 100_000, [0, 4])}, b"\0" * 4),
    "negative shape": ({"a": entry([-1, -2], [0, 8])}, b"\0" * 8),
    "negative offsets": ({"a": entry([2], [-8, 0])}, b"\0" * 8),
    "end before begin": ({"a": entry([2], [8, 0])}, b"\0" * 8),
    "fractional shape": ({"a": entry([2.0], [0, 8])}, b"\0" * 8),
    "boolean shape": ({"a": entry([True], [0, 4])}, b"\0" * 4),
    "shape of text": ({"a": entry("2", [0, 8])}, b"\0" * 8),
    "shape null": ({"a": entry(None, [0, 8])}, b"\0" * 8),
    "three offsets": ({"a": entry([2], [0, 4, 8])}, b"\0" * 8),
    "unknown dtype": ({"a": entry([2], [0, 8], "F4_WEIRD")}, b"\0" * 8),
    "dtype a list": ({"a": entry([2], [0, 8], ["F32"])}, b"\0" * 8),
    "entry a list": ({"a": [1, 2, 3]}, b"\0" * 8),
    "entry without dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "overlap": ({"a": GOOD, "b": entry([2], [4, 12])}, b"\0" * 12),
    "the same bytes twice": ({"a": GOOD, "b": GOOD}, b"\0" * 8),
    "hole": ({"a": GOOD, "b": entry([2], [12, 20])}, b"\0" * 20),
    "hidden rest": ({"a": GOOD}, b"\0" * 9),
    "truncated data": ({"a": GOOD}, b"\0" * 7),
    "metadata a list": ({"__metadata__": [1], "a": GOOD}, b"\0" * 8),
    "a list": ([1, 2], b""),
    "not JSON": (b"{nonsense", b""),
    "not UTF-8": (b'{"\xff\xfe": 1}', b""),
    "deep nesting": (b'{"a":' + b"[" * 200_000, b""),
    "duplicate tensor": (
        b'{"a":' + json.dumps(GOOD).encode() + b',"a":' + json.dumps(GOOD).encode() + b"}",
        b"\0" * 8,
    ),
    "duplicate key inside": (
        b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}',
        b"\0" * 8,
    ),
    "name with line breaks": ({"a\nb\x1b[2J": entry([2], [0, 9])}, b"\0" * 9),
    "name without end": ({"n" * 1_000_000: entry([2], [0, 9])}, b"\0" * 9),
}


def refused(folder: Path) -> str:
    """The one line with which `folder` is refused, in bounded memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InputRefused) as caught:
            Checkpoint.open(folder)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 1000 + 2 * len(str(folder))
    return message


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    header, data = HEADERS[name]
    raw_file(tmp_path / "model.safetensors", header, data)

    assert "model.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 3, 10**6, 10**9, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    raw_file(tmp_path / "model.safetensors", {"a": GOOD}, b"\0" * 8, length)

    refused(tmp_path)


@pytest.mark.parametrize("kept", range(0, 90, 7))
def test_a_truncated_file_is_refused_at_any_length(tmp_path: Path, kept: int) -> None:
    whole = write(tmp_path / "whole", {"a": ONE}).read_bytes()
    assert kept < len(whole)
    (tmp_path / "model.safetensors").write_bytes(whole[:kept])

    refused(tmp_path)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused_but_never_worse(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    arrays = {"a": ONE, "b": np.arange(3, dtype=np.int64)}
    damaged = bytearray(write(folder / "model.safetensors", arrays, {"k": "v"}).read_bytes())
    damaged[position % len(damaged)] = value
    (folder / "model.safetensors").write_bytes(damaged)

    try:
        checkpoint = Checkpoint.open(folder)
        read = [checkpoint.raw(name) for name in checkpoint.tensors]
    except InputRefused as error:
        lines = str(error).count("\n")
    else:
        lines = 0
        assert sum(a.nbytes for a in read) == sum(a.nbytes for a in arrays.values())
    assert lines == 0


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_by_its_first_bytes(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb(), protocol))

    assert "a pickle" in refused(tmp_path)


def test_a_zipped_pickle_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100)

    assert "a pickle" in refused(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "a.pth", "b.pkl", "c.ckpt"])
def test_a_pickle_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, {"a": ONE})
    assert name in refused(tmp_path)

    index(tmp_path, {"a": name})
    assert "a pickle" in refused(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "x" * 5000,
              "a\0b", "line\nbreak"]
)  # fmt: skip
def test_a_shard_path_cannot_leave_the_folder(tmp_path: Path, shard: str) -> None:
    write(tmp_path / "secret.safetensors", {"a": ONE})
    folder = tmp_path / "model"
    folder.mkdir()
    index(folder, {"a": shard})

    refused(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index(tmp_path, shards(tmp_path, one={"a": ONE}) | {"b": "two.safetensors"})

    assert "two.safetensors" in refused(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    weight_map = shards(tmp_path, one={"a": ONE}, two={"b": ONE, "c": ONE})
    for wrong, named in (
        (weight_map | {"d": "one.safetensors"}, "'d'"),
        (weight_map | {"c": "one.safetensors"}, "'c'"),
        ({n: s for n, s in weight_map.items() if n != "c"}, "'c'"),
    ):
        index(tmp_path, wrong)
        assert named in refused(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index(
        tmp_path,
        shards(tmp_path, one={"a": ONE}, two={"a": ONE, "b": ONE}) | {"a": "one.safetensors"},
    )

    assert "'a' is also in another shard" in refused(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", '{"weight_map": []}', '{"weight_map": {}}',
                                  '{"weight_map": {"a": 3}}', "[" * 100_000])  # fmt: skip
def test_a_bad_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)

    assert "index" in refused(tmp_path)


def test_an_index_beside_a_single_file_is_ambiguous(tmp_path: Path) -> None:
    index(tmp_path, shards(tmp_path, model={"a": ONE}))

    assert "remove one" in refused(tmp_path)


def test_a_folder_without_weights_or_no_folder_at_all(tmp_path: Path) -> None:
    assert "no weights" in refused(tmp_path)
    assert "no weights" in refused(tmp_path / "nowhere")
