"""What is read from the command line of `medexport run`."""

from __future__ import annotations

import pytest

from exporter.cli.answers import split_labels
from exporter.core.errors import WrongUsage


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ("ct, mri ,x-ray", ("ct", "mri", "x-ray")),
        ("气胸，胸腔积液、未见异常", ("气胸", "胸腔积液", "未见异常")),
        ("ct,,ct", ("ct",)),
        (None, ()),
    ],
)
def test_labels_are_split_at_commas_of_either_script(given, labels):
    assert split_labels(given, None) == labels


def test_labels_of_a_file_are_lines_and_keep_their_commas(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("effusion, left\n\n气胸\n", encoding="utf-8")
    assert split_labels(None, file) == ("effusion, left", "气胸")


@pytest.mark.parametrize("given", [",", " ，、"])
def test_commas_alone_are_refused(given):
    with pytest.raises(WrongUsage, match="no label"):
        split_labels(given, None)


def test_two_sources_of_labels_are_refused(tmp_path):
    with pytest.raises(WrongUsage, match="not both"):
        split_labels("ct", tmp_path / "labels.txt")
