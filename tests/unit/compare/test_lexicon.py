from pathlib import Path

import pytest
import yaml

from exporter.compare.quality.lexicon import build_matcher, phrase_pattern, read_lexicon
from exporter.core.data import data_root
from exporter.core.errors import InputRefused

SHIPPED = data_root("profiles") / "lexicon" / "clinical-en.yaml"


def test_longest_phrase_wins_and_nouns_take_a_plural() -> None:
    matcher = build_matcher(
        {
            ("finding", "fracture"): ("fracture",),
            ("finding", "compression fracture"): ("compression fracture",),
        }
    )
    found = matcher.find("two compression-fractures and a fracture, no microfracture")
    assert [m.concept for m in found] == ["compression fracture", "fracture"]


@pytest.mark.parametrize(
    ("phrase", "text", "matches"),
    [
        ("heart size~ is enlarged", "heart is enlarged", True),
        ("heart size~ is enlarged", "heart size is enlarged", True),
        ("left|right kidney", "right kidney", True),
        ("left|right kidney", "kidney", False),
        ("stone in the left|right~ kidney", "stone in the kidney", True),
        ("c++ node", "c++ nodes", True),
    ],
)
def test_notation(phrase: str, text: str, matches: bool) -> None:
    import re

    assert (re.fullmatch(phrase_pattern(phrase, plural=True), text) is not None) == matches


def test_no_phrase_names_two_concepts_of_a_kind() -> None:
    lexicon = read_lexicon()
    for kind in ("modality", "anatomy", "finding", "device", "laterality", "severity"):
        phrases = [p for listed in getattr(lexicon, kind).values() for p in listed]
        double = {p for p in phrases if phrases.count(p) > 1}
        assert not double, f"{kind}: {double}"


def test_every_phrase_is_text() -> None:
    """YAML reads a bare `no` as false: it would vanish from the triggers."""
    lexicon = read_lexicon()
    assert "no" in lexicon.negation.before
    assert {"no", "on"} <= lexicon.breaks


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": "one"}, "version"),
        ({"colour": {}}, "colour"),
        ({"finding": {"nodule": [False]}}, "finding"),
    ],
)
def test_wrong_files_are_refused_with_the_place(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    data = yaml.safe_load(SHIPPED.read_text(encoding="utf-8")) | change
    path = tmp_path / "lexicon.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(InputRefused, match=expected):
        read_lexicon(path)


def test_not_yaml_and_missing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.yaml"
    with pytest.raises(InputRefused, match="cannot be read"):
        read_lexicon(path)
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(InputRefused, match="not YAML"):
        read_lexicon(path)
