"""OrtCaptioner against transformers' own generate and forward on the same weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter.core.errors import InputRefused
from exporter.runtimes.ort import OrtCaptioner

PROMPT = "Describe this medical image."


@pytest.fixture(scope="module")
def captioner(exported: Path) -> OrtCaptioner:
    return OrtCaptioner(exported, threads=1)


@pytest.fixture(scope="module")
def torch_model(tiny: Path) -> Any:
    import torch
    from transformers import Idefics3ForConditionalGeneration

    torch.set_num_threads(1)
    return Idefics3ForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()


def inputs_of(captioner: OrtCaptioner, image: Image.Image) -> dict[str, Any]:
    import torch

    inputs = captioner.preparer.prepare([image], PROMPT)
    return {
        "input_ids": torch.from_numpy(inputs.input_ids)[None],
        "pixel_values": torch.from_numpy(inputs.pixel_values)[None],
    }


@pytest.mark.parametrize("index", range(5))
def test_captions_equal_generate(
    captioner: OrtCaptioner, torch_model: Any, pictures: list[Image.Image], index: int
) -> None:
    inputs = inputs_of(captioner, pictures[index])
    length = inputs["input_ids"].shape[1]
    expected = torch_model.generate(**inputs, max_new_tokens=24, do_sample=False)[
        0, length:
    ].tolist()
    caption = captioner.caption(pictures[index], PROMPT, 24)
    stops = captioner.preparer.generation.stop_ids
    assert list(caption.tokens) == [t for t in expected if t not in stops]
    assert caption.stopped == (expected[-1] in stops)
    assert caption.prompt_tokens == length
    assert len(caption.timing.decode) == len(expected) - 1
    assert caption.timing.total >= caption.timing.first_token > 0


def test_score_equals_forward(
    captioner: OrtCaptioner, torch_model: Any, pictures: list[Image.Image]
) -> None:
    import torch

    tokens = [10, 300, 41, 7]
    inputs = inputs_of(captioner, pictures[0])
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    with torch.inference_mode():
        expected = torch_model(**inputs).logits[0, length - 1 :].numpy()
    found = captioner.score(pictures[0], PROMPT, tokens)
    assert found.shape == (5, torch_model.config.text_config.vocab_size)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert captioner.score(pictures[0], PROMPT, []).shape == (1, found.shape[1])


def test_score_follows_the_caption(captioner: OrtCaptioner, pictures: list[Image.Image]) -> None:
    tokens = captioner.caption(pictures[2], PROMPT, 24).tokens
    assert tuple(captioner.score(pictures[2], PROMPT, tokens)[:-1].argmax(-1)) == tokens


def test_buffers_are_shared_in_place(captioner: OrtCaptioner) -> None:
    decoder = captioner.engine.decoder
    run = decoder.start(8, keep=1)
    width = captioner.engine.embed.get_outputs()[0].shape[-1]
    embeds = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    run.feed(embeds[:4])
    before = {name: buffer.copy() for name, buffer in run.buffers.items()}
    logits = run.feed(embeds[4:]).copy()
    names = [*(decoder.present(name) for name in run.buffers), "logits"]  # as they were bound
    outputs = dict(zip(names, run._binding.get_outputs(), strict=True))
    for name, buffer in run.buffers.items():
        assert outputs[decoder.present(name)].data_ptr() == buffer.ctypes.data
        assert np.array_equal(buffer[:, :, :4], before[name][:, :, :4])  # the past is not moved
        assert buffer[:, :, 4].any()
        assert not buffer[:, :, 5:].any()
    # The same text without sharing: past given as an array of its true length, fresh presents.
    feeds: dict[str, Any] = {name: b[:, :, :4].copy() for name, b in before.items()}
    feeds |= {
        "inputs_embeds": embeds[None, 4:],
        "attention_mask": np.ones((1, 5), np.int64),
        "num_logits_to_keep": np.array(1, np.int64),
    }
    copied = decoder.session.run(["logits"], feeds)[0]
    np.testing.assert_allclose(logits, np.asarray(copied)[0], atol=1e-6)


def test_a_full_buffer_is_an_error(captioner: OrtCaptioner) -> None:
    run = captioner.engine.decoder.start(2, keep=1)
    with pytest.raises(ValueError, match="3 positions in 2"):
        run.feed(np.zeros((3, 64), np.float32))


def test_stop_token_ends_the_caption(
    exported: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    first = OrtCaptioner(exported, threads=1).caption(pictures[0], PROMPT, 12)
    stop = next(t for t in first.tokens if t != first.tokens[0])
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    caption = OrtCaptioner(copy, threads=1).caption(pictures[0], PROMPT, 12)
    assert caption.stopped
    assert caption.tokens == first.tokens[: first.tokens.index(stop)]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [first.tokens[0]]}))
    caption = OrtCaptioner(copy, threads=1).caption(pictures[0], PROMPT, 12)
    assert caption.stopped
    assert caption.tokens == ()
    assert caption.timing.decode == ()


def test_the_context_bounds_the_caption(
    captioner: OrtCaptioner, pictures: list[Image.Image]
) -> None:
    fillers = " x9" * 150
    caption = captioner.caption(pictures[1], PROMPT + fillers, 4)
    assert caption.prompt_tokens + 4 < 512
    long = captioner.caption(pictures[1], PROMPT + fillers, 10_000)
    assert long.stopped or long.prompt_tokens + len(long.tokens) == 512
    with pytest.raises(InputRefused, match="score fewer"):
        captioner.score(pictures[1], PROMPT, [5] * 500)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        captioner.caption(pictures[1], PROMPT, 0)


def test_graphs_that_disagree_with_the_processor_are_refused(
    exported: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    shutil.copyfile(copy / "onnx/embed_tokens.onnx", copy / "onnx/decoder_model_merged.onnx")
    with pytest.raises(InputRefused, match=r"decoder_model_merged.onnx has inputs"):
        OrtCaptioner(copy, threads=1)
    (copy / "onnx/decoder_model_merged.onnx").unlink()
    with pytest.raises(InputRefused, match="no such file"):
        OrtCaptioner(copy, threads=1)
    (copy / "onnx/decoder_model_merged.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputRefused, match="cannot load it"):
        OrtCaptioner(copy, threads=1)


def test_a_feature_count_that_differs_is_refused(
    exported: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["scale_factor"] = 1  # the processor then counts 16 tokens a tile, the graph gives 4
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "processor_config.json").unlink()
    with pytest.raises(InputRefused, match="the model and its processor settings disagree"):
        OrtCaptioner(copy, threads=1).caption(pictures[0], PROMPT, 3)


def test_importing_and_captioning_needs_no_torch(
    exported: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    pictures[0].save(tmp_path / "a.png")
    code = (
        "import sys; from pathlib import Path\n"
        "from exporter.runtimes.ort import OrtCaptioner; from exporter.runtimes.images import open_image\n"
        f"c = OrtCaptioner(Path({str(exported)!r}), threads=1)\n"
        f"assert c.caption(open_image(Path({str(tmp_path / 'a.png')!r})), 'Hi', 3).prompt_tokens > 0\n"
        "heavy = {'torch', 'transformers', 'onnx', 'peft', 'safetensors'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("scheme", ["int8", "int4-rtn"])
def test_quantized_graphs_equal_the_dequantized_torch_model(
    tiny: Path, tmp_path: Path, pictures: list[Image.Image], scheme: str
) -> None:
    from exporter.core.progress import silent
    from exporter.graphs.export import export_model
    from exporter.quantizers.run import quantize_model
    from exporter.quantizers.schemes import find_scheme
    from exporter.runtimes.torch_reference import TorchCaptioner

    quantized, out = tmp_path / "quantized", tmp_path / "out"
    for folder in (quantized, out):
        folder.mkdir()
    quantize_model(tiny, quantized, find_scheme(scheme), threads=1, progress=silent)
    # Level 0 computes in float32, so that what is left is rounding.
    export_model(quantized, out, float_storage="float32", accuracy_level=0)
    reference = TorchCaptioner(quantized, threads=1)
    found = OrtCaptioner(out / "model", threads=1)
    for image in pictures[:2]:
        caption = reference.caption(image, PROMPT, 16)
        assert found.caption(image, PROMPT, 16).tokens == caption.tokens
        expected = reference.score(image, PROMPT, caption.tokens)
        np.testing.assert_allclose(found.score(image, PROMPT, caption.tokens), expected, atol=1e-4)
