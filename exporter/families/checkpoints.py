"""Published checkpoints: read in the newest names, written back in their own.

What a layout is stands in `layouts`, which ones a family has in the family's file. `medexport merge`
writes the newest names and the files that such a repository leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint
from exporter.families.layouts.joined import JoinedCheckpoint, parted
from exporter.families.layouts.left_out import left_out, without
from exporter.families.layouts.names import Layout
from exporter.families.layouts.published import TEMPLATE_FILE, PublishedLayout
from exporter.families.layouts.turned import TurnedCheckpoint
from exporter.families.prompts.textfiles import find_template
from exporter.families.table import ALL_FAMILIES


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The row for a parsed config.json. Raises `InputRefused` for an unknown model_type."""
    kind, text = config.get("model_type"), config.get("text_config")
    text_type = text.get("model_type") if isinstance(text, Mapping) else None
    layouts = [layout for family in ALL_FAMILIES.values() for layout in family.LAYOUTS]
    for layout in layouts:
        if kind in layout.model_types and layout.text_type in ("", text_type):
            return layout
    known = sorted(kind for layout in layouts for kind in layout.model_types)
    raise InputRefused(
        f"config.json: model_type {kind!r} has no table of tensor names; known: {', '.join(known)}"
    )


def published_layout(config: Mapping[str, Any]) -> PublishedLayout | None:
    """The layout of a parsed config.json; None where it is one of transformers'."""
    kind = str(config.get("model_type"))
    found = (f.PUBLISHED[kind] for f in ALL_FAMILIES.values() if kind in f.PUBLISHED)
    return next(found, None)


def modern_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as the newest class of transformers reads it. Raises `InputRefused` on a bad one."""
    layout = published_layout(config)
    return dict(config) if layout is None else layout.convert(config)


def published_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder in whatever layout. Raises `InputRefused` as `read_config` does."""
    families = ALL_FAMILIES.values()
    own = {k for f in families for k, layout in f.PUBLISHED.items() if layout.own_code}
    return read_config(folder / "config.json", own)


def folder_config(folder: Path) -> dict[str, Any]:
    """config.json of a published folder as the newest class reads it, with the sizes that only its
    tensors say. Raises `InputRefused`.
    """
    config = published_config(folder)
    layout = published_layout(config)
    if layout is not None and layout.sizes is not None:
        shapes = {n: info.shape for n, info in Checkpoint.open(folder).tensors.items()}
        config = {**config, **layout.sizes(shapes)}
    return modern_config(config)


def left_out_tensors(config: Mapping[str, Any], tensors: Checkpoint) -> dict[str, str]:
    """The tensors (by their newest names) of a published config.json that merging leaves out, and why."""
    layout = published_layout(config)
    if layout is None:
        return {}
    found = {} if layout.left_out is None else left_out(tensors, layout.left_out(config))
    for name, of in layout.copies(config).items() if layout.copies else ():
        if {name, of} <= tensors.tensors.keys() and tensors.same_bytes(name, of):
            found[name] = f"a second copy of '{of}'"
    return found


def joined_tensors(config: Mapping[str, Any], tensors: Checkpoint) -> Checkpoint:
    """`tensors` (by their newest names) of a published config.json, those published in parts as one,
    those published as one in parts, and turned ones the right way round; without those left out.

    Raises `InputRefused` when parts are missing or unequal.
    """
    layout = published_layout(config)
    if layout is None:
        return tensors
    tensors = without(tensors, left_out_tensors(config, tensors))
    if layout.cuts:
        tensors = parted(tensors, layout.cuts)
    if layout.joins:
        tensors = JoinedCheckpoint(tensors, layout.joins)
    return TurnedCheckpoint(tensors, layout.turned) if layout.turned else tensors


def published_tensors(config: Mapping[str, Any], tensors: Checkpoint) -> Checkpoint:
    """`tensors` (by their newest names) as the layout of `config` has them: renaming and
    `joined_tensors` undone.
    """
    layout = published_layout(config)
    if layout is None:
        return tensors
    published = layout.names.published
    tensors = parted(tensors, layout.joins).renamed(published)
    turned = {published(new): old for old, new in layout.turned.items()}
    return TurnedCheckpoint(JoinedCheckpoint(tensors, layout.cuts), turned)


def complete_published(checkpoint: Path, out: Path) -> None:
    """Write into `out` the small files that the layout of `checkpoint` leaves out and it has not.

    Nothing for a layout of transformers. Raises `InputRefused` when there is no tokenizer.json (a
    SentencePiece tokenizer is read by nothing here), and as the layout's `check` does.
    """
    config = published_config(checkpoint)
    layout = published_layout(config)
    if layout is None:
        return
    if layout.check is not None:
        layout.check(checkpoint, config)
    for name, content in layout.files.items():
        elsewhere = name == TEMPLATE_FILE and find_template(checkpoint) is not None
        if not (elsewhere or (checkpoint / name).is_file()):
            data = content.encode() if isinstance(content, str) else canonical_json(content)
            (out / name).write_bytes(data)
    if not (checkpoint / "tokenizer.json").is_file():
        raise InputRefused(f"{checkpoint}: no tokenizer.json; expected one ({layout.tokenizer})")
