"""Which model `--model` means: a profile, its alias, or a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.core.errors import EnvironmentLacks, InputRefused, WrongUsage
from exporter.pipeline.resolve import is_model_folder, resolve, weights_at_hand
from tests.support.tiny import write_tiny_model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with folders called as an alias, as a profile and as nothing known."""
    monkeypatch.chdir(tmp_path)
    for name in ("smolvlm", "medbridge", "mine"):
        write_tiny_model(tmp_path / name)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("smolvlm", False),
        ("smolvlm-500m", False),
        ("medbridge", False),
        ("./smolvlm", True),
        ("smolvlm/", True),
        ("mine", True),
        ("empty", False),
        ("none", False),
    ],
)
def test_a_profile_goes_before_a_folder_of_its_name(here: Path, model: str, folder: bool) -> None:
    assert is_model_folder(model) is folder


def test_weights_in_a_folder_of_the_profiles_name_are_checked_against_it(here: Path) -> None:
    with pytest.raises(InputRefused, match="SmolVLM-500M"):
        resolve("smolvlm", Path("smolvlm"), (), offline=True)
    found = resolve("./smolvlm", None, (), offline=True)
    assert (found.profile.name, found.profile.hub) == ("smolvlm", None)
    assert not weights_at_hand("smolvlm", None)
    assert weights_at_hand("./smolvlm", None)


def test_without_weights_the_folder_is_pointed_at(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "cache"))
    said = r"give --weights DIR, or --model \./smolvlm to mean the folder of that name"
    with pytest.raises(EnvironmentLacks, match=said) as caught:
        resolve("smolvlm", None, (), offline=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(WrongUsage, match=r"names no hub repository.*--model \./medbridge"):
        resolve("medbridge", None, (), offline=True)
    with pytest.raises(EnvironmentLacks) as caught:
        resolve("smolvlm-256m", None, (), offline=True)
    assert str(caught.value).endswith("give --weights DIR")
