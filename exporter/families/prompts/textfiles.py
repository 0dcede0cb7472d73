"""The text side of a model folder: tokenizer, chat template, special and stop tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json
from exporter.families.prompts.chat import MAX_TEMPLATE

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer.json of a folder, without truncation. Raises `InputRefused`."""
    path = folder / "tokenizer.json"
    read_json(path)  # for its one-line errors and its size limit
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise InputRefused(f"{path}: not a tokenizer ({str(error)[:200]})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_image_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """The image processor's settings and the path they stand in. Raises `InputRefused`."""
    processor = read_optional(folder / "processor_config.json")
    # transformers 5 saves them inside processor_config.json alone.
    nested = processor.get("image_processor")
    where = folder / ("processor_config.json" if nested else "preprocessor_config.json")
    return (nested if isinstance(nested, dict) else read_json(where)), str(where)


def read_template(folder: Path) -> tuple[str, str]:
    """Source and place of the chat template: the newest place first, as transformers looks.

    Raises `InputRefused` when there is none.
    """
    found = find_template(folder)
    if found is None:
        raise InputRefused(
            f"{folder}: no chat template; expected chat_template.jinja, chat_template.json or one in "
            "tokenizer_config.json"
        )
    return found


def find_template(folder: Path) -> tuple[str, str] | None:
    """As `read_template`; None when there is none."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        with plain.open("rb") as file:
            return file.read(5 * MAX_TEMPLATE).decode(errors="replace"), str(plain)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        source = _default(read_optional(folder / name).get("chat_template"))
        if source is not None:
            return source, str(folder / name)
    return None


def special_tokens(folder: Path) -> dict[str, str]:
    """Texts of bos, eos, pad and unk where tokenizer_config.json names them."""
    config = read_optional(folder / "tokenizer_config.json")
    found = {key: config.get(key) for key in SPECIAL}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def stop_ids(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, also: Sequence[str] = ()
) -> frozenset[int]:
    """Tokens that end an answer: the declared ones and those of the texts `also`.

    Raises `InputRefused` when the folder names none.
    """
    path = folder / "generation_config.json"
    text = config.get("text_config") or {}
    declared = read_optional(path).get(
        "eos_token_id", config.get("eos_token_id", text.get("eos_token_id"))
    )
    ids = declared if isinstance(declared, list) else [declared]
    stops = {i for i in [*ids, *map(tokenizer.token_to_id, also)] if i is not None}
    if not stops or not all(type(i) is int for i in stops):
        raise InputRefused(f"{path}: eos_token_id is {declared!r}; expected a token id or a list")
    return frozenset(stops)


def _default(template: object) -> str | None:
    """A template as published: a text, or a list of named ones of which "default" counts."""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
