"""What an engine may be built with, as a literal table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from exporter.core.digest import sha256_json
from exporter.core.errors import WrongUsage

LEVELS = range(6)


class EngineOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How engines are built.

    version_compatible: later TensorRT versions run them too (the engine brings its own small runtime,
    which is code that the machine has to be allowed to run). weight_streaming: weights may stay in
    the host's memory and are brought in as needed; slower, and never a CUDA graph. tf32: products of
    float32 with a mantissa of 10 bits, which is TensorRT's own default; off here, as the graph says
    float32. level: builder optimization level, 0 (fast build) to 5. workspace: bytes of GPU memory
    that a kernel may use while it runs; None: as much as there is.
    """

    version_compatible: bool = False
    weight_streaming: bool = False
    tf32: bool = False
    level: int = 3
    workspace: int | None = None

    @property
    def digest(self) -> str:
        """Digest of all settings."""
        return sha256_json(msgspec.to_builtins(self))


# Field of `EngineOptions` -> name in tensorrt.BuilderFlag. REFIT is not offered: it may drop a bias of a
# product in TensorRT 11.3. Precision flags (FP16, INT8, ...) do not exist for strongly typed networks.
FLAGS: Mapping[str, str] = {
    "version_compatible": "VERSION_COMPATIBLE",
    "weight_streaming": "WEIGHT_STREAMING",
    "tf32": "TF32",
}


def apply_options(trt: Any, config: Any, options: EngineOptions) -> None:
    """Set every option on an IBuilderConfig. Raises `WrongUsage` for a value out of range."""
    if options.level not in LEVELS:
        raise WrongUsage(f"optimization level {options.level}; expected 0 to {LEVELS[-1]}")
    if options.workspace is not None and options.workspace < 1:
        raise WrongUsage(f"workspace of {options.workspace} bytes; expected at least 1")
    for field, name in FLAGS.items():
        flag = getattr(trt.BuilderFlag, name)
        # Cleared too: TF32 is on unless it is switched off.
        (config.set_flag if getattr(options, field) else config.clear_flag)(flag)
    config.builder_optimization_level = options.level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
