"""The timing cache: what the builder measured of kernels, so that the next build need not.

It is good for one device, one TensorRT version and one builder configuration; its file name is a
digest of these, so that another's is never opened.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from exporter.core.artifact import write_atomic
from exporter.core.digest import sha256_json
from exporter.engines.options import EngineOptions
from exporter.engines.record import this_system
from exporter.runtimes.trt_memory import DeviceFacts


def cache_key(device: DeviceFacts, tensorrt: str, options: EngineOptions) -> str:
    """Digest of all that timings depend on. CUDA belongs to it: TensorRT refuses another's cache."""
    return sha256_json(
        {
            "device": device.name,
            "compute_capability": device.compute_capability,
            "cuda": device.cuda,
            "tensorrt": tensorrt,
            "system": this_system(),
            "options": options.digest,
        }
    )


class TimingCache:
    """The cache file in an engine folder."""

    def __init__(self, folder: Path, key: str, earlier: Path | None = None) -> None:
        """The cache of `folder`; it starts as that of the same key in the folder `earlier`."""
        self.key, self._path = key, folder / f"timing-{key[:16]}.cache"
        self.reused = False
        if earlier is not None and (earlier / self._path.name).is_file():
            shutil.copyfile(earlier / self._path.name, self._path)

    def attach(self, config: Any) -> None:
        """Give the builder config the stored cache, or an empty one where TensorRT refuses it."""
        stored = self._path.read_bytes() if self._path.is_file() else b""
        cache = config.create_timing_cache(stored)
        # False for `ignore_mismatch`: another device's timings are worse than none.
        self.reused = bool(stored) and cache is not None and config.set_timing_cache(cache, False)
        if not self.reused:
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def store(self, config: Any) -> None:
        """Write what the builder knows now."""
        write_atomic(self._path, bytes(memoryview(config.get_timing_cache().serialize())))
