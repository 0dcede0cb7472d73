"""TorchCaptioner against transformers' generate; strict loading; adapters beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter.core.blocks import BlockFormat
from exporter.core.errors import InputRefused
from exporter.core.tensors import Checkpoint, SafetensorsWriter
from exporter.runtimes.torch_reference import TorchCaptioner
from tests.support.tiny import write_tiny_model

PROMPT = "Describe this medical image."


def generate(model: Any, captioner: TorchCaptioner, image: Image.Image, count: int) -> list[int]:
    import torch

    inputs = captioner.preparer.prepare([image], PROMPT)
    out = model.generate(
        input_ids=torch.from_numpy(inputs.input_ids)[None],
        pixel_values=torch.from_numpy(inputs.pixel_values)[None],
        max_new_tokens=count,
        do_sample=False,
    )
    return [int(t) for t in out[0, len(inputs.input_ids) :]]


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.raw(name) for name in checkpoint.tensors}


def rewrite(folder: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    codes = {"float16": "F16", "float32": "F32", "uint8": "U8"}
    entries = {n: (codes[t.dtype.name], t.shape) for n, t in tensors.items()}
    with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@pytest.mark.parametrize(
    ("dtype", "tied"), [("float16", False), ("bfloat16", True), ("float32", False)]
)
def test_captions_equal_generate(
    tmp_path: Path, pictures: list[Image.Image], dtype: str, tied: bool
) -> None:
    import torch
    from transformers import Idefics3ForConditionalGeneration

    folder = write_tiny_model(tmp_path / "model", seed=3, dtype=dtype, tied=tied)
    captioner = TorchCaptioner(folder, threads=1)
    model = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for image in pictures:
        expected = generate(model, captioner, image, 16)
        caption = captioner.caption(image, PROMPT, 16)
        assert list(caption.tokens) == expected[: len(caption.tokens)]
        assert caption.stopped == (expected[-1] in captioner.preparer.generation.stop_ids)
        scores = captioner.score(image, PROMPT, caption.tokens)
        assert tuple(scores[:-1].argmax(-1)) == caption.tokens


def test_smolvlm_class_is_picked(tiny: Path, tmp_path: Path, pictures: list[Image.Image]) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"]}
    config["vision_config"]["model_type"] = "smolvlm_vision"
    (copy / "config.json").write_text(json.dumps(config))
    smol = TorchCaptioner(copy, threads=1)
    assert type(smol.model).__name__ == "SmolVLMForConditionalGeneration"
    expected = TorchCaptioner(tiny, threads=1).caption(pictures[0], PROMPT, 12)
    assert smol.caption(pictures[0], PROMPT, 12).tokens == expected.tokens


def test_tiles_of_zeros_are_kept(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    path = copy / "preprocessor_config.json"
    raw = json.loads(path.read_text()) | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    path.write_text(json.dumps(raw))
    half_black = Image.new("RGB", (64, 64))
    half_black.paste((200, 10, 90), (0, 0, 32, 64))
    captioner = TorchCaptioner(copy, threads=1)
    with pytest.raises(ValueError, match="do not match"):  # what transformers itself does
        generate(captioner.model, captioner, half_black, 4)
    assert captioner.caption(half_black, PROMPT, 4).prompt_tokens > 0


def test_quantized_folder_is_dequantized(
    tiny: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    from exporter.core.blocks import dequantize
    from exporter.quantizers.rtn import quantize_matrix

    tensors = weights(tiny)
    name = "model.text_model.layers.0.self_attn.q_proj.weight"
    packed = quantize_matrix(
        tensors[name].astype(np.float32), BlockFormat(4, 32, False), search=False
    )
    plain, quantized = (Path(shutil.copytree(tiny, tmp_path / n)) for n in ("plain", "quantized"))
    expected = dequantize(packed)
    rewrite(plain, {n: t.astype(np.float32) for n, t in tensors.items()} | {name: expected})
    del tensors[name]
    parts = {".qdata": packed.qdata, ".scales": packed.scales, ".zero_points": packed.zero_points}
    rewrite(quantized, tensors | {name + s: p for s, p in parts.items() if p is not None})
    layer = {"name": name, "kind": "linear", "bits": 4, "block": 32, "symmetric": False}
    layer |= {"rows": packed.rows, "columns": packed.columns}
    (quantized / "quantization.json").write_text(json.dumps({"schema": 1, "layers": [layer]}))

    loaded = TorchCaptioner(quantized, threads=1)
    assert np.array_equal(loaded.model.state_dict()[name].numpy(), expected)
    reference = TorchCaptioner(plain, threads=1).caption(pictures[0], PROMPT, 12)
    assert loaded.caption(pictures[0], PROMPT, 12).tokens == reference.tokens

    layer["block"] = 64
    (quantized / "quantization.json").write_text(json.dumps({"schema": 1, "layers": [layer]}))
    with pytest.raises(InputRefused, match=r"quantization.json says"):
        TorchCaptioner(quantized, threads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "1 tensors are missing .*layers.1.mlp.up_proj"),
        ("unexpected", "1 tensors are unexpected .*model.other"),
        ("shape", "1 tensors are mismatched .*lm_head"),
        ("head", "1 tensors are missing .*lm_head"),
    ],
)
def test_weights_are_loaded_strictly(tiny: Path, tmp_path: Path, change: str, message: str) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    tensors = weights(copy)
    if change == "missing":
        del tensors["model.text_model.layers.1.mlp.up_proj.weight"]
    elif change == "unexpected":
        tensors["model.other.weight"] = np.zeros((2, 2), np.float16)
    elif change == "shape":
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :32]
    else:
        del tensors["lm_head.weight"]
    rewrite(copy, {n: np.ascontiguousarray(t) for n, t in tensors.items()})
    with pytest.raises(InputRefused, match=message):
        TorchCaptioner(copy, threads=1)


def test_another_architecture_is_refused(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {
        "architectures": ["LlamaForCausalLM"]
    }
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match="architectures is"):
        TorchCaptioner(copy, threads=1)


def make_adapter(tiny: Path, out: Path, seed: int, targets: list[str]) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32)
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    lora.save_pretrained(out)
    return out


def test_adapters_act_unmerged_and_add_up(
    tiny: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    from safetensors.numpy import load_file

    adapters = [
        make_adapter(tiny, tmp_path / "first", 1, ["q_proj", "down_proj"]),
        make_adapter(tiny, tmp_path / "second", 2, ["q_proj", "v_proj"]),
    ]
    # The sum by hand: W + alpha / r * B A for each adapter.
    merged = {n: t.astype(np.float32) for n, t in weights(tiny).items()}
    for folder in adapters:
        lora = load_file(folder / "adapter_model.safetensors")
        for key in [k for k in lora if k.endswith("lora_A.weight")]:
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            merged[name] += 2.0 * lora[key.replace("lora_A", "lora_B")] @ lora[key]
    plain = Path(shutil.copytree(tiny, tmp_path / "merged"))
    rewrite(plain, merged)
    expected = TorchCaptioner(plain, threads=1).score(pictures[0], PROMPT, [4, 30])
    found = TorchCaptioner(tiny, adapters=adapters, threads=1).score(pictures[0], PROMPT, [4, 30])
    base = TorchCaptioner(tiny, threads=1).score(pictures[0], PROMPT, [4, 30])
    np.testing.assert_allclose(found, expected, atol=5e-5)
    assert np.abs(found - base).max() > 0.05


def test_adapters_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = make_adapter(tiny, tmp_path / "adapter", 1, ["q_proj"])
    path = folder / "adapter_model.safetensors"
    lora = load_file(path)
    key = next(k for k in lora if "layers.1" in k)
    save_file({k.replace("layers.1", "layers.7"): v for k, v in lora.items()}, path)
    with pytest.raises(InputRefused, match="does not fit"):
        TorchCaptioner(tiny, adapters=[folder], threads=1)
    save_file({k: v for k, v in lora.items() if k != key}, path)
    with pytest.raises(InputRefused, match="does not fit"):
        TorchCaptioner(tiny, adapters=[folder], threads=1)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(InputRefused, match=r"adapter_model.safetensors: no such file"):
        TorchCaptioner(tiny, adapters=[folder], threads=1)
