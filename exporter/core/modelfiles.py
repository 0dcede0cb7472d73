"""The small files of a model folder: which there are, and how they are read without trust."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from exporter.core.errors import InputRefused

MAX_JSON = 64 << 20
# Everything beside the weights that a runtime needs; missing ones are skipped when copying.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Keys that made loaders import or run code (CVE-2026-4372; peft 3085): refused, never passed on.
DANGEROUS_KEYS = frozenset(
    {
        "_attn_implementation_internal",
        "auto_map",
        "auto_mapping",
        "megatron_core",
        "megatron_config",
        "parent_library",
        "trust_remote_code",
    }
)
MODELING = re.compile(
    r"transformers\.models\.\w+\.modeling_\w+|exporter\.families\.reference\.\w+", re.ASCII
)

LOCAL_CODE = re.compile(r"\w+\.\w+", re.ASCII)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises `InputRefused`."""
    if not path.is_file():
        raise InputRefused(f"{path}: no such file; expected a model folder with {path.name}")
    if path.stat().st_size > MAX_JSON:
        raise InputRefused(f"{path}: {path.stat().st_size} bytes; expected at most {MAX_JSON}")
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{path}: not JSON ({error}); write the file again") from error
    if not isinstance(value, dict):
        raise InputRefused(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def read_config(path: Path, own_code: Collection[str] = ()) -> dict[str, Any]:
    """A config.json or adapter_config.json without keys that could make a loader run code.

    A key of `DANGEROUS_KEYS` is refused at any depth (`InputRefused`), unless its value is null or
    what peft itself writes into every adapter_config.json (`_is_harmless`).

    `own_code`: model_types published with code of their own beside the weights. A class of ours reads
    them and that code is never run, so that its name in auto_map is of no use and no harm, and is left
    out; code in another repository is refused.
    """
    config = read_json(path)
    if config.get("model_type") in own_code and _names_local_code(config.get("auto_map")):
        del config["auto_map"]
    _refuse_dangerous(path, config)
    return config


def _names_local_code(auto_map: Any) -> bool:
    return isinstance(auto_map, dict) and all(
        isinstance(value, str) and LOCAL_CODE.fullmatch(value) for value in auto_map.values()
    )


def copy_small_files(source: Path, target: Path) -> list[str]:
    """Copy the files of `SMALL_FILES` that exist, as regular files; returns their names.

    Links are followed (the hub's cache consists of them). Raises `InputRefused` for a file that is
    larger than any of its kind.
    """
    names = [name for name in SMALL_FILES if (source / name).is_file()]
    for name in names:
        size = (source / name).stat().st_size
        if size > MAX_JSON:
            raise InputRefused(f"{source / name}: {size} bytes; expected at most {MAX_JSON}")
        shutil.copyfile(source / name, target / name)
    return names


def _is_harmless(key: str, value: Any) -> bool:
    # Peft writes megatron_core always (unused without a megatron_config) and, without a task_type,
    # the class that was trained; a module of transformers or of ours is no foreign code.
    if value is None or (key == "trust_remote_code" and value is False):
        return True
    if key == "megatron_core":
        return bool(value == "megatron.core")
    return (
        key == "auto_mapping"
        and isinstance(value, dict)
        and value.keys() == {"base_model_class", "parent_library"}
        and str(value["base_model_class"]).isidentifier()
        and MODELING.fullmatch(str(value["parent_library"])) is not None
    )


def _refuse_dangerous(path: Path, config: dict[str, Any]) -> None:
    # A list instead of recursion: the JSON may be nested as deep as the parser allows.
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(where, inner) for inner in value]
        elif isinstance(value, dict):
            for key, inner in value.items():
                if key not in DANGEROUS_KEYS:
                    waiting.append((f"{where}{key}.", inner))
                elif not _is_harmless(key, inner):
                    raise InputRefused(
                        f"{path}: key '{where}{key}' can make a loader run code; remove it"
                    )


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")
