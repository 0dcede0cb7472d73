"""Reads sizes out of dotted config keys, and says which one is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused

FROM_PROFILE = (
    "expected a positive integer in the profile: give --model DIR or --weights DIR with your own "
    "config.json"
)
FROM_FOLDER = (
    "expected a positive integer in the folder's config.json or preprocessor_config.json: correct the "
    "file"
)


@dataclass(frozen=True)
class ConfigFacts:
    """Values of config.json by dotted key, of the image processor, and the pixel bound asked for.

    `advice`: what to do where a size is missing.
    """

    title: str
    values: Mapping[str, Value]
    image: Mapping[str, Value]
    max_pixels: int | None = None
    advice: str = FROM_PROFILE

    def size(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is known, as a positive integer.

        Raises `InputRefused` when none is known and there is no `default`, or it is no size.
        """
        return _size(self.title, self.values, keys, default, self.advice)

    def limit(self, key: str, default: int | None = None) -> int:
        """A positive integer of the image processor. Raises `InputRefused` as `size` does."""
        title = f"{self.title}, image processor"
        return _size(title, self.image, (key,), default, self.advice)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean of the config."""
        value = self.values.get(key, default)
        return bool(value)

    def sizes(self, key: str) -> tuple[int, ...]:
        """A list of integers; empty when unknown."""
        value = self.values.get(key, ())
        return tuple(int(v) for v in value if type(v) is int) if isinstance(value, tuple) else ()

    def counts(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of positive integers of the config, `default` where it is unknown.

        Raises `InputRefused` when it is something else.
        """
        found = self.values.get(key, default)
        if not isinstance(found, tuple) or not found:
            raise InputRefused(
                f"{self.title}: {key} is {found!r}; expected a list of positive integers"
            )
        whole = tuple(n for n in found if type(n) is int and n > 0)
        if len(whole) != len(found):
            raise InputRefused(
                f"{self.title}: {key} is {list(found)}; expected a list of positive integers"
            )
        return whole

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        """A list of integer pairs of the image processor or the config; empty when unknown."""
        value = self.image.get(key, self.values.get(key, ()))
        rows = value if isinstance(value, tuple) else ()
        return tuple((r[0], r[1]) for r in rows if isinstance(r, tuple) and len(r) == 2)


def _size(
    title: str,
    values: Mapping[str, Value],
    keys: tuple[str, ...],
    default: int | None,
    advice: str,
) -> int:
    found = next((values[k] for k in keys if values.get(k) is not None), default)
    if type(found) is not int or found < 1:
        said = "not published" if found is None else f"{found!r}"
        raise InputRefused(
            f"{title}: {keys[0]} is {said}, and no plan can be made without it; {advice}"
        )
    return found
