"""Where hidden states wait between two passes: in memory, or in files of a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.core.artifact import sync_file
from exporter.core.errors import EnvironmentLacks, InputRefused

Array = NDArray[np.float32]


class States(Protocol):
    """Float32 arrays by layer and prompt; layer i holds what block i reads."""

    def read(self, layer: int, prompt: int) -> Array:
        """One array; to be left as it is."""
        ...

    def write(self, layer: int, prompt: int, values: Array) -> None:
        """Store one array."""
        ...

    def spend(self, layer: int, prompt: int) -> None:
        """One array will not be read again in this run; memory is freed, files stay for a resume."""
        ...

    def settle(self, layer: int) -> None:
        """Return when a layer's arrays would survive a power cut, where they are kept in files."""
        ...

    def drop(self, layer: int) -> None:
        """Forget a layer, in memory and on disk."""
        ...


class MemoryStates:
    """States held in memory."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, int], Array] = {}

    def read(self, layer: int, prompt: int) -> Array:
        """See `States`."""
        return self._arrays[layer, prompt]

    def write(self, layer: int, prompt: int, values: Array) -> None:
        """See `States`."""
        self._arrays[layer, prompt] = values

    def spend(self, layer: int, prompt: int) -> None:
        """See `States`."""
        del self._arrays[layer, prompt]

    def settle(self, layer: int) -> None:
        """See `States`."""

    def drop(self, layer: int) -> None:
        """See `States`."""
        for key in [k for k in self._arrays if k[0] == layer]:
            del self._arrays[key]


class DiskStates:
    """States in ``folder/layer-00012/00003.npy``; read and written, not mapped into memory."""

    def __init__(self, folder: Path, needed: int) -> None:
        """Use `folder`. Raises `EnvironmentLacks` when it has no room for `needed` bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise EnvironmentLacks(
                f"{folder}: {free / 1e9:.1f} GB free, hidden states take {needed / 1e9:.1f} GB; "
                "use fewer calibration images or another folder"
            )
        self._folder = folder

    def read(self, layer: int, prompt: int) -> Array:
        """See `States`. Raises `InputRefused` when the file is missing or damaged."""
        path = self._path(layer, prompt)
        try:
            values: Array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputRefused(
                f"{path}: hidden states of an earlier run are damaged ({error}); remove the folder"
            ) from error
        return values

    def write(self, layer: int, prompt: int, values: Array) -> None:
        """See `States`."""
        path = self._path(layer, prompt)
        path.parent.mkdir(exist_ok=True)
        np.save(path, values, allow_pickle=False)

    def spend(self, layer: int, prompt: int) -> None:
        """See `States`."""

    def settle(self, layer: int) -> None:
        """See `States`."""
        for file in self._path(layer, 0).parent.iterdir():
            sync_file(file)

    def drop(self, layer: int) -> None:
        """See `States`."""
        shutil.rmtree(self._path(layer, 0).parent, ignore_errors=True)

    def _path(self, layer: int, prompt: int) -> Path:
        return self._folder / f"layer-{layer:05d}" / f"{prompt:05d}.npy"
