"""Zero-shot scores, ranks, sentence vectors and entities, on graphs whose outputs are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from exporter.core.errors import InputRefused, WrongUsage
from exporter.families.base import Feed
from exporter.runtimes.tasks.encode import EntitySpan, TextEncoder, decode_entities
from exporter.runtimes.tasks.zero_shot import ZeroShot, label_scores, retrieval_ranks

# Directions of texts, by the first word behind the template.
AXES = {"left": (1.0, 0.0), "right": (0.0, 1.0), "both": (1.0, 1.0), "none": (0.0, 0.0)}


class Plain:
    """A preparer and graphs of two dimensions: an image's vector is its first pixel."""

    template = "see {}"

    def __init__(self) -> None:
        self.preparer = self
        self.batches: list[int] = []

    def images(self, images: Sequence[Image.Image]) -> Feed:
        return {"pixels": np.stack([np.asarray(i, np.float32)[0, 0, :2] for i in images])}

    def texts(self, texts: Sequence[str]) -> Feed:
        return {"ids": np.array([AXES[t.split()[1]] for t in texts], np.float32)}

    def run(self, graph: str, feed: Feed) -> Mapping[str, NDArray[np.float32]]:
        self.batches.append(len(next(iter(feed.values()))))
        if graph == "vision_model":
            return {"image_embeds": 3 * feed["pixels"]}
        return {"text_embeds": 0.1 * feed["ids"], "logit_scale": np.float32(4.0)}  # type: ignore[dict-item]


def image(red: int, green: int) -> Image.Image:
    return Image.fromarray(np.full((3, 2, 3), (red, green, 0), np.uint8))


def test_scores_are_the_softmax_of_scaled_cosines() -> None:
    scores = ZeroShot(Plain()).scores([image(5, 0), image(7, 7)], ["left", "right"])
    share = exp(4) / (exp(4) + 1)
    np.testing.assert_allclose(scores, [[share, 1 - share], [0.5, 0.5]], rtol=1e-6)


class Alone(Plain):
    """The same with a bias of the score, as SigLIP has it."""

    def run(self, graph: str, feed: Feed) -> Mapping[str, NDArray[np.float32]]:
        found = super().run(graph, feed)
        return found if graph == "vision_model" else {**found, "logit_bias": np.float32(-3.0)}  # type: ignore[dict-item]


def test_with_a_bias_each_label_is_scored_by_itself() -> None:
    model = ZeroShot(Alone())
    scores = model.scores([image(5, 0), image(7, 7)], ["left", "right"])
    one, none, half = (1 / (1 + exp(3 - 4 * cosine)) for cosine in (1, 0, 0.5**0.5))
    np.testing.assert_allclose(scores, [[one, none], [half, half]], rtol=1e-6)
    np.testing.assert_allclose(model.scores([image(5, 0)], ["right"]), [[none]], rtol=1e-6)
    assert (model.logit_scale, model.logit_bias) == (4.0, -3.0)
    plain = ZeroShot(Plain())
    plain.embed_texts(["see left"])
    assert plain.logit_bias is None


def test_a_score_far_from_even_neither_overflows_nor_becomes_nothing() -> None:
    units = np.array([[1.0]], np.float32)
    with np.errstate(all="raise"):
        low, high = (label_scores(units, units, 1.0, bias)[0, 0] for bias in (-701.0, 701.0))
    assert low == pytest.approx(exp(-700), rel=1e-9) and high == 1.0


