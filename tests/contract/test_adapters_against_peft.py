"""Merging gives what peft gives: the same weights, and the logits of the un-merged adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from exporter.adapters.merge import merge_adapters
from exporter.adapters.prove import prove_logits
from exporter.catalog.profiles import model_profiles
from exporter.core.data import data_root
from exporter.core.errors import InputRefused, ParityFailed
from exporter.core.tensors import Checkpoint
from exporter.families.checkpoints import layout_of
from tests.support.adapters import distance, inputs_for, load, logits, randomise, write_adapter
from tests.support.tiny import write_tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "dora-embedding": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "vision_model.*fc1": 3},
        "alpha_pattern": {"gate_proj": 3, "^model.text_model.*k_proj": 16},
    },
    "regex": {"target_modules": r".*text_model.*\.(q|v)_proj", "use_rslora": True},
    "layers": {
        "layers_to_transform": [1],
        "exclude_modules": ["vision_model.encoder.layers.1.mlp"],
    },
    "save-head": {"modules_to_save": ["lm_head"]},
    "save-embedding": {"modules_to_save": ["embed_tokens"]},
    "save-both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "save-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "save-connector": {"modules_to_save": ["connector"]},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "lora-bias": {"target_modules": r".*vision_model.*q_proj", "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding-tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "head": {"target_modules": ["lm_head", "down_proj"]},
    "convolution": {"target_modules": ["patch_embedding"]},
    "convolution-dora": {"target_modules": ["patch_embedding"], "use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
}
UNTIES = {"dora-embedding", "save-head", "save-embedding", "save-both", "embedding", "head"}
# A head of its own only where head or embedding are touched: elsewhere the tie plays no part.
CASES = [(n, True) for n in VARIANTS] + [
    (n, False) for n in ("plain", "save-tied", *sorted(UNTIES))
]
EMBEDDING, HEAD = "model.text_model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A base with its own head and one with a tied head, float32."""
    root = tmp_path_factory.mktemp("bases")
    return {
        tied: write_tiny_model(root / str(tied), tied=tied, dtype="float32")
        for tied in (False, True)
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    return folder


def half_steps(ours: np.ndarray, exact: np.ndarray) -> float:
    """Largest distance in halves of the float16 step at each exact value."""
    step = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float32)
    slack = 2.0**-20 * float(np.abs(exact).max())
    return float((np.maximum(np.abs(ours.astype(np.float32) - exact) - slack, 0) / step).max() * 2)


def unmerged(base: Path, *adapters: Path) -> Any:
    """Peft's own model with all adapters active."""
    from peft import PeftModel

    names = [str(i) for i in range(len(adapters))]
    model = PeftModel.from_pretrained(load(base), str(adapters[0]), adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    model.base_model.set_adapter(names)
    return model.eval()


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_equals_peft(
    name: str, tied: bool, bases: dict[bool, Path], tmp_path: Path, out: Path
) -> None:
    base = bases[tied]
    adapter = write_adapter(base, tmp_path / "adapter", **VARIANTS[name])
    proof = merge_adapters(base, [adapter], out)
    merged, inputs = load(out), inputs_for(base)
    model = unmerged(base, adapter)
    expected, plain = logits(model, inputs), logits(load(base), inputs)
    ours = logits(merged, inputs)
    # Untouched by our code: what float16 storage alone does to these logits.
    assert distance(ours, expected) < 3e-3
    assert distance(ours, expected) < 0.2 * distance(ours, plain)
    assert proof.head == ("own" if not tied else "untied" if name in UNTIES else "tied")

    exact = {
        key.removeprefix("base_model.model."): value.numpy()
        for key, value in model.merge_and_unload().state_dict().items()
    }
    stored = load_file(out / "model.safetensors")
    apart = {EMBEDDING, HEAD} if tied else set()
    for key, value in stored.items():
        assert value.dtype == np.float16
        if key not in apart:
            assert half_steps(value, exact[key]) <= 1.001, key
    assert {r.tensor for r in proof.targets} <= stored.keys()
    assert all(r.relative_delta > 0 and r.changed_values > 0 for r in proof.targets)


@pytest.mark.parametrize("name", ["patterns", "dora-embedding", "save-both", "embedding-tied"])
def test_prove_agrees_with_itself_layer_by_layer(
    name: str, bases: dict[bool, Path], tmp_path: Path, out: Path
) -> None:
    base = bases[True]
    adapter = write_adapter(base, tmp_path / "adapter", **VARIANTS[name])
    merge_adapters(base, [adapter], out)
    whole = prove_logits(base, [adapter], out)
    assert whole.method == "logits"
    assert whole.logit_error is not None
    assert whole.tolerance is not None
    assert whole.logit_error <= whole.tolerance < 0.02
    assert whole.image_tiles == 2
    assert whole.base_difference is not None
    assert whole.base_difference > whole.tolerance
    layers = prove_logits(base, [adapter], out, limit_bytes=0)
    assert layers.method == "weights"
    assert layers.logit_error is None
    assert "logits not computed" in layers.statement
    assert max(whole.weight_steps, layers.weight_steps) <= 0.51


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["all-linear", "dora", "save-head", "embedding"])
def test_an_untrained_adapter_is_refused(
    name: str, tied: bool, bases: dict[bool, Path], tmp_path: Path, out: Path
) -> None:
    adapter = write_adapter(bases[tied], tmp_path / "a", trained=False, **VARIANTS[name])
    with pytest.raises(InputRefused, match="changes nothing"):
        merge_adapters(bases[tied], [adapter], out)


