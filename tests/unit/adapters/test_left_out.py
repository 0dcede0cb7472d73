"""Tensors that merging leaves out stand in merge.json with the reason, and nowhere else."""

from __future__ import annotations

import json

import pytest

from exporter.adapters.merge import merge_adapters
from exporter.core.tensors import Checkpoint
from exporter.families.layouts.bert import MASKED_WORDS, POOLER
from tests.support.tiny_bert import write_tiny_bert
from tests.support.tiny_medclip import write_tiny_medclip


@pytest.mark.parametrize("old_names", [False, True])
def test_heads_of_pre_training_are_listed(tmp_path, old_names):
    base, merged = write_tiny_bert(tmp_path / "base", old_names=old_names), tmp_path / "merged"
    merged.mkdir()
    merge_adapters(base, [], merged)
    proof = json.loads((merged / "merge.json").read_text())
    kept, stored = Checkpoint.open(merged).tensors.keys(), Checkpoint.open(base).tensors.keys()
    assert len(kept) + len(proof["left_out"]) == len(stored)
    assert not kept & proof["left_out"].keys()
    assert proof["left_out"]["bert.pooler.dense.weight"] == POOLER
    assert proof["left_out"]["cls.predictions.bias"] == MASKED_WORDS
    assert set(proof["left_out"].values()) == {POOLER, MASKED_WORDS}
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["BertModel"]


def test_a_head_that_is_used_keeps_its_pooler(tmp_path):
    base = write_tiny_bert(tmp_path / "base", architecture="BertForSequenceClassification")
    (tmp_path / "merged").mkdir()
    merge_adapters(base, [], tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["left_out"] == {}
    assert "bert.pooler.dense.weight" in Checkpoint.open(tmp_path / "merged")


def test_a_merged_folder_merges_again(tmp_path):
    base = write_tiny_medclip(tmp_path / "base")
    for source, out in ((base, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")):
        out.mkdir()
        merge_adapters(source, [], out)
    once, twice = (tmp_path / name / "model.safetensors" for name in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()
    assert (tmp_path / "once/config.json").read_bytes() == (
        tmp_path / "twice/config.json"
    ).read_bytes()
