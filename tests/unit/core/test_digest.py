"""Digests: published values, and what a folder's digest does and does not depend on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.core import digest
from exporter.core.digest import (
    canonical_json,
    list_files,
    sha256_bytes,
    sha256_file,
    sha256_json,
    sha256_tree,
)

# FIPS 180-2, appendix B.1.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def test_published_value() -> None:
    assert sha256_bytes(b"abc") == ABC


def test_a_file_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 11
    (tmp_path / "a").write_bytes(data)
    monkeypatch.setattr(digest, "CHUNK", 100)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), JSON, max_size=6))
def test_order_of_keys_does_not_count(value: dict[str, object]) -> None:
    turned = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(turned)
    assert sha256_json(value) == sha256_json(turned)


def test_nan_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_tree_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        for file in ("b", "sub/a", "a b"):
            (tmp_path / name / file).write_text(file)
    os.utime(tmp_path / "two" / "b", (0, 0))
    assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "two")
    assert [p.as_posix() for p in list_files(tmp_path / "one")] == ["a b", "b", "sub/a"]
    before = sha256_tree(tmp_path / "one")
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "c")
    (tmp_path / "one" / "b").write_text("B")
    assert len({before, sha256_tree(tmp_path / "one"), sha256_tree(tmp_path / "two")}) == 3


def test_a_link_to_a_file_counts_as_the_file(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "blob").write_text("x")
    (tmp_path / "plain" / "a").write_text("x")
    (tmp_path / "linked" / "a").symlink_to(tmp_path / "blob")
    assert sha256_tree(tmp_path / "plain") == sha256_tree(tmp_path / "linked")
