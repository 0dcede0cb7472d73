"""What the readers of GPTQ and AWQ checkpoints share: modules, kinds, and the float rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.core.tensors import FLOATS, Checkpoint
from exporter.families.base import DecoderSpec
from exporter.families.checkpoints import published_config
from exporter.families.specs.llama import NO_FORMAT, require_llama
from exporter.families.table import family_of
from exporter.formats.folder import FloatEntry
from exporter.formats.settings import Settings, read_settings

QWEIGHT = ".qweight"
PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
STORED = "stored in float by the checkpoint"


@dataclass(frozen=True)
class Source:
    """An opened checkpoint with its settings, config and decoder."""

    folder: Path
    checkpoint: Checkpoint
    settings: Settings
    config: dict[str, Any]
    decoder: DecoderSpec

    @classmethod
    def open(cls, folder: Path, method: str) -> Source:
        """Open a checkpoint of `method`. Raises `InputRefused` when it is another one."""
        settings = read_settings(folder)
        if settings.method != method:
            raise InputRefused(f"{folder}: a {settings.method} checkpoint; expected {method}")
        config = published_config(folder)
        checkpoint = _open_weights(folder)
        decoder = require_llama(
            family_of(config).decoder_spec(config), f"reading {method}", instead=NO_FORMAT
        )
        source = cls(folder, checkpoint, settings, config, decoder)
        if not source.modules():
            raise InputRefused(f"{folder}: no tensor ends in {QWEIGHT}; it is not {method}")
        return source

    def modules(self) -> list[str]:
        """Names of the quantized modules, in the order of the file."""
        return [n.removesuffix(QWEIGHT) for n in self.checkpoint.tensors if n.endswith(QWEIGHT)]

    def kind(self, name: str) -> str:
        """linear, head or embedding, for the weight `name`."""
        return {self.decoder.head: "head", self.decoder.embedding: "embedding"}.get(name, "linear")

    def take(self, name: str, dtype: str) -> NDArray[Any]:
        """A tensor of the given dtype. Raises `InputRefused` when it is missing or of another."""
        info = self.checkpoint.info(name)
        if info.dtype != dtype:
            raise InputRefused(f"{info.file}: '{name}' is {info.dtype}; expected {dtype}")
        return self.checkpoint.raw(name)

    def scales(self, module: str) -> NDArray[np.float16]:
        """Scales as float16; other floats are converted when float16 holds them."""
        name = f"{module}.scales"
        values = self.checkpoint.float32(name)
        with np.errstate(over="ignore"):
            return values.astype(np.float16)

    def is_float(self, name: str, modules: set[str]) -> bool:
        """Whether a tensor is not a part of a quantized module."""
        module, _, part = name.rpartition(".")
        return not (f".{part}" in PARTS and module in modules)

    def floats(self, notes: list[str]) -> Iterator[FloatEntry]:
        """Entries of all tensors that are not quantized.

        Left out, with a note: biases of zeros that writers of GPTQ add to linear layers of the
        decoder, and a stored head that is bit for bit a tied embedding.
        """
        modules = set(self.modules())
        zeros = []
        for name, info in self.checkpoint.tensors.items():
            if not self.is_float(name, modules):
                continue
            if info.dtype not in FLOATS:
                raise InputRefused(
                    f"{info.file}: '{name}' is {info.dtype}; expected floating point"
                )
            module = name.removesuffix(".bias")
            added = module != name and module in modules and module.startswith(self.decoder.prefix)
            if added and not self.checkpoint.float32(name).any():
                zeros.append(name)
                continue
            if name == self.decoder.head and self._is_tied_copy(name):
                notes.append(f"'{name}' is the tied embedding and was left out")
                continue
            yield FloatEntry(name, info.shape, STORED, self._reader(name))
        if zeros:
            notes.append(f"{len(zeros)} biases of zeros were left out, first '{zeros[0]}'")

    def _is_tied_copy(self, name: str) -> bool:
        table = self.decoder.embedding
        known = self.decoder.tied and table in self.checkpoint
        return known and self.checkpoint.same_bytes(name, table)

    def _reader(self, name: str) -> Callable[[], NDArray[np.float32]]:
        return partial(self.checkpoint.float32, name)


def untied(source: Source, notes: list[str]) -> dict[str, Any]:
    """The config for the folder: a head stored on its own is no longer the embedding."""
    config = dict(source.config)
    if source.decoder.tied and source.decoder.head.removesuffix(".weight") in source.modules():
        config["tie_word_embeddings"] = False
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = {**text, "tie_word_embeddings": False}
        notes.append("the head is quantized on its own: tie_word_embeddings is now false")
    return config


def _open_weights(folder: Path) -> Checkpoint:
    # GPTQ writers name the file model.safetensors or gptq_model-4bit-128g.safetensors.
    if (folder / "model.safetensors").is_file() or (
        folder / "model.safetensors.index.json"
    ).is_file():
        return Checkpoint.open(folder)
    found = sorted(folder.glob("gptq_model*.safetensors"))
    return Checkpoint([found[0]]) if len(found) == 1 else Checkpoint.open(folder)
