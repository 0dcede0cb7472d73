"""Runs the graphs of a task family by name, in onnxruntime or as the torch model gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import require
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed
from exporter.families.table import required_task_family
from exporter.families.tasks import Outputs


class Graphs(Protocol):
    """The graphs of one model: what runs them is not the task's affair."""

    preparer: Any

    def run(self, graph: str, feed: Feed) -> Outputs:
        """All outputs of `graph` by name."""
        ...


class OrtGraphs:
    """`Graphs` over the files in ``model_dir/onnx``, on the CPU; a session is opened at first use."""

    def __init__(self, model_dir: Path, *, threads: int | None = None) -> None:
        """Read the small files. Raises `InputRefused`."""
        from exporter.runtimes.threads import usable_cores

        self.preparer = required_task_family(read_config(model_dir / "config.json")).open_preparer(
            model_dir
        )
        self._folder, self._threads = model_dir / "onnx", threads or usable_cores()
        self._sessions: dict[str, Any] = {}

    def run(self, graph: str, feed: Feed) -> Outputs:
        """All outputs of `graph` by name. Raises `InputRefused` when its file is missing or bad."""
        from exporter.runtimes.ort_session import open_session

        if graph not in self._sessions:
            self._sessions[graph] = open_session(self._folder / f"{graph}.onnx", self._threads)
        session = self._sessions[graph]
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feed)), strict=True))


class TorchGraphs:
    """`Graphs` by the torch model in float32, over a float or quantized model folder."""

    def __init__(self, model_dir: Path, *, threads: int | None = None) -> None:
        """Load the weights strictly. Raises `InputRefused`, `EnvironmentLacks` without torch."""
        for module in ("torch", "transformers"):
            require(module, "build")
        import torch

        from exporter.runtimes.threads import usable_cores
        from exporter.runtimes.torch_reference import load_model

        torch.set_num_threads(threads or usable_cores())
        self._family = required_task_family(read_config(model_dir / "config.json"))
        self.preparer = self._family.open_preparer(model_dir)
        self.model = load_model(model_dir, read_config(model_dir / "config.json"))

    def run(self, graph: str, feed: Feed) -> Mapping[str, NDArray[np.float32]]:
        """What `graph` gives for `feed`, by the torch model."""
        import torch

        with torch.inference_mode():
            return self._family.torch_outputs(self.model, graph, feed)
