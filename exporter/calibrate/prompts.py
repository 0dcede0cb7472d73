"""Calibration prompts: what the decoder reads for an image, a question and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.core.cases import Case, prompt_for
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config, read_json
from exporter.core.progress import Progress, silent
from exporter.families.prompts.visible import VisibleImages
from exporter.families.table import family_of
from exporter.runtimes.greedy import Positions, image_places
from exporter.runtimes.images import open_image

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from exporter.runtimes.ort import OrtCaptioner

MAX_ANSWER = 128
SPACE = "\u2581"  # SentencePiece's mark of a space


@dataclass(frozen=True)
class EmbeddedPrompt:
    """One prompt with its images and its answer, as the decoder's input.

    embeds: float32 ``[S, H]``; image_positions: bool ``[S]``, True where an image feature stands;
    tokens: int64 ``[S]``; answer: the places of the caption's tokens, at the end; positions: int64
    ``[axes, S]`` where a position is more than a place in the text; cross: float32 ``[heads, rows,
    head_dim]``, keys and values of each cross-attention in turn, where the decoder sees the image by
    these; image_mask: int64 ``[S, images]``, 1 where a token sees an image, where the decoder asks;
    prefix_length: so many of the first positions see one another.
    """

    embeds: NDArray[np.float32]
    image_positions: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    answer: slice
    positions: NDArray[np.int64] | None = None
    cross: tuple[NDArray[np.float32], ...] = ()
    image_mask: NDArray[np.int64] | None = None
    prefix_length: int = 0

    @property
    def length(self) -> int:
        """S."""
        return int(self.embeds.shape[0])

    @property
    def predicting(self) -> slice:
        """Positions whose logits predict the answer's tokens and what follows its last one."""
        return slice(self.answer.start - 1, self.answer.stop)


def embed_prompts(
    merged: Path,
    exported: Path,
    cases: Sequence[Case],
    prompt: str,
    *,
    threads: int,
    max_answer: int = MAX_ANSWER,
    progress: Progress = silent,
) -> list[EmbeddedPrompt]:
    """The decoder inputs for `cases`, computed with the float16 graphs in ``exported/onnx``.

    The answer is the case's caption or, where it has none, the model's own greedy caption; both
    end after `max_answer` tokens, or with the context. `merged` is the model that will be quantized:
    its embedding must have the graphs' width. Raises `InputRefused` when a prompt does not fit, an
    image cannot be read, or an answer has no tokens; `EnvironmentLacks` for DICOM images without
    pydicom.
    """
    from exporter.runtimes.ort import OrtCaptioner

    config = read_config(merged / "config.json")
    width = family_of(config).decoder_spec(config).hidden_size
    captioner = OrtCaptioner(exported, threads=threads)
    tokenizer = _tokenizer(exported)
    found = []
    for number, case in enumerate(cases):
        progress(number, len(cases), case.id)
        image = open_image(case.image)
        embedded = _embed(captioner, tokenizer, image, case, prompt, max_answer)
        if embedded.embeds.shape[1] != width:
            raise InputRefused(
                f"{exported}: graphs of width {embedded.embeds.shape[1]}, {merged} has {width}; "
                "export that model"
            )
        found.append(embedded)
    progress(len(cases), len(cases))
    return found


def _embed(
    captioner: OrtCaptioner,
    tokenizer: Tokenizer,
    image: Image,
    case: Case,
    prompt: str,
    max_answer: int,
) -> EmbeddedPrompt:
    preparer, engine = captioner.preparer, captioner.engine
    prompt = prompt_for(prompt, case.modality)
    inputs = preparer.prepare([image], prompt)
    start, limit = len(inputs.input_ids), preparer.generation.max_positions
    room = max(0, min(max_answer, limit - start))
    if case.caption is None and room:
        answer = list(captioner.caption(image, prompt, room).tokens)
    else:
        answer = _answer_tokens(tokenizer, inputs.input_ids, case.caption or "")[:room]
    if not answer:
        raise InputRefused(
            f"{case.id}: {start} tokens of prompt and none of caption; expected at least one of "
            f"caption and {limit} at most in all"
        )
    length = start + len(answer)
    tokens = np.concatenate([inputs.input_ids, np.asarray(answer, np.int64)])
    outputs = engine.embed.run(["inputs_embeds"], {"input_ids": tokens[None]})
    embeds = np.array(outputs[0][0], np.float32)
    features, places = engine.features(inputs), np.zeros(length, np.bool_)
    cross: tuple[NDArray[np.float32], ...] = ()
    if isinstance(features, Mapping):
        cross = tuple(np.array(part[0], np.float32) for part in features.values())
    else:
        places[:start] = image_places(preparer, inputs, len(features))
        embeds[places] = features
    return EmbeddedPrompt(
        embeds,
        places,
        tokens,
        slice(start, length),
        Positions(inputs).take(length),
        cross,
        VisibleImages(inputs.image_mask).take(length),
        inputs.prefix_length,
    )


def _answer_tokens(tokenizer: Tokenizer, prompt_ids: NDArray[np.int64], caption: str) -> list[int]:
    """Tokens of a caption as the chat template continues: after a space unless one stands there."""
    last = tokenizer.decode([int(prompt_ids[-1])], skip_special_tokens=False)
    text = " ".join(caption.split())
    # Llama's tokenizers put a space before every text themselves.
    own = tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
    gap = "" if own or not last or last[-1].isspace() or not text else " "
    return list(tokenizer.encode(gap + text, add_special_tokens=False).ids)


def _tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    read_json(path)  # for its one-line errors and its size limit
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
