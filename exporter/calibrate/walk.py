"""Walks a decoder block by block: statistics, a visit, and the inputs of the next block.

Only one block's weights are in memory, in float32. Each block runs twice over the prompts: with its
own weights, for the statistics, and with those that the visitor gave back, so that later blocks see
the inputs that the quantized model will give them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.blocks.base import Group, use_torch
from exporter.calibrate.blocks.table import open_blocks
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.calibrate.states import DiskStates, MemoryStates, States
from exporter.calibrate.statistics import Accumulator, sampled_rows, token_weights
from exporter.core.activations import BlockVisitor, InputStatistics
from exporter.core.artifact import write_atomic
from exporter.core.digest import canonical_json, sha256_json
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json
from exporter.core.progress import Progress, silent
from exporter.core.tensors import Checkpoint
from exporter.families.specs.decoder import TextDecoder
from exporter.families.specs.walked import block_prefix, block_tensors

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float32]
INDEX = "walk.json"


def walk_decoder(  # noqa: PLR0913 (each is one decision of the caller)
    checkpoint: Checkpoint,
    spec: TextDecoder,
    prompts: Sequence[EmbeddedPrompt],
    visit: BlockVisitor,
    *,
    spill: Path | None = None,
    keep: Path | None = None,
    balance: bool = True,
    threads: int,
    progress: Progress = silent,
) -> int:
    """Show every block of the decoder to `visit`, with the statistics of its inputs.

    Returns the block it began with: 0, or the one that a killed run had reached.

    Hidden states are in memory, or on disk: in a temporary folder inside `spill`, or in `keep`, from
    which a run that was killed goes on at the block it had reached (blocks before it are not
    visited again; the block itself is, even if it had been visited). `balance` gives image tokens
    and text tokens equal weight. `keep` is emptied when the walk is done.

    Raises `InputRefused` when a tensor is missing or of another shape, when hidden states stop being
    finite, or when `keep` belongs to another walk; `EnvironmentLacks` without torch or disk space.
    """
    if not prompts:
        raise InputRefused("no calibration prompts; expected at least one image")
    use_torch(threads)
    needed = 2 * 4 * spec.hidden_size * sum(p.length for p in prompts)
    fingerprint = _fingerprint(checkpoint, spec, prompts, balance) if keep else ""
    with ExitStack() as stack:
        states: States = MemoryStates()
        first = 0
        if keep:
            first = _reached(keep, fingerprint)
            states = DiskStates(keep, needed if first == 0 else 0)
        elif spill:
            spill.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(TemporaryDirectory(prefix="states-", dir=spill))
            states = DiskStates(Path(folder), needed)
        walk = _Walk(checkpoint, spec, prompts, states, balance, progress)
        if first == 0:
            for number in range(len(prompts)):
                states.write(0, number, walk.blocks.begin(number))
        for layer in range(first, spec.layers):
            walk.block(layer, visit)
            if keep:
                states.settle(layer + 1)
                _save_index(keep, fingerprint, layer + 1)
            states.drop(layer)
        states.drop(spec.layers)
        if keep:
            (keep / INDEX).unlink()
    return first


class _Walk:
    """What all blocks share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: TextDecoder,
        prompts: Sequence[EmbeddedPrompt],
        states: States,
        balance: bool,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.spec, self.states = checkpoint, spec, states
        self.progress = progress
        self.weights = token_weights(prompts, balance=balance)
        self.rows = sampled_rows(prompts)
        self.blocks = open_blocks(checkpoint, spec, prompts)

    def block(self, layer: int, visit: BlockVisitor) -> None:
        """Both passes of one block and the visit between them."""
        weights = load_block(self.checkpoint, self.spec, layer)
        prefix = block_prefix(self.spec, layer)
        named = {prefix + n: t.numpy() for n, t in weights.items()}
        changed = _checked(visit(layer, named, self._statistics(layer, weights)), named)
        del named
        for name, values in changed.items():
            weights[name.removeprefix(prefix)] = as_tensor(values)
        del changed
        self._advance(layer, weights)

    def _statistics(
        self, layer: int, weights: Mapping[str, torch.Tensor]
    ) -> dict[str, InputStatistics]:
        """The first pass: statistics by full name of each matrix."""
        import torch

        groups = self.blocks.groups(layer)
        sums = {group: Accumulator(weights[group[0]].shape[1]) for group in groups}
        for number in range(len(self.weights)):
            self._tell(layer, 0, number)
            counts = torch.from_numpy(self.weights[number])
            rows = self.rows[number]

            def observe(
                group: Group,
                x: torch.Tensor,
                counts: torch.Tensor = counts,
                rows: NDArray[np.int64] = rows,
            ) -> None:
                try:
                    sums[group].add(x, counts, rows)
                except ValueError as error:
                    raise InputRefused(
                        f"block {layer}: the inputs of {group[0]} are not finite; "
                        "the checkpoint's values overflow"
                    ) from error

            hidden = as_tensor(self.states.read(layer, number))
            with torch.inference_mode():
                self.blocks.run(layer, weights, hidden, number, observe)
        prefix = block_prefix(self.spec, layer)
        found: dict[str, InputStatistics] = {}
        for group in groups:
            statistics = sums.pop(group).result()
            found |= {prefix + name: statistics for name in group}
        return found

    def _advance(self, layer: int, weights: Mapping[str, torch.Tensor]) -> None:
        """The second pass: the inputs of the next block."""
        import torch

        for number in range(len(self.weights)):
            self._tell(layer, 1, number)
            hidden = as_tensor(self.states.read(layer, number))
            with torch.inference_mode():
                after = self.blocks.run(layer, weights, hidden, number)
            self.states.write(layer + 1, number, after.numpy())
            self.states.spend(layer, number)

    def _tell(self, layer: int, second: int, number: int) -> None:
        count = len(self.weights)
        done = (2 * layer + second) * count + number
        self.progress(done, 2 * self.spec.layers * count, f"block {layer}")


