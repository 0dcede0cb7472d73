"""The settings of a GPTQ or AWQ checkpoint: read without trust, written for other loaders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from exporter.core.blocks import BlockFormat
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config, read_json

Method = Literal["gptq", "awq"]
QUANTIZE_CONFIG = "quantize_config.json"
KEY = "quantization_config"
MAX_GROUP = 1 << 20
MAX_PATTERN = 300
# Nested or counted repetition: a pattern from a stranger must not take exponential time.
COSTLY = re.compile(r"[+*}]\)?[+*{]|\([^)]*[+*|][^)]*\)[+*{]|\\[1-9]|\(\?")


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says about itself.

    `group` is -1 for one group per row. `version` is 1 or 2 for GPTQ (its checkpoint_format), 0
    when it says nothing and for AWQ. `quantizer` is the tool that wrote it, "" when unknown;
    `dynamic` the per-module overrides, pattern to values (None: not quantized), in their order.
    """

    method: Method
    bits: int
    group: int
    symmetric: bool
    desc_act: bool
    version: int
    quantizer: str
    dynamic: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()

    def of(self, module: str) -> tuple[int, int] | None:
        """(bits, group) of a module by the first pattern that matches it; None: not quantized."""
        values = self._override(module)
        if values is None:
            return None
        return values.get("bits", self.bits), values.get("group_size", self.group)

    def symmetric_of(self, module: str) -> bool:
        """Whether a module's zero points are all the middle."""
        values = self._override(module)
        return bool((values or {}).get("sym", self.symmetric))

    def _override(self, module: str) -> Mapping[str, Any] | None:
        for pattern, values in self.dynamic:
            if re.match(pattern, module):
                return values
        return {}


def read_settings(folder: Path) -> Settings:
    """From quantize_config.json or config.json's quantization_config (they must agree).

    Raises `InputRefused` when there is neither, they disagree, or a value is not one we can read:
    bits other than 4 or 8, another method or packing.
    """
    places = [folder / name for name in (QUANTIZE_CONFIG, "quant_config.json")]
    found = {p.name: read_json(p) for p in places if p.is_file()}
    inner = read_config(folder / "config.json").get(KEY)
    if isinstance(inner, dict):
        found["config.json"] = inner
    if not found:
        raise InputRefused(
            f"{folder}: neither {QUANTIZE_CONFIG} nor a {KEY} in config.json; expected a GPTQ or "
            "AWQ checkpoint"
        )
    parsed = {name: _parsed(f"{folder / name}", values) for name, values in found.items()}
    first, *others = parsed
    settings = parsed[first]
    for other in others:
        settings = _agreed(folder, (first, settings), (other, parsed[other]))
    return settings


def _agreed(folder: Path, one: tuple[str, Settings], other: tuple[str, Settings]) -> Settings:
    """One of two settings that differ in nothing but what one of them leaves open."""
    (name, left), (name2, right) = one, other
    for key in ("method", "bits", "group", "symmetric", "desc_act", "version", "dynamic"):
        a, b = getattr(left, key), getattr(right, key)
        if a != b and not (key == "version" and 0 in (a, b)):
            raise InputRefused(
                f"{folder}: {name} and {name2} disagree on {key} ({a!r} against {b!r}); correct the "
                "wrong one"
            )
    return replace(
        left, version=left.version or right.version, quantizer=left.quantizer or right.quantizer
    )


