"""Captions with the torch model of transformers: what everything else is compared with.

In float32 on the CPU; on a GPU also in float16, as the checkpoint is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.core.errors import InputRefused, require
from exporter.core.modelfiles import read_config
from exporter.core.tensors import read_header
from exporter.families.base import CrossFamily, Family, Preparer, PromptInputs
from exporter.families.table import family_of
from exporter.families.torch_classes import class_name, torch_class
from exporter.runtimes.base import Caption
from exporter.runtimes.greedy import Positions, forced_inputs, greedy_caption, image_places
from exporter.runtimes.quiet import quiet_transformers
from exporter.runtimes.threads import usable_cores
from exporter.runtimes.torch_device import CPU_FLOAT32, Place
from exporter.runtimes.weights import float_tensors

if TYPE_CHECKING:
    import torch


class TorchCaptioner:
    """`runtimes.base.Captioner` over a float or quantized model folder (dequantized when loaded).

    Adapters stay un-merged (peft computes them beside the weights), so that a merge can be proved
    against them. Tiles that are exactly zero are kept, as in the exported graphs.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        adapters: Sequence[Path] = (),
        threads: int | None = None,
        place: Place = CPU_FLOAT32,
    ) -> None:
        """Load the weights strictly; `threads` defaults to the usable cores, `place` says where and in
        which float type the model computes.

        The number of threads is torch's own, so it holds for the whole process. Raises
        `InputRefused` when a tensor is missing or unknown, or the folder is of another architecture;
        `EnvironmentLacks` without torch, transformers, the device or (for adapters) peft.
        """
        for module in ("torch", "transformers", *(["peft"] if adapters else [])):
            require(module, "build")
        import torch

        place.require()
        torch.set_num_threads(threads or usable_cores())
        config = read_config(model_dir / "config.json")
        self.family = family = family_of(config)
        self.preparer = family.open_preparer(model_dir)
        self.model = load_model(model_dir, config, place)
        if adapters:
            _attach(self.model, adapters)
        place.settle(self.model)
        self.engine = TorchEngine(self.model, self.preparer, family, place)

    def caption(self, image: Image, prompt: str, max_new_tokens: int) -> Caption:
        """Greedy caption; see `greedy_caption`."""
        return greedy_caption(self.preparer, self.engine, image, prompt, max_new_tokens)

    def score(self, image: Image, prompt: str, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits ``[len(tokens) + 1, vocab]``; see `Captioner.score`."""
        inputs = forced_inputs(self.preparer, image, prompt, tokens)
        return self.engine.forced(inputs, self.engine.features(inputs), tokens)


class TorchEngine:
    """`greedy.Engine` over a loaded torch model."""

    def __init__(
        self, model: Any, preparer: Preparer, family: Family, place: Place = CPU_FLOAT32
    ) -> None:
        self._model, self._preparer, self._family = model, preparer, family
        self._place = place
        self._cache: Any = None
        self._positions = Positions(None)

    def features(self, inputs: PromptInputs) -> torch.Tensor:
        """Feature rows ``[rows, hidden]``, in the order of the image tokens."""
        import torch

        with torch.inference_mode():
            features = self._family.torch_features(self._model, inputs)
        self._place.wait()
        return features

    def prefill(
        self,
        inputs: PromptInputs,
        features: torch.Tensor,
        capacity: int,  # noqa: ARG002 (torch's cache grows by itself)
    ) -> NDArray[np.float32]:
        """Logits ``[vocab]`` after the prompt."""
        last: NDArray[np.float32] = self._append(self._begun(inputs, features), 1)[-1]
        return last

    def step(self, token: int) -> NDArray[np.float32]:
        """Logits ``[vocab]`` after one more token."""
        last: NDArray[np.float32] = self._append(self._embedded([token]), 1)[-1]
        return last

    def forced(
        self, inputs: PromptInputs, features: torch.Tensor, tokens: Sequence[int]
    ) -> NDArray[np.float32]:
        """Logits ``[len(tokens) + 1, vocab]`` from one pass over prompt and `tokens`."""
        import torch

        embeds = torch.cat([self._begun(inputs, features), self._embedded(tokens)])
        return self._append(embeds, len(tokens) + 1)

    def _begun(self, inputs: PromptInputs, features: torch.Tensor) -> torch.Tensor:
        """Begin a new text behind an image; returns the embeddings of its prompt."""
        import torch

        self._cache, self._positions = None, Positions(inputs)
        if self._preparer.image_token_id is not None:
            return self._merged(inputs, features)
        with torch.inference_mode():
            family = cast(CrossFamily, self._family)
            self._cache = family.torch_start(self._model, features, inputs)
        return self._embedded(inputs.input_ids)

    def _embedded(self, ids: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            out: torch.Tensor = self._model.get_input_embeddings()(
                torch.as_tensor(ids, dtype=torch.int64, device=self._place.device)
            )
        return out

    def _merged(self, inputs: PromptInputs, features: torch.Tensor) -> torch.Tensor:
        import torch

        places = image_places(self._preparer, inputs, len(features))
        embeds = self._embedded(inputs.input_ids)
        with torch.inference_mode():
            embeds[self._place.put(torch.from_numpy(places))] = features
        return embeds

    def _append(self, embeds: torch.Tensor, keep: int) -> NDArray[np.float32]:
        """Logits ``[keep, vocab]`` after appending ``[length, hidden]`` embeddings to the cache."""
        import torch

        places = self._places(len(embeds))
        with torch.inference_mode():
            hidden, self._cache = self._family.torch_append(
                self._model, embeds, self._cache, places
            )
            logits = self._model.get_output_embeddings()(hidden[-keep:])
        rows: NDArray[np.float32] = logits.float().cpu().numpy()
        return rows

    def _places(self, length: int) -> torch.Tensor | None:
        """Positions of the next `length` inputs where the prompt gave its own."""
        import torch

        found = self._positions.take(length)
        return None if found is None else self._place.put(torch.from_numpy(found))


def load_model(model_dir: Path, config: dict[str, Any], place: Place = CPU_FLOAT32) -> Any:
    """The torch model of a float or quantized folder, in evaluation mode, on the CPU in the float type of
    `place`.

    `config` is its parsed config.json. Raises `InputRefused` when tensors are missing (other than a
    head tied to the embedding), unknown, or of another shape.
    """
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in float_tensors(model_dir)}
    return model_of(model_dir, config, tensors, place)


def model_of(
    model_dir: Path, config: dict[str, Any], tensors: dict[str, Any], place: Place = CPU_FLOAT32
) -> Any:
    """`load_model` from float32 torch tensors by name; `model_dir` is for the errors."""
    expected = class_name(config)
    declared = config.get("architectures") or [expected]
    if declared != [expected]:
        raise InputRefused(
            f"{model_dir / 'config.json'}: architectures is {declared!r}, model_type "
            f"{config['model_type']!r}; expected [{expected!r}]"
        )
    kind = torch_class(config)
    parsed = kind.config_class.from_dict(
        {
            k: v
            for k, v in config.items()
            if k not in ("torch_dtype", "dtype", "quantization_config")
        }
    )
    with quiet_transformers():
        model, found = kind.from_pretrained(
            None,
            config=parsed,
            state_dict=tensors,
            dtype=place.torch_dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            # Given, not read from the config, where it may name a kernel to download.
            attn_implementation="sdpa",
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, found[what]))
        if names:
            raise InputRefused(
                f"{model_dir}: {len(names)} tensors are {what.removesuffix('_keys')} for {expected}, "
                f"first {names[0]}; weights and config.json belong to different models"
            )
    return model.eval()


def _attach(model: Any, adapters: Sequence[Path]) -> None:
    from peft import PeftModel

    names = [f"adapter{i}" for i in range(len(adapters))]
    wrapped: Any = None
    for name, folder in zip(names, adapters, strict=True):
        read_config(folder / "adapter_config.json")
        read_header(folder / "adapter_model.safetensors")
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        # For the first one again: only this call says which keys did not fit.
        found = wrapped.load_adapter(str(folder), adapter_name=name)
        if found.unexpected_keys or any(f".{name}." in k for k in found.missing_keys):
            first = [*found.unexpected_keys, *found.missing_keys][0]
            raise InputRefused(f"{folder}: adapter key '{first}' does not fit this base model")
    wrapped.base_model.set_adapter(names)
    model.eval()
