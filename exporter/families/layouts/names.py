"""Names of tensors: which layouts there were, and how each is brought to the newest.

transformers moved the parts of its vision-language models twice (4.52 and 5.0), and peft writes the
names of the version it ran under. All layouts of an architecture are brought to one, the newest.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NameMap:
    """(published, newest) stems of tensor names, whole path elements; the longest that fits counts.

    ``*`` stands for one path element, such as a layer's number, and is the same on both sides.
    """

    pairs: tuple[tuple[str, str], ...]

    def newest(self, name: str) -> str:
        """The newest name of a published one; a name of no pair stays as it is."""
        return _swapped(name, self.pairs)

    def published(self, name: str) -> str:
        """The published name of a newest one: the inverse of `newest`."""
        return _swapped(name, tuple((new, old) for old, new in self.pairs))


@dataclass(frozen=True)
class Layout:
    """Names of one architecture in transformers 5.

    `renames`: (older, newest) leading path elements, applied in order; what they give is left alone
    by them. `head`: empty where no matrix is the embedding's counterpart. `conv1d`: last path elements
    of modules that store their weight transposed. `text_type`: the text part's model_type where names
    depend on it.
    """

    model_types: tuple[str, ...]
    renames: tuple[tuple[str, str], ...]
    embedding: str
    head: str = ""
    conv1d: tuple[str, ...] = ()
    text_type: str = ""

    def canonical(self, name: str) -> str:
        """`name` (a tensor or module of any layout) as transformers 5 calls it."""
        for old, new in self.renames:
            found = swap_stem(name, old, new)
            name = name if found is None else found
        return name


def swap_stem(name: str, old: str, new: str) -> str | None:
    """`name` with the stem `new` in place of its stem `old`; None when it begins with another."""
    elements, stem = name.split("."), old.split(".")
    found = elements[: len(stem)]
    if len(found) != len(stem) or any(e not in (f, "*") for f, e in zip(found, stem, strict=True)):
        return None
    free = iter([f for f, e in zip(found, stem, strict=True) if e == "*"])
    swapped = [next(free) if element == "*" else element for element in new.split(".")]
    return ".".join([*swapped, *elements[len(stem) :]])


def _swapped(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    fitting = [
        (old, found) for old, new in pairs if (found := swap_stem(name, old, new)) is not None
    ]
    if not fitting:
        return name
    return max(fitting, key=lambda pair: pair[0].count("."))[1]