def test_two_lora_adapters_add_up(bases: dict[bool, Path], tmp_path: Path, out: Path) -> None:
    base = bases[False]
    first = write_adapter(base, tmp_path / "1", seed=1, target_modules="all-linear")
    second = write_adapter(base, tmp_path / "2", seed=2, use_rslora=True, r=3)
    proof = merge_adapters(base, [first, second], out)
    assert {r.adapter for r in proof.targets} == {0, 1}
    inputs = inputs_for(base)
    ours = logits(load(out), inputs)
    model = unmerged(base, first, second)
    assert distance(ours, logits(model, inputs)) < 3e-3
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    merge_adapters(base, [second, first], swapped)
    a, b = load_file(out / "model.safetensors"), load_file(swapped / "model.safetensors")
    assert all(np.allclose(a[k].astype("f4"), b[k].astype("f4"), rtol=2e-3, atol=1e-6) for k in a)
    assert prove_logits(base, [first, second], out).method == "logits"


def test_two_lora_adapters_equal_a_weighted_one(
    bases: dict[bool, Path], tmp_path: Path, out: Path
) -> None:
    base = bases[False]
    pair = [write_adapter(base, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    merge_adapters(base, pair, out)
    model = unmerged(base, *pair)
    model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    inputs = inputs_for(base)
    assert distance(logits(load(out), inputs), logits(model, inputs)) < 3e-3


def test_dora_adapters_apply_in_sequence(
    bases: dict[bool, Path], tmp_path: Path, out: Path
) -> None:
    from peft import PeftModel

    base = bases[False]
    first = write_adapter(base, tmp_path / "1", seed=1, use_dora=True)
    middle = tmp_path / "middle"
    between = PeftModel.from_pretrained(load(base), str(first)).merge_and_unload()
    between.save_pretrained(middle)
    second = write_adapter(middle, tmp_path / "2", seed=2, use_dora=True, bias="lora_only")
    merge_adapters(base, [first, second], out)
    inputs = inputs_for(base)
    assert distance(logits(load(out), inputs), logits(unmerged(middle, second), inputs)) < 3e-3
    assert prove_logits(base, [first, second], out).weight_steps <= 0.51
    assert prove_logits(base, [first, second], out, limit_bytes=0).weight_steps <= 0.51


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_and_shards(dtype: str, tmp_path: Path, out: Path) -> None:
    base = write_tiny_model(tmp_path / "base", dtype=dtype)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    merge_adapters(base, [adapter], out)
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded)
    (sharded / "model.safetensors").unlink()
    load_dtype = getattr(torch, dtype)
    load(base).to(load_dtype).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    again = tmp_path / "again"
    again.mkdir()
    merge_adapters(sharded, [adapter], again)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    proof = prove_logits(base, [adapter], out)
    assert proof.logit_error is not None
    assert proof.logit_error < 3e-3
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float16"


def test_without_adapter_it_is_a_float16_copy(bases: dict[bool, Path], out: Path) -> None:
    proof = merge_adapters(bases[True], [], out)
    theirs, ours = (load_file(f / "model.safetensors") for f in (bases[True], out))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[k], theirs[k].astype(np.float16)) for k in ours)
    assert proof.statement.startswith("no adapter")
    assert proof.adapters == ()
    assert (out / "tokenizer.json").read_bytes() == (bases[True] / "tokenizer.json").read_bytes()


def test_merging_twice_gives_the_same_bytes(
    bases: dict[bool, Path], tmp_path: Path, out: Path
) -> None:
    adapter = write_adapter(bases[True], tmp_path / "a", modules_to_save=["lm_head"])
    again = tmp_path / "again"
    again.mkdir()
    merge_adapters(bases[True], [adapter], out)
    merge_adapters(bases[True], [adapter], again)
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_a_wrong_merge_fails_the_proof(bases: dict[bool, Path], tmp_path: Path, out: Path) -> None:
    base = bases[False]
    adapter = write_adapter(base, tmp_path / "adapter")
    merge_adapters(base, [adapter], out)
    right = load_file(out / "model.safetensors")
    name = "model.text_model.layers.0.self_attn.q_proj.weight"
    start = Checkpoint.open(base).float32(name)
    # The delta scaled by 1.05, as a wrong lora_alpha would; then an untouched tensor changed.
    wrong = start + 1.05 * (right[name].astype(np.float32) - start)
    other = "model.text_model.norm.weight"
    for change in ({name: wrong.astype(np.float16)}, {other: right[other] * np.float16(1.01)}):
        save_file({**right, **change}, out / "model.safetensors", {"format": "pt"})
        for limit in (0, 1 << 30):
            with pytest.raises(ParityFailed, match="steps from peft's merge"):
                prove_logits(base, [adapter], out, limit_bytes=limit)


