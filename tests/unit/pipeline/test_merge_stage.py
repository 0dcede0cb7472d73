"""What the merge stage says of an adapter beside making its files."""

from __future__ import annotations

from pathlib import Path

from exporter.catalog.schema import AdapterRecipe
from exporter.pipeline.stages import merge_and_prove
from tests.unit.adapters.synthetic import write_base, write_lora


def test_it_says_where_an_adapter_differs_from_the_profiles_recipe(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base"), write_lora(tmp_path / "lora")
    said = []
    for name, recipe in (
        ("other", AdapterRecipe(("q_proj", "up_proj"), 0.5)),
        ("same", AdapterRecipe(("q_proj",), 2.0)),
        ("none", None),
    ):
        out = tmp_path / name
        out.mkdir()
        said.append(merge_and_prove(base, [adapter], out, prove=False, recipe=recipe))
        assert (out / "merge.json").is_file()
    assert said == ["unlike the profile's recipe: scaling 2 (0.5); not on up_proj", "", ""]


def test_without_an_adapter_there_is_nothing_to_say(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert not merge_and_prove(write_base(tmp_path / "base"), [], out, recipe=AdapterRecipe(("a",)))
