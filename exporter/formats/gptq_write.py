"""Writes our quantized folder as a GPTQ checkpoint, version 1 or 2, for other loaders.

The matrices are taken over value for value; what GPTQ cannot hold is refused, or (embeddings, parts
that the caller leaves out) written in float16 and listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter import __version__
from exporter.core.artifact import need_space
from exporter.core.blocks import QDATA, BlockFormat, dequantize
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused, WrongUsage
from exporter.core.modelfiles import copy_small_files, read_json
from exporter.core.progress import Progress, silent
from exporter.core.tensors import FLOATS, Checkpoint, SafetensorsWriter
from exporter.families.checkpoints import published_config
from exporter.families.specs.llama import NO_FORMAT, require_llama
from exporter.families.table import family_of
from exporter.formats.folder import REPORT, as_float16
from exporter.formats.gptq_matrix import to_gptq
from exporter.formats.settings import KEY, QUANTIZE_CONFIG, dynamic_rules
from exporter.runtimes.weights import packed_matrix

LABELS = {1: "gptq", 2: "gptq_v2"}
WEIGHT = ".weight"
# Tables that are looked up, not multiplied: no loader quantizes them, so no rule must exclude them.
TABLES = ("embedding.weight", "embed_tokens.weight", "embeddings.weight", "wte.weight")


@dataclass(frozen=True)
class GptqOptions:
    """How to write. `only_decoder`: the vision part and the head are dequantized to float16, which is
    what loaders expect that quantize the blocks of the decoder only (transformers does); all groups
    then have one length.

    `damp_percent`, `true_sequential`: recorded as they were in the quantization; no loader computes
    with them.
    """

    version: int = 2
    only_decoder: bool = False
    damp_percent: float = 0.01
    true_sequential: bool = False


@dataclass(frozen=True)
class GptqWritten:
    """What was written: modules quantized, tensors dequantized with the reason, and warnings."""

    config: Mapping[str, Any]
    quantized: tuple[str, ...]
    dequantized: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def write_gptq(
    source: Path, out: Path, options: GptqOptions, *, progress: Progress = silent
) -> GptqWritten:
    """Write the quantized folder `source` as a GPTQ checkpoint into the empty folder `out`.

    Files: model.safetensors, quantize_config.json, config.json with the same as quantization_config,
    and the small files. Memory is bounded by the largest matrix. Raises `InputRefused` when `source`
    is no quantized folder or holds something that GPTQ of this version cannot, `WrongUsage` for
    another version than 1 or 2.
    """
    if options.version not in LABELS:
        raise WrongUsage(f"GPTQ version {options.version}; expected 1 or 2")
    writer = _Writer(source, options)
    entries = writer.entries()
    size = sum(_nbytes(entry) for entry in entries.values())
    need_space(out, size + (64 << 20))
    settings = writer.settings()
    copy_small_files(source, out)
    config = published_config(source)
    (out / "config.json").write_bytes(canonical_json({**config, KEY: settings}))
    (out / QUANTIZE_CONFIG).write_bytes(canonical_json(settings))
    total = len(entries)
    with SafetensorsWriter(out / "model.safetensors", entries, {"format": "pt"}) as file:
        for done, (name, array) in enumerate(writer.arrays(), 1):
            file.write(name, array)
            progress(done, total, name)
    return GptqWritten(
        settings, tuple(writer.quantized), writer.dequantized, writer.warnings(settings)
    )


class _Writer:
    def __init__(self, source: Path, options: GptqOptions) -> None:
        self.source, self.options = source, options
        self.layers = _layers(source)
        self.checkpoint = Checkpoint.open(source)
        config = published_config(source)
        self.decoder = require_llama(
            family_of(config).decoder_spec(config), "writing gptq", instead=NO_FORMAT
        )
        self.dequantized: dict[str, str] = {}
        self.quantized: dict[str, BlockFormat] = {}
        for name, layer in self.layers.items():
            reason = self._why_float(name, layer)
            if reason:
                self.dequantized[name] = reason
            else:
                form = BlockFormat(layer["bits"], layer["block"], layer["symmetric"])
                self.quantized[name.removesuffix(WEIGHT)] = form
        if options.only_decoder:
            # Its readers know one group size: the smallest, of which the others are multiples.
            smallest = min((f.block for f in self.quantized.values()), default=0)
            self.quantized = {n: replace(f, block=smallest) for n, f in self.quantized.items()}
        if not self.quantized:
            raise InputRefused(f"{source}: no matrix is left that GPTQ would hold")

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor to write, in order: name to (dtype, shape)."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in self._names():
            layer = self.layers.get(name)
            if layer is None:
                found[name] = ("F16", self.checkpoint.info(name).shape)
                continue
            rows, columns = int(layer["rows"]), int(layer["columns"])
            if name in self.dequantized:
                found[name] = ("F16", (rows, columns))
                continue
            module, bits = name.removesuffix(WEIGHT), int(layer["bits"])
            groups = columns // self.quantized[module].block
            found[f"{module}.qweight"] = ("I32", (columns * bits // 32, rows))
            found[f"{module}.qzeros"] = ("I32", (groups, rows * bits // 32))
            found[f"{module}.scales"] = ("F16", (groups, rows))
            found[f"{module}.g_idx"] = ("I32", (columns,))
        return found

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The same with their values. Raises `InputRefused` for what GPTQ cannot hold."""
        for name in self._names():
            if name not in self.layers:
                yield name, as_float16(name, self.checkpoint.float32(name))
                continue
            packed = packed_matrix(self.checkpoint, name, self.layers[name])
            if name in self.dequantized:
                yield name, as_float16(name, dequantize(packed))
                continue
            module = name.removesuffix(WEIGHT)
            tensors = to_gptq(
                packed, self.options.version, module, group=self.quantized[module].block
            )
            yield f"{module}.qweight", tensors.qweight
            yield f"{module}.qzeros", tensors.qzeros
            yield f"{module}.scales", tensors.scales
            yield f"{module}.g_idx", tensors.g_idx

    def settings(self) -> dict[str, Any]:
        """quantize_config.json: the decoder's commonest format, and rules for what differs."""
        inside = [f for n, f in self.quantized.items() if n.startswith(self.decoder.prefix)]
        base = Counter(inside or self.quantized.values()).most_common(1)[0][0]
        formats: dict[str, BlockFormat | None] = {**self.quantized, **self._float_modules()}
        methods = sorted({str(layer.get("method")) for layer in self.layers.values()})
        return {
            "bits": base.bits,
            "group_size": base.block,
            "desc_act": False,
            "sym": base.symmetric,
            "static_groups": False,
            "true_sequential": self.options.true_sequential,
            "damp_percent": self.options.damp_percent,
            "lm_head": self.decoder.head.removesuffix(WEIGHT) in self.quantized,
            "quant_method": "gptq",
            "checkpoint_format": LABELS[self.options.version],
            "pack_dtype": "int32",
            "block_name_to_quantize": f"{self.decoder.prefix}layers",
            "dynamic": dynamic_rules(formats, base),
            "meta": {"quantizer": [f"medexport:{__version__}"], "methods": methods},
        }

    def warnings(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """What some loader makes of these settings."""
        asymmetric = not all(f.symmetric for f in self.quantized.values())
        found = []
        if self.options.version == 1 and asymmetric:
            found.append(
                "GPTQModel refuses version 1 with zero points from other writers than itself; "
                "gptq-v2 is read by it and by vLLM"
            )
        if any(rule.startswith("+:") for rule in settings["dynamic"]):
            found.append(
                "transformers applies no per-module overrides: it needs --only-decoder and one format "
                "in all blocks"
            )
        return tuple(found)

    def _float_modules(self) -> dict[str, None]:
        """Linear layers in float: matrices ``[N, K]`` that are multiplied."""
        floats = [
            n
            for n, i in self.checkpoint.tensors.items()
            if n not in self.layers and len(i.shape) == 2 and n.endswith(WEIGHT)
        ]
        names = [*floats, *self.dequantized]
        return {n.removesuffix(WEIGHT): None for n in names if not n.endswith(TABLES)}

    def _names(self) -> Iterator[str]:
        """Names of the model's tensors in the order of the file, a packed one once."""
        for name, info in self.checkpoint.tensors.items():
            base, _, part = name.rpartition(".")
            if base in self.layers:
                if f".{part}" == QDATA:
                    yield base
            elif info.dtype in FLOATS:
                yield name
            else:
                raise InputRefused(
                    f"{self.source}: '{name}' is {info.dtype} and not in {REPORT}; GPTQ has no place "
                    "for it; quantize the model again"
                )

    def _why_float(self, name: str, layer: Mapping[str, Any]) -> str:
        """Why a packed matrix is written in float16; "" when it is not."""
        if layer.get("kind") == "embedding":
            return "GPTQ loaders look embeddings up in float"
        if self.options.only_decoder and not name.startswith(f"{self.decoder.prefix}layers."):
            return "outside the decoder's blocks (--only-decoder)"
        if layer.get("kind") == "head" and (
            layer["rows"] % 32 or layer["columns"] % layer["block"]
        ):
            return f"a head of {layer['rows']} rows; GPTQ kernels need a multiple of 32"
        return ""


def _layers(source: Path) -> dict[str, dict[str, Any]]:
    """Packed layers of quantization.json by name. Raises `InputRefused` for other storage forms."""
    path = source / REPORT
    if not path.is_file():
        raise InputRefused(
            f"{source}: no {REPORT}; expected a folder written by `medexport quantize`"
        )
    layers = read_json(path).get("layers")
    if not isinstance(layers, list) or not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) for e in layers
    ):
        raise InputRefused(
            f"{path}: layers is not a list of named entries; quantize the model again"
        )
    for entry in layers:
        sizes = [entry.get(k) for k in ("bits", "block", "rows", "columns")]
        if not all(type(s) is int and s > 0 for s in sizes) or entry["bits"] not in (4, 8):
            raise InputRefused(f"{path}: '{entry['name']}' has {sizes}; GPTQ takes 4 and 8 bits")
        if entry.get("code", "integer") != "integer":
            raise InputRefused(
                f"{path}: '{entry['name']}' is stored as {entry['code']}; GPTQ holds evenly spaced "
                "integers only; quantize with an int4 or int8 scheme"
            )
        if not entry["name"].endswith(WEIGHT):
            raise InputRefused(f"{path}: '{entry['name']}' is not the weight of a module")
    return {entry["name"]: entry for entry in layers}


def _nbytes(entry: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return {"F16": 2, "I32": 4}[dtype] * int(np.prod(shape, dtype=np.int64))
