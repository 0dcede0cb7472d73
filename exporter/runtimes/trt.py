"""Captions with TensorRT engines: the runtime of `ort.py`, with keys and values kept on the GPU.

Not run on hardware: docs/engines.md lists what was checked and what was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.core.modelfiles import read_config
from exporter.families.base import Preparer, PromptInputs
from exporter.families.table import family_of
from exporter.runtimes.base import Caption, Features
from exporter.runtimes.greedy import forced_inputs, greedy_caption, image_places
from exporter.runtimes.trt_decoder import Growing, TrtDecoder
from exporter.runtimes.trt_engine import Loader, RuntimeOptions
from exporter.runtimes.trt_memory import DeviceMemory

PARTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
SUFFIX = ".engine"


class TrtCaptioner:
    """`runtimes.base.Captioner` over the engines in a folder. Not safe for use by several threads."""

    def __init__(
        self,
        model_dir: Path,
        engines: Path,
        trt: Any,
        memory: DeviceMemory,
        options: RuntimeOptions | None = None,
    ) -> None:
        """Load tokenizer and settings of `model_dir` and the engines; `trt`: the module.

        Raises `InputRefused` when an engine does not load or is not what the layout promises.
        """
        config = read_config(model_dir / "config.json")
        self.preparer = family_of(config).open_preparer(model_dir)
        self.engine = TrtEngine(engines, self.preparer, trt, memory, options)

    def caption(self, image: Image, prompt: str, max_new_tokens: int) -> Caption:
        """Greedy caption; see `greedy_caption`."""
        return greedy_caption(self.preparer, self.engine, image, prompt, max_new_tokens)

    def score(self, image: Image, prompt: str, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits ``[len(tokens) + 1, vocab]`` in one pass; see `Captioner.score`.

        Raises `InputRefused` when prompt and tokens exceed the context or the engine's prompt.
        """
        inputs = forced_inputs(self.preparer, image, prompt, tokens)
        return self.engine.forced(inputs, self.engine.features(inputs), tokens)

    def close(self) -> None:
        """Free all GPU memory."""
        self.engine.close()


class TrtEngine:
    """`greedy.Engine` over three engines."""

    def __init__(
        self,
        folder: Path,
        preparer: Preparer,
        trt: Any,
        memory: DeviceMemory,
        options: RuntimeOptions | None = None,
    ) -> None:
        """Load the engines in `folder`. Raises `InputRefused`, or `EnvironmentLacks` when GPU memory
        is short.
        """
        loader = Loader(trt, options)
        vision, embed, decoder = (loader.load(folder / f"{p}{SUFFIX}") for p in PARTS)
        self._vision, self._embed = vision.context(0, memory), embed.context(0, memory)
        self.decoder = TrtDecoder(decoder, memory)
        self._preparer = preparer

    def features(self, inputs: PromptInputs) -> Features:
        """Feature rows ``[rows, hidden]`` of all runs, in the order of the image tokens; or the cross
        keys and values of one image.
        """
        names = self.decoder.cross
        if names:
            (feed,) = inputs.vision
            return dict(zip(names, self._vision.run(feed, names), strict=True))
        runs = (self._vision.run(feed, ["image_features"])[0] for feed in inputs.vision)
        rows = np.concatenate([r.reshape(-1, r.shape[-1]) for r in runs])
        return rows.astype(np.float32, copy=False)

    def prefill(
        self, inputs: PromptInputs, features: Features, capacity: int
    ) -> NDArray[np.float32]:
        """Logits ``[vocab]`` after the prompt of a text of at most `capacity` positions."""
        last: NDArray[np.float32] = self._begin(inputs, features, (), capacity)[-1]
        return last

    def step(self, token: int) -> NDArray[np.float32]:
        """Logits ``[vocab]`` after one more token. Raises ValueError before any `prefill`."""
        return self.decoder.step(self._embedded([token]))

    def forced(
        self, inputs: PromptInputs, features: Features, tokens: Sequence[int]
    ) -> NDArray[np.float32]:
        """Logits ``[len(tokens) + 1, vocab]`` from one pass over prompt and `tokens`."""
        return self._begin(inputs, features, tokens, len(inputs.input_ids) + len(tokens))

    def close(self) -> None:
        """Free all GPU memory."""
        for held in (self._vision, self._embed, self.decoder):
            held.close()

    def _begin(
        self, inputs: PromptInputs, features: Features, tokens: Sequence[int], capacity: int
    ) -> NDArray[np.float32]:
        embeds = self._embedded([*inputs.input_ids.tolist(), *tokens])
        cross: Mapping[str, NDArray[np.float32]] = {}
        if isinstance(features, Mapping):
            cross = features
        else:
            embeds[: len(inputs.input_ids)][image_places(self._preparer, inputs, len(features))] = (
                features
            )
        return self.decoder.start(embeds, capacity, len(tokens) + 1, Growing(inputs), cross)

    def _embedded(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Embeddings ``[length, hidden]`` of token ids."""
        feed = {"input_ids": np.asarray(ids, np.int64)[None]}
        embeds: NDArray[np.float32] = self._embed.run(feed, ["inputs_embeds"])[0][0]
        return embeds.astype(np.float32)
