"""The path with buffers on a device, run with OrtValues on the CPU, and torch in another place."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from exporter.adapters.merge import merge_adapters
from exporter.core.errors import EnvironmentLacks, InputRefused
from exporter.graphs.export import export_model
from exporter.graphs.half import halve_export
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes.ort import OrtCaptioner, OrtEngine
from exporter.runtimes.ort_memory import DeviceMemory, Setup
from exporter.runtimes.ort_session import open_session
from exporter.runtimes.torch_device import Place
from exporter.runtimes.torch_reference import TorchCaptioner
from tests.support.family_cases import CASES

NAMES = ("idefics3", "llava", "qwen2_vl", "vit-gpt2", "blip2-opt")
SHAPES = ((60, 45), (20, 30), (33, 90))


@dataclass
class Built:
    merged: Path
    float32: Path
    float16: Path
    prompt: str


@pytest.fixture(scope="module", params=NAMES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    (case,) = (c for c in CASES if c.name == request.param)
    root = tmp_path_factory.mktemp(case.name)
    for name in ("merged", "float32"):
        (root / name).mkdir()
    merge_adapters(case.write(root / "published"), [], root / "merged")
    export_model(root / "merged", root / "float32")
    shutil.copytree(root / "float32", root / "float16")
    halve_export(root / "float16")
    prompt = "" if case.name == "vit-gpt2" else "Describe the image."
    return Built(root / "merged", root / "float32/model", root / "float16/model", prompt)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.default_rng(3)
    small = random.integers(0, 256, (5, 7, 3), np.uint8)
    return [Image.fromarray(small).resize(size, Image.Resampling.BICUBIC) for size in SHAPES]


def on_device(model: Path) -> OrtCaptioner:
    """A captioner whose keys, values and next embeddings are OrtValues."""
    captioner = OrtCaptioner(model, threads=1)
    setup = Setup(open_session, DeviceMemory("cpu", 0))
    captioner.engine = OrtEngine(model / "onnx", captioner.preparer, 1, setup)
    return captioner


@pytest.mark.parametrize("arithmetic", ["float32", "float16"])
def test_bound_device_buffers_give_the_same_tokens(
    built: Built, images: list[Image.Image], arithmetic: str
) -> None:
    """Longer and shorter texts in turn, so that buffers of finished texts are used again."""
    model: Path = getattr(built, arithmetic)
    plain, bound = OrtCaptioner(model, threads=1), on_device(model)
    lengths = []
    for image, length in zip([*images, *images[::-1]], (16, 6, 12, 12, 20, 3), strict=True):
        expected = plain.caption(image, built.prompt, length)
        found = bound.caption(image, built.prompt, length)
        assert found.tokens == expected.tokens
        lengths.append(len(found.tokens))
        forced = plain.score(image, built.prompt, expected.tokens)
        assert np.array_equal(bound.score(image, built.prompt, expected.tokens), forced)
    assert max(lengths) >= 12


def test_keys_and_values_never_leave_their_buffers(built: Built, images: list[Image.Image]) -> None:
    bound = on_device(built.float16)
    bound.caption(images[0], built.prompt, 8)
    run = bound.engine._run
    assert run is not None
    assert all(isinstance(b, ort.OrtValue) for b in run.buffers.values())
    assert {b.data_type() for b in run.buffers.values()} == {"tensor(float16)"}
    names = [*(bound.engine.decoder.present(n) for n in run.buffers), "logits"]
    outputs = dict(zip(names, run._binding.get_outputs(), strict=True))
    addresses = {n: b.data_ptr() for n, b in run.buffers.items()}
    assert len(set(addresses.values())) == len(addresses), "each has memory of its own"
    for name, address in addresses.items():
        assert outputs[bound.engine.decoder.present(name)].data_ptr() == address
    assert isinstance(run._embeds, ort.OrtValue), "the last token's embedding was not copied"
    del run, outputs  # the next text begins when nobody holds this one
    # A shorter text takes the same buffers; a longer one gets its own, and the old ones are freed.
    bound.caption(images[0], built.prompt, 2)
    assert bound.engine._run is not None
    assert {n: b.data_ptr() for n, b in bound.engine._run.buffers.items()} == addresses
    before = next(iter(bound.engine._run.buffers.values())).shape()[2]
    bound.caption(images[0], built.prompt, 40)
    assert next(iter(bound.engine._run.buffers.values())).shape()[2] > before


def test_a_text_that_is_still_written_keeps_its_buffers(exported: Path) -> None:
    decoder = on_device(exported).engine.decoder
    embeds = np.random.default_rng(0).standard_normal((4, _hidden(decoder.session)))
    first = decoder.start(6, 1)
    first.feed(embeds.astype(np.float32))
    kept = {n: b.numpy().copy() for n, b in first.buffers.items()}
    second = decoder.start(6, 1)
    second.feed(-embeds.astype(np.float32))
    assert all(np.array_equal(first.buffers[n].numpy(), kept[n]) for n in kept)
    addresses = {b.data_ptr() for b in first.buffers.values()}
    assert not addresses & {b.data_ptr() for b in second.buffers.values()}
    del first
    gc.collect()
    third = decoder.start(6, 1)
    assert {b.data_ptr() for b in third.buffers.values()} == addresses


def _hidden(session: ort.InferenceSession) -> int:
    return next(int(i.shape[2]) for i in session.get_inputs() if i.name == "inputs_embeds")


@pytest.fixture(params=["int8", "int4-rtn", "bnb-nf4"])
def packed(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    for name in ("quantized", "out"):
        (tmp_path / name).mkdir()
    quantize_model(tiny, tmp_path / "quantized", find_scheme(request.param), threads=1)
    export_model(tmp_path / "quantized", tmp_path / "out", accuracy_level=0)
    return tmp_path


def test_packed_weights_compute_in_float16(packed: Path, images: list[Image.Image]) -> None:
    shutil.copytree(packed / "out", packed / "half")
    halve_export(packed / "half")
    reference = TorchCaptioner(packed / "quantized", threads=1)
    bound = on_device(packed / "half" / "model")
    for image in images[:2]:
        tokens = reference.caption(image, "Describe.", 10).tokens
        expected = reference.score(image, "Describe.", tokens)
        found = bound.score(image, "Describe.", tokens)
        assert float(np.abs(found - expected).max() / np.abs(expected).max()) < 0.01


def test_torch_in_float16_is_near_torch_in_float32(built: Built, images: list[Image.Image]) -> None:
    import torch

    reference = TorchCaptioner(built.merged, threads=1)
    half = TorchCaptioner(built.merged, threads=1, place=Place("cpu", "float16"))
    # transformers keeps BLIP-2's Q-Former in float32, in whatever type the rest is asked for.
    kinds = {p.dtype for n, p in half.model.named_parameters() if not n.startswith("q")}
    assert kinds == {torch.float16}
    # Frequencies of rotary positions are buffers, and stay what they were.
    buffers = [b for n, b in half.model.named_buffers() if n.endswith("inv_freq")]
    assert all(b.dtype == torch.float32 for b in buffers)
    for image in images[:2]:
        tokens = reference.caption(image, built.prompt, 10).tokens
        expected = reference.score(image, built.prompt, tokens)
        found = half.score(image, built.prompt, tokens)
        assert found.dtype == np.float32
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        assert 0 < error < 0.01, "float16 rounds, and no more than that"
        assert half.caption(image, built.prompt, 4).tokens


def test_a_torch_without_a_gpu_says_what_it_needs(tiny: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this torch has a GPU")
    with pytest.raises(EnvironmentLacks, match="needs an NVIDIA driver"):
        TorchCaptioner(tiny, threads=1, place=Place("cuda", "float16"))
    with pytest.raises(InputRefused, match="expected one of cpu, cuda"):
        Place("tpu")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_torch_on_the_gpu_is_near_torch_on_the_cpu(built: Built, images: list[Image.Image]) -> None:
    reference = TorchCaptioner(built.merged, threads=1)
    moved = TorchCaptioner(built.merged, threads=1, place=Place("cuda", "float16"))
    for image in images[:2]:
        tokens = reference.caption(image, built.prompt, 10).tokens
        expected = reference.score(image, built.prompt, tokens)
        found = moved.score(image, built.prompt, tokens)
        assert float(np.abs(found - expected).max() / np.abs(expected).max()) < 0.01


def test_a_cache_that_grows_by_concatenation_stays_on_the_device(
    tiny: Path, tmp_path: Path, images: list[Image.Image]
) -> None:
    """Graphs of standard operators: present is a new buffer for each token."""
    export_model(tiny, tmp_path, dialect="standard")
    plain, bound = OrtCaptioner(tmp_path / "model", threads=1), on_device(tmp_path / "model")
    assert bound.engine.decoder.concatenates
    for image in images[:2]:
        expected = plain.caption(image, "Describe.", 10)
        assert bound.caption(image, "Describe.", 10).tokens == expected.tokens
        run = bound.engine._run
        assert run is not None
        length = {b.shape()[2] for b in run.buffers.values()}
        assert length == {expected.prompt_tokens + len(expected.tokens) - (not expected.stopped)}
