"""The decoder with some weights replaced, against itself: KL on the calibration captions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.blocks.base import use_torch
from exporter.calibrate.blocks.llama import LlamaBlocks, rms_norm
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.calibrate.states import DiskStates, MemoryStates, States
from exporter.calibrate.walk import as_tensor, load_block
from exporter.core.errors import InputRefused
from exporter.core.progress import Progress, silent
from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec
from exporter.families.specs.walked import block_prefix

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float32]


class CaptionModel:
    """`core.activations.FloatModel` over a checkpoint's decoder and calibration prompts.

    The reference runs once, when constructed; the hidden states before each block and the
    log-probabilities of the caption tokens are kept, in memory or in a temporary folder inside
    `spill`, so that replacing a matrix of block i runs only blocks i and later. Use it in a `with`
    block when `spill` is given.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        prompts: Sequence[EmbeddedPrompt],
        *,
        spill: Path | None = None,
        threads: int,
        progress: Progress = silent,
    ) -> None:
        """Run the reference. Raises `InputRefused` as `walk_decoder` does, `EnvironmentLacks`."""
        if not prompts:
            raise InputRefused("no calibration prompts; expected at least one image")
        use_torch(threads)
        self._checkpoint, self._spec, self._prompts = checkpoint, spec, prompts
        # As quantizers store it: one matrix for both when tied, without a head, or of equal bytes.
        self._tied = (
            spec.tied
            or spec.head not in checkpoint
            or checkpoint.same_bytes(spec.head, spec.embedding)
        )
        self._blocks = LlamaBlocks(spec, checkpoint, prompts)
        self._stack = ExitStack()
        self._states: States = MemoryStates()
        if spill:
            spill.mkdir(parents=True, exist_ok=True)
            folder = self._stack.enter_context(TemporaryDirectory(prefix="kl-", dir=spill))
            self._states = DiskStates(Path(folder), self._bytes())
        for number, prompt in enumerate(prompts):
            self._states.write(0, number, prompt.embeds)
        self._run(0, {}, self._states, progress)
        # After the last block's output, at `layers`, the log-probabilities: at `layers + 1`.
        for number, rows in enumerate(self._log_probabilities({}, self._states)):
            self._states.write(spec.layers + 1, number, rows.numpy())

    def __enter__(self) -> CaptionModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def kl(self, replaced: Mapping[str, Array], features: Sequence[Array] | None = None) -> float:
        """Mean KL(reference || replaced) in nats per predicted token (caption tokens and the stop).

        `replaced` is by full names in the checkpoint: matrices and norms of blocks, the embedding
        (also of the head when tied), the final norm, the head; each is looked up when it is needed,
        so that a mapping may read them from disk. `features`: by prompt the image features
        ``[image positions, H]`` of another vision part. Raises ValueError for other names or shapes.
        """
        self._refuse_strangers(replaced)
        first = 0 if features is not None else self._first_block(replaced)
        states: States = MemoryStates()
        table = None
        if first == 0 and self._spec.embedding in replaced:
            table = self._replacement(self._spec.embedding, replaced)
        for number in range(len(self._prompts)):
            hidden = self._states.read(first, number)
            if table is not None:
                hidden = self._embed(number, table)
            if features is not None:
                hidden = self._with_features(number, hidden, features[number])
            states.write(first, number, hidden)
        self._run(first, replaced, states, silent)
        total, count = 0.0, 0
        for number, rows in enumerate(self._log_probabilities(replaced, states)):
            theirs = rows.double()
            ours = as_tensor(self._states.read(self._spec.layers + 1, number)).double()
            total += float((ours.exp() * (ours - theirs)).sum())
            count += ours.shape[0]
        return total / count

    def _run(
        self, first: int, replaced: Mapping[str, Array], states: States, progress: Progress
    ) -> None:
        """Blocks `first` and later, layer by layer over all prompts."""
        import torch

        for layer in range(first, self._spec.layers):
            progress(layer, self._spec.layers, f"block {layer}")
            weights = load_block(self._checkpoint, self._spec, layer)
            prefix = block_prefix(self._spec, layer)
            for name in weights:
                if prefix + name in replaced:
                    weights[name] = as_tensor(self._replacement(prefix + name, replaced))
            for number in range(len(self._prompts)):
                hidden = as_tensor(states.read(layer, number))
                with torch.inference_mode():
                    after = self._blocks.run(layer, weights, hidden, number)
                states.write(layer + 1, number, after.numpy())
                if states is not self._states:
                    states.spend(layer, number)

    def _log_probabilities(
        self, replaced: Mapping[str, Array], states: States
    ) -> Iterator[torch.Tensor]:
        """By prompt ``[answer + 1, vocab]``, where the caption and its end are predicted."""
        import torch

        spec = self._spec
        head = self._tensor(spec.embedding if self._tied else spec.head, replaced)
        norm = self._tensor(spec.final_norm, replaced)
        for number, prompt in enumerate(self._prompts):
            rows = as_tensor(states.read(spec.layers, number)[prompt.predicting])
            with torch.inference_mode():
                logits = rms_norm(rows, norm, spec.norm_eps) @ head.T
                logits = torch.log_softmax(logits, dim=-1)
            yield logits

    def _tensor(self, name: str, replaced: Mapping[str, Array]) -> torch.Tensor:
        if name in replaced:
            return as_tensor(self._replacement(name, replaced))
        return as_tensor(self._checkpoint.float32(name))

    def _replacement(self, name: str, replaced: Mapping[str, Array]) -> Array:
        values = replaced[name]
        if values.shape != self._checkpoint.info(name).shape:
            raise ValueError(f"'{name}' is {values.shape}, not of the checkpoint's shape")
        return values

    def _embed(self, number: int, table: Array) -> Array:
        prompt = self._prompts[number]
        # Image tokens stand for features; their ids may lie beyond the table.
        rows = table[np.where(prompt.image_positions, 0, prompt.tokens)]
        embeds: Array = np.where(prompt.image_positions[:, None], prompt.embeds, rows)
        return embeds

    def _with_features(self, number: int, hidden: Array, features: Array) -> Array:
        places = self._prompts[number].image_positions
        if features.shape != (int(places.sum()), hidden.shape[1]):
            raise ValueError(f"features {features.shape} for {int(places.sum())} image positions")
        embeds = np.array(hidden, np.float32)
        embeds[places] = features
        return embeds

    def _refuse_strangers(self, replaced: Mapping[str, Array]) -> None:
        spec = self._spec
        whole = {spec.embedding, spec.final_norm} | (set() if self._tied else {spec.head})
        for name in replaced:
            known = name in whole or self._block_of(name) is not None
            if not known or name not in self._checkpoint:
                raise ValueError(f"'{name}' is no tensor of the decoder")

    def _first_block(self, replaced: Mapping[str, Array]) -> int:
        if self._spec.embedding in replaced:
            return 0
        blocks = [self._block_of(name) for name in replaced]
        return min((b for b in blocks if b is not None), default=self._spec.layers)

    def _block_of(self, name: str) -> int | None:
        found = re.match(re.escape(self._spec.prefix) + r"layers\.(\d+)\.", name)
        return int(found.group(1)) if found else None

    def _bytes(self) -> int:
        """Bytes of everything that is kept."""
        spec, prompts = self._spec, self._prompts
        hidden = (spec.layers + 1) * spec.hidden_size * sum(p.length for p in prompts)
        answers = sum(p.predicting.stop - p.predicting.start for p in prompts)
        return 4 * int(hidden + spec.vocab_size * answers)