def test_right_weights_in_another_network_fail_the_proof(
    bases: dict[bool, Path], tmp_path: Path, out: Path
) -> None:
    adapter = write_adapter(bases[False], tmp_path / "adapter")
    merge_adapters(bases[False], [adapter], out)
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ParityFailed, match="merged logits differ"):
        prove_logits(bases[False], [adapter], out)


def test_the_base_itself_fails_the_proof(
    bases: dict[bool, Path], tmp_path: Path, out: Path
) -> None:
    adapter = write_adapter(bases[False], tmp_path / "adapter")
    merge_adapters(bases[False], [], out)
    with pytest.raises(ParityFailed):
        prove_logits(bases[False], [adapter], out)


BUILT_IN = [
    (profile.builtin.model, adapter)
    for profile in model_profiles().values()
    if profile.builtin
    for adapter in profile.builtin.adapters.values()
]


@pytest.mark.parametrize(("model", "adapter"), BUILT_IN)
def test_shipped_adapters_merge_and_are_proven(model: str, adapter: str, out: Path) -> None:
    base, lora = data_root("profiles") / model, data_root("profiles") / adapter
    proof = merge_adapters(base, [lora], out)
    assert min(r.relative_delta for r in proof.targets) > 1e-4
    found = prove_logits(base, [lora], out)
    assert found.method == "logits"
    assert found.image_tiles == 2
    assert found.base_difference is not None
    assert found.tolerance is not None
    assert found.base_difference > found.tolerance


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_old_layouts_of_adapter_and_checkpoint(model_type: str, tmp_path: Path) -> None:
    """A real tiny model of the family; checkpoint and adapter in the layouts of three versions."""
    base = FAMILIES[model_type](tmp_path / "base")
    # Whatever layout the installed transformers saves.
    newest = layout_of(json.loads((base / "config.json").read_text())).canonical
    rename(base / "model.safetensors", newest, "")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    bases, adapters = {"newest": base}, {"newest": adapter}
    for version, rules in {"4.51": OLD[model_type], "4.57": MIDDLE[model_type]}.items():
        bases[version] = shutil.copytree(base, tmp_path / f"base-{version}")
        rename(bases[version] / "model.safetensors", partial(apply, rules), "")
        adapters[version] = shutil.copytree(adapter, tmp_path / f"adapter-{version}")
        weights = adapters[version] / "adapter_model.safetensors"
        rename(weights, partial(apply, rules), "base_model.model.")
    pairs = (
        *(("newest", "newest"), ("4.51", "newest"), ("newest", "4.51")),
        *(("4.51", "4.51"), ("4.57", "4.57")),
    )
    results = []
    for number, (stored_as, trained_as) in enumerate(pairs):
        out = tmp_path / f"out{number}"
        out.mkdir()
        folder, lora = bases[stored_as], adapters[trained_as]
        merge_adapters(folder, [lora], out)
        stored = Checkpoint.open(out)
        results.append({n: stored.raw(n) for n in stored.tensors})
        proof = prove_logits(folder, [lora], out)
        assert proof.logit_error is not None
        assert proof.tolerance is not None
        assert proof.logit_error <= proof.tolerance
        assert proof.image_tiles > 0
    first = results[0]
    assert first.keys() == Checkpoint.open(base).tensors.keys()
    for found in results:
        assert found.keys() == first.keys()
        assert all(np.array_equal(found[n], first[n]) for n in first)


# Newest prefix to that of transformers 4.51, longest first.
OLD = {
    "llava": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "qwen2_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
}
# The same for transformers 4.52 to 4.57.
MIDDLE = {
    "llava": (("model.vision_tower.", "model.vision_tower.vision_model."),),
    "qwen2_vl": (),
}


def apply(rules: tuple[tuple[str, str], ...], name: str) -> str:
    for new, old in rules:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def rename(path: Path, change: Callable[[str], str], prefix: str) -> None:
    tensors = load_file(path)
    save_file(
        {prefix + change(k.removeprefix(prefix)): v for k, v in tensors.items()},
        path,
        {"format": "pt"},
    )


def tiny_llava(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Model

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(**TEXT),
        image_token_index=99,
        tie_word_embeddings=False,
    )
    return save_random(Model(config), folder)


def tiny_qwen(folder: Path) -> Path:
    from transformers import Qwen2VLConfig
    from transformers import Qwen2VLForConditionalGeneration as Model

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 2,
            "hidden_size": 64,
            "patch_size": 8,
            "mlp_ratio": 2,
        },
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=99,
        video_token_id=98,
        vision_start_token_id=97,
        vision_end_token_id=96,
        tie_word_embeddings=False,
    )
    return save_random(Model(config), folder)


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
}
FAMILIES = {"llava": tiny_llava, "qwen2_vl": tiny_qwen}


def save_random(model: Any, folder: Path) -> Path:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    torch.manual_seed(0)
    randomise(model, 0)
    model.save_pretrained(folder)
    return folder
