"""Completes the small files of an exported folder for readers that fill in no defaults.

Published folders keep the same facts in different places (a chat template in four, the image
settings in two) and leave out what equals a default of transformers. transformers.js 4 looks in one
place each and knows few defaults, so an exported folder says everything where it looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.core.artifact import write_atomic
from exporter.core.digest import canonical_json
from exporter.core.modelfiles import read_config, read_json
from exporter.families.base import ReaderFiles
from exporter.families.specs.decoder import TextDecoder
from exporter.families.table import family_of
from exporter.graphs.genai import write_genai_files
from exporter.graphs.writer import WrittenGraph

TEMPLATES = ("chat_template.json", "processor_config.json", "tokenizer_config.json")


def complete_for_readers(model: Path, parts: Sequence[WrittenGraph], *, genai: bool = True) -> None:
    """Add to the small files in the exported folder `model` what other readers look for.

    config.json: sizes of the caches, and where transformers.js finds the graphs. With a tokenizer
    also its stop tokens and, where the model has them, its chat template and image token, the
    processor's classes and rows per tile, and, with `genai`, onnxruntime-genai's files.
    Raises `InputRefused` when tokenizer, template or settings are missing or disagree.
    """
    config = read_config(model / "config.json")
    family = family_of(config)
    decoder = family.decoder_spec(config)
    _add(model / "config.json", _config(config, decoder, parts))
    if not (model / "tokenizer.json").is_file():
        return
    preparer = family.open_preparer(model)
    image = preparer.image_token_id
    if image is not None:
        _add(model / "config.json", {"image_token_id": image})
        template = _template(model)
        if template is not None:
            _add(model / "tokenizer_config.json", {"chat_template": template})
    stops = sorted(preparer.generation.stop_ids)
    _add(model / "generation_config.json", {"eos_token_id": stops})
    files = family.reader_files(config)
    _add_processor(model, files)
    if genai and files.genai and image is not None:
        write_genai_files(model, decoder, image, stops)


def say_where_weights_lie(model: Path, parts: Sequence[WrittenGraph]) -> None:
    """Add to config.json what transformers.js asks about the files of `parts`, and nothing else."""
    _add(model / "config.json", {"transformers.js_config": _files(parts)})


def _files(parts: Sequence[WrittenGraph]) -> dict[str, Any]:
    external = {f"{p.name}.onnx": 1 for p in parts if p.data_bytes}
    # "fp32" stands for file names without a suffix, whatever the files hold.
    settings: dict[str, Any] = {"dtype": "fp32"}
    if external:
        settings["use_external_data_format"] = external
    return settings


def _config(
    config: Mapping[str, Any], decoder: TextDecoder, parts: Sequence[WrittenGraph]
) -> dict[str, Any]:
    sizes = {
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
    }
    text = {"text_config": {**config["text_config"], **sizes}} if "text_config" in config else sizes
    if "decoder" in config:
        # An encoder-decoder says them there, under its decoder's own names.
        text = {}
    return {**text, "transformers.js_config": _files(parts)}


def _add_processor(model: Path, files: ReaderFiles) -> None:
    processor = _read(model / "processor_config.json")
    # transformers 5 saves the image settings inside processor_config.json alone.
    image = processor.get("image_processor") or _read(model / "preprocessor_config.json")
    names = {"processor_class": files.processor_class} if files.processor_class else {}
    settings = {"image_processor_type": files.image_processor_type, **image, **names}
    _add(model / "preprocessor_config.json", settings)
    if names:
        _add(model / "processor_config.json", {**files.processor, **names})


def _add(path: Path, values: Mapping[str, Any]) -> None:
    write_atomic(path, canonical_json({**_read(path), **values}))


def _template(folder: Path) -> str | None:
    """The chat template, wherever the folder keeps it (`open_preparer` has found it already); None for
    a model that is asked without one.
    """
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text("utf-8")
    found = (_read(folder / name).get("chat_template") for name in TEMPLATES)
    return next((text for text in found if isinstance(text, str)), None)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
