"""Checkpoints published in another layout than transformers': their config and names, in both directions.

A layout is data: how config.json reads as the class that transformers has, and pairs of name stems.
`medexport merge` writes the newest names and the files that such a repository leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint
from exporter.families.bert_published import OLD_NAMES as BERT_NAMES
from exporter.families.bert_published import bert_config, bert_left_out
from exporter.families.biomedclip_published import IMAGES as BIOMEDCLIP_IMAGES
from exporter.families.biomedclip_published import LEFT_OUT as BIOMEDCLIP_LEFT_OUT
from exporter.families.biomedclip_published import biomedclip_config, check_open_clip
from exporter.families.biomedclipseg_specs import IMAGES as BIOMED_SEG_IMAGES
from exporter.families.biomedclipseg_specs import MODEL_TYPE as BIOMED_SEG
from exporter.families.biomedclipseg_specs import PUBLISHED_NAMES as BIOMED_SEG_NAMES
from exporter.families.biomedclipseg_specs import biomedclipseg_config
from exporter.families.chest_images import CHEST_IMAGES
from exporter.families.cris_specs import IMAGES as CRIS_IMAGES
from exporter.families.cris_specs import MODEL_TYPE as CRIS
from exporter.families.cris_specs import PUBLISHED_NAMES as CRIS_NAMES
from exporter.families.cris_specs import cris_config
from exporter.families.idefics_prompts import TEMPLATE as IDEFICS_TEMPLATE
from exporter.families.joined import Joined, JoinedCheckpoint, parted
from exporter.families.left_out import left_out, without
from exporter.families.llava_med_published import (
    LLAVA_MED_IMAGES,
    LLAVA_MED_TEMPLATE,
    llava_med_config,
)
from exporter.families.medclip_published import IMAGES as MEDCLIP_IMAGES
from exporter.families.medclip_published import LEFT_OUT as MEDCLIP_LEFT_OUT
from exporter.families.medclip_published import OLD_NAMES as MEDCLIP_NAMES
from exporter.families.medclip_published import medclip_config
from exporter.families.medfilip_published import medfilip_config
from exporter.families.moondream_published import (
    OLDER_NAMES,
    PUBLISHED_TYPE,
    REVISION,
    check_code,
    moondream_config,
)
from exporter.families.openai_clip import (
    CHEXZERO,
    CUTS,
    TURNED,
    openai_clip_config,
    openai_clip_sizes,
)
from exporter.families.openai_clip import NAMES as OPENAI_CLIP_NAMES
from exporter.families.t5_specs import LEFT_OUT as T5_LEFT_OUT
from exporter.families.t5_specs import newest_config, t5_copies
from exporter.families.textfiles import find_template
from exporter.families.turned import TurnedCheckpoint
from exporter.families.xraygpt_published import (
    IMAGES,
    JOINS,
    NAMES,
    TEMPLATE,
    xraygpt_config,
)
from exporter.families.xraygpt_published import PUBLISHED_TYPE as XRAYGPT

TEMPLATE_FILE = "chat_template.jinja"


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


PUBLISHED: Mapping[str, PublishedLayout] = {
    "llava_mistral": PublishedLayout(
        llava_med_config,
        NameMap(
            (
                ("model.embed_tokens", "model.language_model.embed_tokens"),
                ("model.layers", "model.language_model.layers"),
                ("model.norm", "model.language_model.norm"),
                ("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
                ("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
                ("model.vision_tower.vision_tower.vision_model", "model.vision_tower"),
            )
        ),
        "it publishes tokenizer.model alone: take that of mistralai/Mistral-7B-Instruct-v0.2, which has "
        "the same tokens, or let transformers' AutoTokenizer save one",
        {
            "chat_template.jinja": LLAVA_MED_TEMPLATE,
            "preprocessor_config.json": LLAVA_MED_IMAGES,
        },
    ),
    PUBLISHED_TYPE: PublishedLayout(
        moondream_config,
        NameMap(OLDER_NAMES),
        f"take that of the hub's revision {REVISION}",
        check=check_code,
    ),
    # Names and config are transformers' own.
    "idefics": PublishedLayout(
        dict,
        NameMap(()),
        "let transformers' AutoTokenizer save one",
        {TEMPLATE_FILE: IDEFICS_TEMPLATE},
    ),
    XRAYGPT: PublishedLayout(
        xraygpt_config,
        NameMap(NAMES),
        "Vicuna's tokenizer.model is Llama's: let transformers' AutoTokenizer save one",
        {TEMPLATE_FILE: TEMPLATE, "preprocessor_config.json": IMAGES},
        joins=JOINS,
    ),
    BIOMED_SEG: PublishedLayout(
        biomedclipseg_config,
        NameMap(BIOMED_SEG_NAMES),
        "take that of microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        {"preprocessor_config.json": BIOMED_SEG_IMAGES},
    ),
    CRIS: PublishedLayout(
        cris_config,
        NameMap(CRIS_NAMES),
        "take that of openai/clip-vit-base-patch32, which has the same tokens",
        {"preprocessor_config.json": CRIS_IMAGES},
    ),
    # Names are transformers' own; its config says two things by one key.
    "t5": PublishedLayout(
        newest_config,
        NameMap(()),
        "let transformers' AutoTokenizer save one",
        left_out=lambda _: T5_LEFT_OUT,
        copies=t5_copies,
    ),
    CHEXZERO: PublishedLayout(
        openai_clip_config,
        NameMap(OPENAI_CLIP_NAMES),
        "take that of openai/clip-vit-base-patch32, which has the same tokens",
        {"preprocessor_config.json": CHEST_IMAGES},
        cuts=CUTS,
        turned=TURNED,
        sizes=openai_clip_sizes,
    ),
    **{
        kind: PublishedLayout(
            bert_config,
            NameMap(BERT_NAMES[kind]),
            "let transformers' AutoTokenizer save one",
            left_out=bert_left_out,
        )
        for kind in BERT_NAMES
    },
    # Names are open_clip's.
    "biomedclip": PublishedLayout(
        biomedclip_config,
        NameMap(()),
        "take that of microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
        {"preprocessor_config.json": BIOMEDCLIP_IMAGES},
        check=check_open_clip,
        left_out=lambda _: BIOMEDCLIP_LEFT_OUT,
    ),
    "medclip": PublishedLayout(
        medclip_config,
        NameMap(MEDCLIP_NAMES),
        "take that of emilyalsentzer/Bio_ClinicalBERT, saved by transformers' AutoTokenizer",
        {"preprocessor_config.json": MEDCLIP_IMAGES},
        left_out=lambda _: MEDCLIP_LEFT_OUT,
    ),
    # Names are its own code's; its image settings are those of its user's training set.
    "medfilip": PublishedLayout(
        medfilip_config, NameMap(()), "take that of openai/clip-vit-base-patch32"
    ),
}


def published_layout(config: Mapping[str, Any]) -> PublishedLayout | None:
    """The layout of a parsed config.json; None where it is one of transformers'."""
    return PUBLISHED.get(str(config.get("model_type")))


def modern_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as the newest class of transformers reads it. Raises `InputRefused` on a bad one."""
    layout = published_layout(config)
    return dict(config) if layout is None else layout.convert(config)


def folder_config(folder: Path) -> dict[str, Any]:
    """config.json of a published folder as the newest class reads it, with the sizes that only its
    tensors say. Raises `InputRefused`.
    """
    config = read_config(folder / "config.json")
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
    config = read_config(checkpoint / "config.json")
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