def test_vectors_have_length_one_whatever_the_batch() -> None:
    graphs = Plain()
    vectors = ZeroShot(graphs).embed_images([image(i % 5 + 1, 12) for i in range(40)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert vectors.dtype == np.float32 and sum(graphs.batches) == 40 and max(graphs.batches) < 40


def test_another_template_and_the_scale() -> None:
    model = ZeroShot(Plain())
    assert model.scores([image(1, 0)], ["left", "both"], "an {}").shape == (1, 2)
    assert model.logit_scale == 4.0


@pytest.mark.parametrize("template", ["no place", "{} and {}", "{} {0}"])
def test_a_template_without_one_place_is_refused(template: str) -> None:
    with pytest.raises(WrongUsage, match="expected one"):
        ZeroShot(Plain()).scores([image(1, 0)], ["left"], template)


def test_no_labels_are_refused() -> None:
    with pytest.raises(WrongUsage, match="no labels"):
        ZeroShot(Plain()).scores([image(1, 0)], [])


def test_a_vector_without_direction_is_refused() -> None:
    with pytest.raises(InputRefused, match="1 of 2 text vectors are zero"):
        ZeroShot(Plain()).embed_texts(["see none", "see left"])


def test_ranks_count_what_stands_before_the_best_relevant_item() -> None:
    similarity = [[0.9, 0.5, 0.7], [0.1, 0.1, 0.1], [0.2, 0.8, 0.4]]
    relevant = [[0, 1, 0], [1, 0, 0], [1, 0, 1]]
    # A tie counts against: the second query finds nothing apart.
    assert retrieval_ranks(similarity, relevant).tolist() == [3, 3, 2]


def test_a_query_without_a_relevant_item_is_refused() -> None:
    with pytest.raises(ValueError, match="no relevant item"):
        retrieval_ranks([[1.0, 2.0]], [[0, 0]])


class Letters:
    """An encoder with a token per character; hidden states or logits are its code."""

    def __init__(self, labels: tuple[str, ...] = (), *, per_token: bool = True) -> None:
        self.labels, self._per_token = labels, per_token
        self.preparer = self

    def texts(self, texts: Sequence[str]) -> Feed:
        length = max(map(len, texts))
        mask = np.array([[1] * len(t) + [0] * (length - len(t)) for t in texts], np.int64)
        ids = [[ord(c) for c in t] + [0] * (length - len(t)) for t in texts]
        return {"input_ids": np.array(ids, np.int64), "attention_mask": mask}

    def tokens(self, text: str) -> tuple[tuple[int, int], ...]:
        return tuple((i, i + 1) for i in range(len(text)))

    def run(self, graph: str, feed: Feed) -> Mapping[str, NDArray[np.float32]]:
        ids = feed["input_ids"].astype(np.float32)
        if not self.labels:
            # Padding is full of rubbish, which must not count.
            hidden = np.where(feed["attention_mask"] > 0, ids, np.nan)
            return {"last_hidden_state": np.stack([hidden, 2 * hidden], -1).astype(np.float32)}
        marks = np.stack([ids == ord(label[-1]) for label in self.labels], -1).astype(np.float32)
        return {"logits": marks if self._per_token else marks.sum(1)}


def test_a_sentence_is_the_mean_of_its_own_tokens() -> None:
    vectors = TextEncoder(Letters()).embed(["ab", "abcd"])
    np.testing.assert_allclose(vectors, [[97.5, 195], [98.5, 197]], rtol=1e-6)


def test_logits_of_a_classification_head() -> None:
    model = TextEncoder(Letters(("of a", "of b"), per_token=False))
    assert model.head == "class"
    assert model.logits(["aab", "b"]).tolist() == [[2, 1], [0, 1]]


def test_a_head_gives_no_vectors_and_no_head_no_logits() -> None:
    with pytest.raises(WrongUsage, match="last_hidden_state"):
        TextEncoder(Letters(("a",))).embed(["a"])
    with pytest.raises(WrongUsage, match="logits"):
        TextEncoder(Letters()).logits(["a"])


def test_entities_of_a_token_head() -> None:
    model = TextEncoder(Letters(("O", "B-b", "I-i")))
    # Letters that touch are one word, with the tag of its first.
    assert model.head == "token"
    assert model.entities("b xi i") == (EntitySpan("b", 0, 1), EntitySpan("i", 5, 6))


# What seqeval 1.2.2 says in its default mode: get_entities, types by word.
SEQEVAL = [
    ("O B-f I-f I-a O I-f B-f B-f I-f", [("f", 1, 2), ("a", 3, 3), ("f", 5, 5), ("f", 6, 6), ("f", 7, 8)]),
    ("B-f I-f O I-a I-a B-a I-f I-f O", [("f", 0, 1), ("a", 3, 4), ("a", 5, 5), ("f", 6, 7)]),
    ("O B-f B-a I-a I-a", [("f", 1, 1), ("a", 2, 4)]),
]  # fmt: skip


@pytest.mark.parametrize(("tags", "expected"), SEQEVAL)
def test_tags_are_joined_as_seqeval_joins_them(
    tags: str, expected: list[tuple[str, int, int]]
) -> None:
    words = tags.split()
    text = " ".join(["abc"] * len(words))
    tokens = [(4 * i, 4 * i + 3) for i in range(len(words))]
    spans = decode_entities(text, tokens, words)
    assert [(s.kind, s.start // 4, s.end // 4) for s in spans] == expected


def test_pieces_of_a_word_and_special_tokens() -> None:
    text = "no pneumothorax."
    tokens = ((0, 0), (0, 2), (3, 9), (9, 15), (15, 16), (0, 0))
    tags = ("B-finding", "O", "B-finding", "O", "O", "O")
    assert decode_entities(text, tokens, tags) == (EntitySpan("finding", 3, 15),)


def test_tags_without_prefix_count_as_inside() -> None:
    tokens = ((0, 1), (2, 3), (4, 5))
    assert decode_entities("a b c", tokens, ("f", "f", "O")) == (EntitySpan("f", 0, 3),)
