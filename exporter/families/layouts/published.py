"""A checkpoint published in another layout than transformers': its config and names, as data.

A layout is how config.json reads as the class that transformers has, and pairs of name stems, which
work in both directions. Each family's file holds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.families.layouts.joined import Joined
from exporter.families.layouts.names import NameMap

TEMPLATE_FILE = "chat_template.jinja"
# What most repositories without a tokenizer.json need.
SAVE_TOKENIZER = "let transformers' AutoTokenizer save one"


@dataclass(frozen=True)
class PublishedLayout:
    """One published layout: `convert` turns its config.json into the newest class's.

    `tokenizer`: where there is a tokenizer.json, which every layout needs; `files`: small files that
    the repository leaves out: name to a template's text, or to JSON; `check` compares a folder's
    other files with its config.json, and raises `InputRefused`; `joins`: tensors that are published in
    parts, by their newest names.

    What one published tensor holds several of (a fused ``qkv``) is in `cuts`, whose wholes are
    published and whose parts are the newest ones; matrices stored as ``[inputs, outputs]`` are in
    `turned`, whole name to newest name. Both see the names that `names` gives (the renaming comes
    first), and cuts are the same endings before it. `sizes` gives the keys that config.json leaves out, from the shapes of the published
    tensors. `left_out` of a config.json: stems of newest names that merging leaves out, with the reason;
    `copies` of a config.json: a tensor to the one that it may be a second copy of, left out where it is.
    `own_code`: the repository has code beside the weights, which is never run.
    """

    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    names: NameMap
    tokenizer: str
    files: Mapping[str, str | Mapping[str, Any]] = field(default_factory=dict)
    check: Callable[[Path, Mapping[str, Any]], None] | None = None
    joins: tuple[Joined, ...] = ()
    cuts: tuple[Joined, ...] = ()
    turned: Mapping[str, str] = field(default_factory=dict)
    sizes: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]] | None = None
    left_out: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None
    copies: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None
    own_code: bool = False


def modern(config: Mapping[str, Any], layouts: Mapping[str, PublishedLayout]) -> dict[str, Any]:
    """`config` as the newest class reads it, by the layout of its model_type where there is one.

    Raises `InputRefused` on a bad one.
    """
    layout = layouts.get(str(config.get("model_type")))
    return dict(config) if layout is None else layout.convert(config)
