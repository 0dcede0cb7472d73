"""Image sets: read whole, or refused with the file and the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter.calibrate import setfiles
from exporter.calibrate.sets import open_set
from exporter.core.cases import Case
from exporter.core.errors import InputRefused, WrongUsage

Rows = list[dict[str, Any]]


def write_set(folder: Path, edit: Callable[[Rows], Any] = lambda rows: None, **head: Any) -> Path:
    """A set of three images; `edit` changes the rows before they are hashed, `head` set.json."""
    (folder / "images").mkdir(parents=True)
    rows: Rows = []
    for i in range(3):
        path = folder / "images" / f"{i}.png"
        Image.new("L", (8, 8), 40 * i).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        row = {"id": f"s{i}", "image": path.name, "sha256": digest, "patient": f"p{i // 2}"}
        rows.append(
            row
            | {"modality": "CT", "caption": f"Ein Bild, Größe {i} mm.", "facts": [i, {"a": "b"}]}
        )
    edit(rows)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (folder / "samples.jsonl").write_bytes(text)
    values = {"schema": 1, "name": "try", "prompt": "Describe.", "samples": 3, "about": "drawings"}
    values["samples_sha256"] = hashlib.sha256(text).hexdigest()
    (folder / "set.json").write_text(json.dumps(values | head))
    return folder


def test_a_good_set(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    found = open_set(str(folder))
    assert (found.name, found.prompt, len(found.samples)) == ("try", "Describe.", 3)
    last = found.samples[2]
    assert (last.id, last.patient, last.modality) == ("s2", "p1", "CT")
    assert last.caption == "Ein Bild, Größe 2 mm."
    assert last.facts == (2, {"a": "b"})
    assert last.image_path == folder / "images" / "2.png"
    assert found.cases()[2] == Case("s2", last.image_path, "p1", "CT", last.caption)


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    first, same = (open_set(str(write_set(tmp_path / n))) for n in "ab")
    other = open_set(str(write_set(tmp_path / "c", lambda rows: rows[0].update(caption="x"))))
    prompt = open_set(str(write_set(tmp_path / "d", prompt="Other.")))
    assert first.digest == same.digest
    assert len({first.digest, other.digest, prompt.digest}) == 3


def test_names_resolve_to_the_shipped_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "phantoms")
    monkeypatch.setattr(setfiles, "data_root", lambda kind: tmp_path)
    assert open_set("phantoms").name == "try"
    with pytest.raises(WrongUsage, match=r"no image set 'nothing'.*phantoms"):
        open_set("nothing")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda rows: rows[1].update(patient=7),
            r"samples.jsonl:2: Expected `str`, got `int`.*patient",
        ),
        (
            lambda rows: rows[2].pop("modality"),
            r"samples.jsonl:3: .*missing required field `modality`",
        ),
        (lambda rows: rows[0].update(extra=1), r"samples.jsonl:1: .*unknown field `extra`"),
        (lambda rows: rows[2].update(id="s0"), r"samples.jsonl:3: id 's0' occurs twice"),
        (lambda rows: rows[1].update(sha256="0" * 64), r"samples.jsonl:2: 1.png has sha256"),
        (lambda rows: rows[1].update(image="9.png"), r"samples.jsonl:2: image .*9.png is missing"),
        (
            lambda rows: rows[1].update(image="../set.json"),
            "samples.jsonl:2: .*not a plain file name",
        ),
        (lambda rows: rows[1].update(image="/etc/passwd"), "not a plain file name"),
        (lambda rows: rows[1].update(image="..\\x.png"), "not a plain file name"),
        (lambda rows: rows[1].update(image=".."), "not a plain file name"),
        (lambda rows: rows[1].update(image=""), "not a plain file name"),
        (lambda rows: rows[1].update(image="a\0b"), "not a plain file name"),
        (lambda rows: rows.pop(), "2 samples, set.json says 3"),
    ],
)
def test_bad_rows_are_refused_with_their_line(
    tmp_path: Path, edit: Callable[[Rows], Any], message: str
) -> None:
    folder = write_set(tmp_path / "set", edit)
    with pytest.raises(InputRefused, match=message) as refused:
        open_set(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"schema": 2}, "schema 2; this version reads schema 1"),
        ({"samples": "3"}, r"set.json: Expected `int`, got `str`"),
        ({"prompt": None}, r"set.json: Expected `str`"),
        ({"samples_sha256": "abc"}, "the set was changed"),
    ],
)
def test_bad_heads_are_refused(tmp_path: Path, head: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        open_set(str(write_set(tmp_path / "set", **head)))


def test_changed_files_are_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    image = folder / "images" / "1.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:-1] + b"x")
    with pytest.raises(InputRefused, match=r"1.png has sha256"):
        open_set(str(folder))
    (tmp_path / "elsewhere.png").write_bytes(whole)
    image.unlink()
    image.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(InputRefused, match="not a regular file"):
        open_set(str(folder))
    image.unlink()
    image.write_bytes(whole)
    assert open_set(str(folder)).name == "try"
    (folder / "samples.jsonl").unlink()
    with pytest.raises(InputRefused, match=r"samples.jsonl: No such file"):
        open_set(str(folder))


def test_invalid_utf8_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    (folder / "set.json").write_bytes(b'{"schema": 1, "name": "\xff"}')
    with pytest.raises(InputRefused, match=r"set.json"):
        open_set(str(folder))
