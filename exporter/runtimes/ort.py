"""Captions with onnxruntime on a CPU or GPU: three graphs, KV buffers shared in place, greedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.core.modelfiles import read_config
from exporter.families.base import Preparer, PromptInputs
from exporter.families.prompts.visible import VisibleImages
from exporter.families.table import family_of
from exporter.runtimes.base import Caption, Features
from exporter.runtimes.greedy import Positions, forced_inputs, greedy_caption, image_places
from exporter.runtimes.ort_cuda import device_setup
from exporter.runtimes.ort_decoder import Decoder, DecoderRun
from exporter.runtimes.ort_memory import Setup, host_setup
from exporter.runtimes.providers import Device
from exporter.runtimes.threads import usable_cores

PARTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")


class OrtCaptioner:
    """`runtimes.base.Captioner` over the graphs in ``model_dir/onnx``.

    Holds the three sessions; each call has key and value buffers of the length it can reach.
    """

    def __init__(
        self, model_dir: Path, *, threads: int | None = None, device: Device = "cpu"
    ) -> None:
        """Load tokenizer, settings and graphs; `threads` defaults to the cores this process may use.

        With `device` "cuda" all but shape arithmetic runs on the first GPU, keys and values stay
        there, and what would fall back to the CPU is refused. Raises `InputRefused` when a file is
        missing or a graph is not what the layout promises or the device can run, `EnvironmentLacks`
        without the device.
        """
        config = read_config(model_dir / "config.json")
        setup = device_setup(device)
        self.preparer = family_of(config).open_preparer(model_dir)
        self.engine = OrtEngine(model_dir / "onnx", self.preparer, threads or usable_cores(), setup)

    def caption(self, image: Image, prompt: str, max_new_tokens: int) -> Caption:
        """Greedy caption; see `greedy_caption`."""
        return greedy_caption(self.preparer, self.engine, image, prompt, max_new_tokens)

    def score(self, image: Image, prompt: str, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits ``[len(tokens) + 1, vocab]`` in one pass; see `Captioner.score`.

        Raises `InputRefused` when prompt and tokens exceed the context.
        """
        inputs = forced_inputs(self.preparer, image, prompt, tokens)
        return self.engine.forced(inputs, self.engine.features(inputs), tokens)


def image_rows(vision: ort.InferenceSession, inputs: PromptInputs) -> NDArray[np.float32]:
    """Feature rows ``[rows, hidden]`` of all runs of a vision graph for one prompt."""
    runs = (vision.run(["image_features"], dict(feed))[0] for feed in inputs.vision)
    return np.concatenate([np.asarray(r).reshape(-1, np.shape(r)[-1]) for r in runs])


class OrtEngine:
    """`greedy.Engine`: the sessions and the text being decoded."""

    def __init__(
        self, folder: Path, preparer: Preparer, threads: int, setup: Setup | None = None
    ) -> None:
        """Open the three graphs in `folder`, by default on the CPU. Raises `InputRefused`."""
        setup = setup or host_setup()
        vision, embed, decoder = (setup.open(folder / f"{p}.onnx", threads) for p in PARTS)
        self.vision, self.embed, self._memory = vision, embed, setup.memory
        self.decoder = Decoder(decoder, setup.memory)
        self._preparer = preparer
        self._run: DecoderRun | None = None

    def features(self, inputs: PromptInputs) -> Features:
        """Feature rows ``[rows, hidden]`` of all runs, in the order of the image tokens; or the cross
        keys and values of one image.
        """
        names = self.decoder.cross
        if names:
            (feed,) = inputs.vision
            return dict(zip(names, self.vision.run(names, dict(feed)), strict=True))
        return image_rows(self.vision, inputs)

    def prefill(
        self, inputs: PromptInputs, features: Features, capacity: int
    ) -> NDArray[np.float32]:
        """Logits ``[vocab]`` after the prompt; buffers for `capacity` positions are allocated."""
        self._run = None  # frees the last text's buffers before new ones are allocated
        self._run, embeds = self._begin(inputs, features, capacity, 1)
        last: NDArray[np.float32] = self._run.feed(embeds)[-1]
        return last

    def step(self, token: int) -> NDArray[np.float32]:
        """Logits ``[vocab]`` after one more token. Raises ValueError before any `prefill`."""
        if self._run is None:
            raise ValueError("step before prefill")
        embeds = self._memory.embed(self.embed, np.array([[token]], np.int64))
        last: NDArray[np.float32] = self._run.feed_one(embeds)[-1]
        return last

    def forced(
        self, inputs: PromptInputs, features: Features, tokens: Sequence[int]
    ) -> NDArray[np.float32]:
        """Logits ``[len(tokens) + 1, vocab]`` from one pass over prompt and `tokens`."""
        length, keep = len(inputs.input_ids) + len(tokens), len(tokens) + 1
        run, embeds = self._begin(inputs, features, length, keep)
        return run.feed(np.concatenate([embeds, self._embedded(tokens)]))

    def _begin(
        self, inputs: PromptInputs, features: Features, capacity: int, keep: int
    ) -> tuple[DecoderRun, NDArray[np.float32]]:
        """A new text, and the embeddings of its prompt."""
        positions = Positions(inputs)
        if isinstance(features, Mapping):
            visible = VisibleImages(inputs.image_mask)
            run = self.decoder.start(capacity, keep, positions, features, visible)
            return run, self._embedded(inputs.input_ids)
        run = self.decoder.start(capacity, keep, positions, prefix_length=inputs.prefix_length)
        return run, self._merged(inputs, features)

    def _embedded(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings ``[length, hidden]`` of token ids."""
        feeds = {"input_ids": np.asarray(ids, np.int64)[None]}
        embeds: NDArray[np.float32] = np.asarray(self.embed.run(["inputs_embeds"], feeds)[0])[0]
        return embeds

    def _merged(self, inputs: PromptInputs, features: NDArray[np.float32]) -> NDArray[np.float32]:
        embeds = self._embedded(inputs.input_ids)
        embeds[image_places(self._preparer, inputs, len(features))] = features
        return embeds