def load_block(checkpoint: Checkpoint, spec: TextDecoder, layer: int) -> dict[str, torch.Tensor]:
    """The float32 tensors of one block by their names within it, matrices as ``[outputs, inputs]``.

    Raises `InputRefused` when one is missing or of another shape than `spec` says.
    """
    prefix = block_prefix(spec, layer)
    found = {}
    for tensor in block_tensors(spec, layer):
        shape = checkpoint.info(tensor.name).shape
        if shape != tensor.shape:
            raise InputRefused(
                f"tensor '{tensor.name}' is {list(shape)}; expected {list(tensor.shape)} by config.json"
            )
        values = checkpoint.float32(tensor.name)
        found[tensor.name.removeprefix(prefix)] = as_tensor(values.T if tensor.turned else values)
    return found


def as_tensor(values: Array) -> torch.Tensor:
    """A tensor over the array's memory, or over a copy when it is read-only or not contiguous."""
    import torch

    values = np.ascontiguousarray(values, np.float32)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _checked(changed: Mapping[str, Array], block: Mapping[str, Array]) -> Mapping[str, Array]:
    """What the visitor gave back. Raises ValueError when it does not fit the block."""
    for name, values in changed.items():
        if name not in block or values.shape != block[name].shape:
            raise ValueError(f"the visitor returned '{name}' {values.shape}, which the block lacks")
        if values.dtype != np.float32 or not np.isfinite(values).all():
            raise ValueError(f"the visitor returned '{name}' not as finite float32")
    return changed


@dataclass(frozen=True)
class _Identity:
    """What makes two walks the same, for `keep`."""

    spec: TextDecoder
    tensors: str
    prompts: str
    balance: bool


def _fingerprint(
    checkpoint: Checkpoint, spec: TextDecoder, prompts: Sequence[EmbeddedPrompt], balance: bool
) -> str:
    """Digest of the spec, the checkpoint's table, norms and biases, and the prompts."""
    tensors = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        tensors.update(f"{name} {info.dtype} {info.shape}\n".encode())
    for layer in range(spec.layers):
        # Vectors stand for the values: reading 14 GB again would cost more than a resume saves.
        for tensor in block_tensors(spec, layer):
            if len(tensor.shape) == 1:
                tensors.update(checkpoint.raw(tensor.name).tobytes())
    inputs = hashlib.sha256()
    for prompt in prompts:
        arrays = (prompt.embeds, prompt.image_positions, prompt.tokens, prompt.positions)
        for array in (*arrays, prompt.image_mask, *prompt.cross):
            if array is not None:
                inputs.update(np.ascontiguousarray(array).data)
        inputs.update(f"{prompt.prefix_length}\n".encode())
    identity = _Identity(spec, tensors.hexdigest(), inputs.hexdigest(), balance)
    return sha256_json(asdict(identity))


def _reached(keep: Path, fingerprint: str) -> int:
    """The block to go on with; 0 when `keep` holds no walk. Raises `InputRefused` for another's."""
    path = keep / INDEX
    if not path.is_file():
        return 0
    index = read_json(path)
    if index.get("fingerprint") != fingerprint or type(index.get("next")) is not int:
        raise InputRefused(
            f"{keep}: hidden states of another model, calibration set or version; remove the folder"
        )
    return int(index["next"])


def _save_index(keep: Path, fingerprint: str, layer: int) -> None:
    write_atomic(keep / INDEX, canonical_json({"fingerprint": fingerprint, "next": layer}))