def _parsed(where: str, values: Mapping[str, Any]) -> Settings:
    method = values.get("quant_method", "gptq")
    if method not in ("gptq", "awq"):
        raise InputRefused(f"{where}: quant_method {method!r}; expected gptq or awq")
    bits = values.get("bits", values.get("w_bit"))
    group = values.get("group_size", values.get("q_group_size", -1))
    _check_numbers(where, bits, group)
    label = str(
        values.get("checkpoint_format", values.get("format", values.get("version", "")))
    ).lower()
    zero_point = values.get("zero_point", True)
    symmetric = values.get("sym", True) if method == "gptq" else not zero_point
    meta = values.get("meta")
    quantizer = meta.get("quantizer", "") if isinstance(meta, dict) else ""
    return Settings(
        method,
        int(bits),
        int(group),
        bool(symmetric),
        bool(values.get("desc_act", False)),
        _version(where, method, label),
        ", ".join(map(str, quantizer)) if isinstance(quantizer, list) else str(quantizer),
        _dynamic(where, values.get("dynamic")),
    )


def _check_numbers(where: str, bits: Any, group: Any) -> None:
    if type(bits) is not int or bits not in (4, 8):
        raise InputRefused(f"{where}: bits is {bits!r}; medexport reads 4 and 8")
    if type(group) is not int or not (group == -1 or 8 <= group <= MAX_GROUP):
        raise InputRefused(f"{where}: group_size is {group!r}; expected -1 or 8 to {MAX_GROUP}")


def _version(where: str, method: Method, label: str) -> int:
    known = {"gptq": {"": 0, "gptq": 1, "gptq_v2": 2}, "awq": {"": 0, "gemm": 0}}[method]
    if label not in known:
        raise InputRefused(
            f"{where}: packing {label!r} of {method}; medexport reads "
            f"{' and '.join(n for n in known if n)}"
        )
    return known[label]


def _dynamic(where: str, value: Any) -> tuple[tuple[str, Mapping[str, Any] | None], ...]:
    if value is None or value is False:
        return ()
    if not isinstance(value, dict):
        raise InputRefused(f"{where}: dynamic is a {type(value).__name__}; expected an object")
    rules: list[tuple[str, Mapping[str, Any] | None]] = []
    for name, values in value.items():
        pattern = name.removeprefix("+:").removeprefix("-:")
        if len(pattern) > MAX_PATTERN or COSTLY.search(pattern):
            raise InputRefused(
                f"{where}: dynamic pattern {pattern[:80]!r} may take for ever; refused"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputRefused(f"{where}: dynamic pattern {pattern[:80]!r}: {error}") from error
        if name.startswith("-:"):
            rules.append((pattern, None))
            continue
        if not isinstance(values, dict):
            raise InputRefused(f"{where}: dynamic rule {name[:80]!r} is no object")
        _check_numbers(where, values.get("bits", 4), values.get("group_size", -1))
        rules.append((pattern, values))
    return tuple(rules)


def dynamic_rules(
    formats: Mapping[str, BlockFormat | None], base: BlockFormat
) -> dict[str, dict[str, Any]]:
    """GPTQModel's `dynamic` for modules whose format is not `base` (None: not quantized).

    One rule for the largest subtree of modules that are stored alike, so that it also holds for
    loaders that fuse neighbours (q, k and v to qkv).
    """
    rules: dict[str, dict[str, Any]] = {}
    _collect(tuple((n.split("."), f) for n, f in sorted(formats.items())), (), base, rules)
    return rules


def _collect(
    modules: tuple[tuple[list[str], BlockFormat | None], ...],
    path: tuple[str, ...],
    base: BlockFormat,
    rules: dict[str, dict[str, Any]],
) -> None:
    found = {form for _, form in modules}
    if found == {base}:
        return
    if len(found) == 1 and path:
        form = next(iter(found))
        leaf = modules[0][0] == list(path)
        pattern = "^" + re.escape(".".join(path)) + ("$" if leaf else r"\.")
        if form is None:
            rules[f"-:{pattern}"] = {}
        else:
            rules[f"+:{pattern}"] = {
                "bits": form.bits,
                "group_size": form.block,
                "sym": form.symmetric,
                "desc_act": False,
            }
        return
    depth = len(path)
    for part in sorted({names[depth] for names, _ in modules}):
        inner = tuple(m for m in modules if m[0][depth] == part)
        _collect(inner, (*path, part), base, rules)
