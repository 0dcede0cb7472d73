"""Embedded prompts against the torch model's own embeddings and features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.calibrate.prompts import (
    EmbeddedPrompt,
    _answer_tokens,
    _tokenizer,
    embed_prompts,
)
from exporter.core.cases import Case
from exporter.core.errors import InputRefused
from exporter.runtimes.images import open_image
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import TorchCaptioner
from tests.support import tiny, tiny_llava
from tests.support.tiny import write_tiny_model
from tests.unit.calibrate.conftest import CAPTIONS, PROMPT


def test_embeds_are_those_of_the_torch_model(
    merged: Path, cases: list[Case], prompts: list[EmbeddedPrompt]
) -> None:
    torch_model = TorchCaptioner(merged, threads=1)
    for case, found in zip(cases, prompts, strict=True):
        inputs = torch_model.preparer.prepare([open_image(case.image)], PROMPT)
        features = torch_model.engine.features(inputs)
        start = len(inputs.input_ids)
        np.testing.assert_array_equal(found.tokens[:start], inputs.input_ids)
        places = found.tokens == torch_model.preparer.image_token_id
        np.testing.assert_array_equal(found.image_positions, places)
        np.testing.assert_allclose(found.embeds[places], features, rtol=1e-3, atol=1e-4)
        table = torch_model.model.get_input_embeddings().weight.detach().numpy()
        np.testing.assert_allclose(found.embeds[~places], table[found.tokens[~places]], atol=1e-6)
        assert found.answer == slice(start, found.length)
        assert found.predicting == slice(start - 1, found.length)


def test_answers_are_the_caption_or_the_models_own(
    exported: Path, cases: list[Case], prompts: list[EmbeddedPrompt]
) -> None:
    captioner = OrtCaptioner(exported, threads=1)
    for case, found in zip(cases, prompts, strict=True):
        answer = [int(t) for t in found.tokens[found.answer]]
        if case.caption is None:
            own = captioner.caption(open_image(case.image), PROMPT, 6)
            assert answer == list(own.tokens)
        else:
            assert len(answer) == 6
            # The template ends in "Assistant:", so that a space belongs to the answer.
            assert _tokenizer(exported).decode(answer).startswith(" ")
            assert case.caption.startswith(captioner.preparer.decode(answer))
    assert CAPTIONS[2] is None


def test_what_does_not_fit_is_refused(
    merged: Path, exported: Path, cases: list[Case], tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match="c0: .* tokens of prompt and none of caption"):
        embed_prompts(merged, exported, [replace(cases[0], caption=" ")], PROMPT, threads=1)
    with pytest.raises(InputRefused, match="the model has 512; shorten the prompt"):
        embed_prompts(merged, exported, cases[:1], "Befund " * 600, threads=1)
    missing = replace(cases[0], image=tmp_path / "none.png")
    with pytest.raises(InputRefused, match="none.png"):
        embed_prompts(merged, exported, [missing], PROMPT, threads=1)
    other = write_tiny_model(tmp_path / "other", hidden=32, layers=1)
    with pytest.raises(InputRefused, match="width 64"):
        embed_prompts(other, exported, cases[:1], PROMPT, threads=1)


def test_a_long_answer_ends_with_the_context(
    merged: Path, exported: Path, cases: list[Case]
) -> None:
    long = replace(cases[0], caption="Befund äöü " * 200)
    (found,) = embed_prompts(merged, exported, [long], PROMPT, threads=1, max_answer=1000)
    (usual,) = embed_prompts(merged, exported, [long], PROMPT, threads=1, max_answer=6)
    assert found.length == 512 and found.answer == slice(usual.answer.start, 512)
    np.testing.assert_array_equal(found.tokens[: usual.length], usual.tokens)


def test_an_answer_begins_after_one_space(tmp_path: Path) -> None:
    """Byte-level tokenizers get the space from us, Llama's put it there themselves."""
    for name, write in {
        "bytes": tiny.write_tokenizer,
        "llama": lambda folder: tiny_llava.write_tokenizer(folder, image=True),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder)
        tokenizer = _tokenizer(folder)
        prompt = tokenizer.encode("Assistant:").ids
        answer = _answer_tokens(tokenizer, np.array(prompt), "a lesion")
        assert tokenizer.decode([*prompt, *answer]).endswith("Assistant: a lesion")
