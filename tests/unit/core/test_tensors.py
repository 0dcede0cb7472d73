"""Safetensors against the safetensors package, both ways."""

from __future__ import annotations

import resource
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from exporter.core.errors import InputRefused
from exporter.core.tensors import CODES, Checkpoint, SafetensorsWriter, read_header, total_bytes
from tests.unit.core.files import ONE, Arrays, index, shards, write

DTYPES = [np.dtype(name) for name in CODES]
ARRAYS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
    ),
    max_size=5,
)
METADATA = st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=3)


def same(a: np.ndarray, b: np.ndarray) -> bool:  # type: ignore[type-arg]
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@settings(max_examples=60, deadline=None)
@given(arrays=ARRAYS, metadata=METADATA)
def test_the_package_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, arrays: Arrays, metadata: dict[str, str]
) -> None:
    path = write(tmp_path_factory.mktemp("w") / "model.safetensors", arrays, metadata)

    theirs = load_file(path)

    assert theirs.keys() == arrays.keys()
    assert all(same(theirs[n], a) for n, a in arrays.items())
    with safe_open(path, "numpy") as file:
        assert (file.metadata() or {}) == metadata


@settings(max_examples=60, deadline=None)
@given(arrays=ARRAYS, metadata=METADATA)
def test_what_the_package_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, arrays: Arrays, metadata: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("r")
    save_file(arrays, folder / "model.safetensors", metadata or None)

    ours = Checkpoint.open(folder)

    assert ours.tensors.keys() == arrays.keys()
    assert ours.metadata == metadata
    assert all(same(ours.raw(n), a) for n, a in arrays.items())
    assert total_bytes(ours.tensors.values()) == sum(a.nbytes for a in arrays.values())


@given(hnp.arrays(np.uint16, hnp.array_shapes(max_dims=2)))
@settings(max_examples=40, deadline=None)
def test_bfloat16_both_ways(tmp_path_factory: pytest.TempPathFactory, bits: Any) -> None:
    folder = tmp_path_factory.mktemp("b")
    with SafetensorsWriter(folder / "model.safetensors", {"w": ("BF16", bits.shape)}) as writer:
        writer.write("w", bits)
    theirs = load_file(folder / "model.safetensors")["w"]
    assert theirs.dtype == ml_dtypes.bfloat16
    assert same(theirs.view(np.uint16), bits)

    save_file({"w": bits.view(ml_dtypes.bfloat16)}, folder / "model.safetensors")
    ours = Checkpoint.open(folder)

    assert ours.info("w").dtype == "BF16"
    expected = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(ours.float32("w"), expected, equal_nan=True)


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    index(tmp_path, shards(tmp_path, one={"a": ONE, "b": 2 * ONE}, two={"c": 3 * ONE}))

    checkpoint = Checkpoint.open(tmp_path)

    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert "c" in checkpoint
    assert np.array_equal(checkpoint.float32("c"), 3 * ONE)
    assert checkpoint.info("c").file.name == "two.safetensors"


def test_same_bytes_compares_across_shards(tmp_path: Path) -> None:
    other = ONE.copy()
    other[1, 2] += 1
    parts: dict[str, Arrays] = {"one": {"a": ONE, "b": other}, "two": {"c": ONE, "d": ONE[:1]}}
    index(tmp_path, shards(tmp_path, **parts))
    checkpoint = Checkpoint.open(tmp_path)

    assert checkpoint.same_bytes("a", "c")
    assert not checkpoint.same_bytes("a", "b")
    assert not checkpoint.same_bytes("a", "d")


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    # Its length is stored as 80 02, which is also how a pickle starts.
    size = next(n for n in range(640) if 8 + 640 == _header_end(tmp_path, "x" * n))

    assert read_header(tmp_path / "model.safetensors")[1] == {"note": "x" * size}


def _header_end(folder: Path, note: str) -> int:
    path = write(folder / "model.safetensors", {"a": ONE}, {"note": note})
    return path.stat().st_size - ONE.nbytes


@pytest.mark.parametrize("wrong", ["order", "dtype", "shape", "missing", "extra"])
def test_the_writer_keeps_to_its_declaration(tmp_path: Path, wrong: str) -> None:
    entries = {"a": ("F32", (2, 3)), "b": ("F32", (2, 3))}
    writes = {
        "order": [("b", ONE)],
        "dtype": [("a", ONE.astype(np.float64))],
        "shape": [("a", ONE.T)],
        "missing": [("a", ONE)],
        "extra": [("a", ONE), ("b", ONE), ("c", ONE)],
    }[wrong]

    def attempt() -> None:
        with SafetensorsWriter(tmp_path / "x.safetensors", entries) as writer:
            for name, array in writes:
                writer.write(name, array)

    with pytest.raises(ValueError, match="declared"):
        attempt()


def test_big_endian_and_strided_arrays_are_stored_right(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": ONE.astype(">f4"), "b": ONE.T})

    theirs = load_file(path)

    assert np.array_equal(theirs["a"], ONE)
    assert np.array_equal(theirs["b"], ONE.T)


def test_a_missing_tensor_and_a_wrong_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"n": np.arange(3)})
    checkpoint = Checkpoint.open(tmp_path)

    with pytest.raises(InputRefused, match="'q' is missing"):
        checkpoint.raw("q")
    with pytest.raises(InputRefused, match="'n' is I64; expected floating point"):
        checkpoint.float32("n")


def test_a_file_that_shrinks_while_open_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"a": ONE})
    checkpoint = Checkpoint.open(tmp_path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)

    with pytest.raises(InputRefused, match="ended inside tensor 'a'"):
        checkpoint.raw("a")


def test_reading_one_tensor_takes_memory_for_one_tensor(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.zeros(1 << 20, np.float32) for i in range(12)}
    write(tmp_path / "model.safetensors", arrays)
    checkpoint = Checkpoint.open(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()

    for name in checkpoint.tensors:
        checkpoint.raw(name)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * (4 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 << 10  # kilobytes
