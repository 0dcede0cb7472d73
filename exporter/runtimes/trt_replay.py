"""A step of work that is captured as a CUDA graph once its shapes and addresses stay the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from exporter.core.errors import EnvironmentLacks
from exporter.runtimes.trt_memory import DeviceMemory


class Replay:
    """Runs the same work again and again: first plainly, then captured, then from the capture.

    The plain run is needed: after a change of shapes TensorRT does deferred work in it that must not
    be part of a capture. `note` says whether the work is a CUDA graph, and if not, why.
    """

    def __init__(self, memory: DeviceMemory, *, refused: str = "") -> None:
        """`refused`: why nothing is to be captured; empty where it may be."""
        self._memory = memory
        self._refused = refused
        self._key: Hashable = None
        self._graph: int | None = None
        self._warm = False
        self.note = f"not captured: {refused}" if refused else "not captured yet"

    def expect(self, key: Hashable) -> None:
        """Say what the work depends on (shapes, addresses); another key than before drops the capture."""
        if key != self._key:
            self.close()
            self._key, self._warm = key, False

    def run(self, enqueue: Callable[[], None]) -> None:
        """Do the work once. Raises `EnvironmentLacks` when even the plain run is refused."""
        if self._graph is None and self._warm and not self._refused:
            try:
                self._graph = self._memory.capture(enqueue)
                self.note = "captured"
            except EnvironmentLacks as error:
                # Not every engine can be captured; it then runs as before, and the note says so.
                self._refused = str(error)
                self.note = f"not captured: {error}"
        if self._graph is None:
            enqueue()
            self._warm = True
        else:
            self._memory.launch(self._graph)

    def close(self) -> None:
        """Free the capture."""
        if self._graph is not None:
            self._memory.drop(self._graph)
            self._graph = None
