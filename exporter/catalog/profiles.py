"""Finds and reads profiles. A name nobody has is answered with the nearest ones."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import TypeVar

import msgspec

from exporter.catalog.schema import ModelProfile, TargetProfile
from exporter.core.data import data_root
from exporter.core.errors import InputRefused, WrongUsage

P = TypeVar("P", ModelProfile, TargetProfile)


def read_profile(path: Path, kind: type[P]) -> P:
    """Read one YAML profile. Raises `InputRefused` with the place and the type expected."""
    import yaml

    try:
        # libyaml's safe loader where there is one: fifty profiles in 0.1 s instead of 1 s.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 (both safe)
        profile = msgspec.convert(content, kind)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise InputRefused(f"{path}: not YAML ({line}); correct the file") from error
    except msgspec.ValidationError as error:
        raise InputRefused(f"{path}: {error}; see docs/profiles.md for the keys") from error
    if profile.name != path.stem:
        raise InputRefused(
            f"{path}: name is '{profile.name}', expected the file's own '{path.stem}'"
        )
    return profile


@cache
def model_profiles() -> dict[str, ModelProfile]:
    """All shipped model profiles by name."""
    return _read_all("models", ModelProfile)


@cache
def target_profiles() -> dict[str, TargetProfile]:
    """All shipped target profiles by name."""
    return _read_all("targets", TargetProfile)


def find_model(name: str) -> ModelProfile:
    """The profile called `name` or with that alias, or the profile file at that path.

    Raises `WrongUsage` with the nearest names when there is none.
    """
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return read_profile(Path(name), ModelProfile)
    if (own := _by_name("models", name, ModelProfile)) is not None:
        return own
    profiles = model_profiles()
    names = {n: p for p in profiles.values() for n in (p.name, *p.aliases)}
    return _find(name, names, "model profile", "medexport models")


def find_target(name: str) -> TargetProfile:
    """The target called `name`. Raises `WrongUsage` with the nearest names when there is none."""
    if (own := _by_name("targets", name, TargetProfile)) is not None:
        return own
    return _find(name, target_profiles(), "target", "medexport targets")


def _find(name: str, known: dict[str, P], what: str, listing: str) -> P:
    if name in known:
        return known[name]
    # A shortened name is the commonest mistake, and edit distance ranks it below shorter names.
    begun: list[str] = sorted(n for n in known if n.startswith(name.lower()))
    close: list[str] = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    near = list(dict.fromkeys([*begun, *close]))[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}."
    raise WrongUsage(f"no {what} '{name}'; {hint} `{listing}` lists all")


def _by_name(folder: str, name: str, kind: type[P]) -> P | None:
    """The one file of that name, read without the others."""
    path = data_root("profiles") / folder / f"{name}.yaml"
    return read_profile(path, kind) if Path(name).name == name and path.is_file() else None


def _read_all(folder: str, kind: type[P]) -> dict[str, P]:
    paths = sorted((data_root("profiles") / folder).glob("*.yaml"))
    return {path.stem: read_profile(path, kind) for path in paths}
