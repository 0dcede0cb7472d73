"""What each task's graphs are run on: a model's own preparer on images and texts of several forms.

Imports no torch: tests/contract/test_tasks.py runs the same where torch is blocked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from exporter.families.base import Feed
from exporter.families.tasks import (
    ENCODER_GRAPH,
    MASK_GRAPH,
    SEQ2SEQ_DECODER,
    SEQ2SEQ_ENCODER,
    TEXT_GRAPH,
    VISION_GRAPH,
)
from exporter.runtimes.graphs import Graphs

# A feed of a graph; those that need another graph's outputs run it.
Feeds = Iterator[tuple[str, Feed]]
SIZES = ((64, 64), (97, 31), (40, 90), (13, 77))
TEXTS = (
    "Pleural effusion",
    "no acute cardiopulmonary process, heart and mediastinum normal",
    "CT",
    "a 19 mm lesion in the RIGHT lobe of the liver " * 20,
)


def noise(width: int, height: int, *, gray: bool = False) -> Image.Image:
    """A picture in soft blocks, another for each size."""
    random = np.random.default_rng(width * 1000 + height)
    small = random.integers(0, 256, (5, 7) if gray else (5, 7, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pictures(count: int) -> list[Image.Image]:
    """`count` pictures of other sizes, every second in gray."""
    return [noise(*size, gray=bool(i % 2)) for i, size in enumerate(SIZES[:count])]


def zero_shot(graphs: Graphs) -> Feeds:
    """Three pictures and one; four texts of other lengths, and one."""
    for count in (3, 1):
        yield VISION_GRAPH, graphs.preparer.images(pictures(count))
    for texts in (TEXTS, TEXTS[:1]):
        yield TEXT_GRAPH, graphs.preparer.texts(texts)


def padded_texts(graphs: Graphs) -> Iterator[tuple[str, Feed, Feed]]:
    """A graph, a text alone, and the same as the first of several, padded."""
    for text, longer in ((TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])):
        alone, padded = (graphs.preparer.texts(t) for t in ([text], [text, longer]))
        yield TEXT_GRAPH, alone, padded


def text_encoder(graphs: Graphs) -> Feeds:
    """Four texts of other lengths, and one."""
    for texts in (TEXTS, TEXTS[:1]):
        yield ENCODER_GRAPH, graphs.preparer.texts(texts)


def padded_encoder(graphs: Graphs) -> Iterator[tuple[str, Feed, Feed]]:
    """The same as `padded_texts` for a text encoder."""
    for _, alone, padded in padded_texts(graphs):
        yield ENCODER_GRAPH, alone, padded


def segmentation(graphs: Graphs) -> Feeds:
    """Three pictures and one, texts as in `zero_shot`, and the masks of one picture for each."""
    yield from zero_shot(graphs)
    seen = graphs.run(VISION_GRAPH, graphs.preparer.images(pictures(1)))
    for texts in (TEXTS, TEXTS[:1]):
        embeds = graphs.run(TEXT_GRAPH, graphs.preparer.texts(texts))
        yield MASK_GRAPH, {**seen, **embeds}


def summary(graphs: Graphs) -> Feeds:
    """Two texts; of each the beginning of a summary, and one token behind it."""
    for text in TEXTS[:2]:
        feed = graphs.preparer.text(text)
        yield SEQ2SEQ_ENCODER, feed
        cross = graphs.run(SEQ2SEQ_ENCODER, feed)
        past = {
            name.replace("cross_key_values", "past_key_values"): part[:, :, :0]
            for name, part in cross.items()
        }
        for tokens in ([graphs.preparer.settings.start_id, 7, 9, 30], [12]):
            step = {
                "input_ids": np.array([tokens], np.int64),
                "encoder_attention_mask": feed["attention_mask"],
                "num_logits_to_keep": np.array(0, np.int64),
                **cross,
                **past,
            }
            yield SEQ2SEQ_DECODER, step
            found = graphs.run(SEQ2SEQ_DECODER, step)
            past = {
                name.replace("present", "past_key_values"): part
                for name, part in found.items()
                if name != "logits"
            }


def padded_summary(graphs: Graphs) -> Iterator[tuple[str, Feed, Feed]]:
    """The encoder, a text alone, and the same as the first of two, padded."""
    alone, longer = (graphs.preparer.text(text) for text in (TEXTS[0], TEXTS[1]))
    width = longer["input_ids"].shape[1] - alone["input_ids"].shape[1]
    padded = {
        name: np.concatenate([np.pad(row, ((0, 0), (0, width))), longer[name]])
        for name, row in alone.items()
    }
    yield SEQ2SEQ_ENCODER, alone, padded


INPUTS: dict[str, Callable[[Graphs], Feeds]] = {
    "zero-shot": zero_shot,
    "segmentation": segmentation,
    "summary": summary,
    "text-encoder": text_encoder,
}
