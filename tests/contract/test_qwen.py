"""What is particular to Qwen2-VL and Qwen2.5-VL, beside the contract of all families.

The reference is transformers' own class in float32 on tiny random models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from exporter.adapters.merge import merge_adapters
from exporter.adapters.prove import prove_logits
from exporter.calibrate.blocks.llama import Rotary, rms_norm, run_block
from exporter.calibrate.prompts import EmbeddedPrompt, embed_prompts
from exporter.calibrate.walk import load_block, walk_decoder
from exporter.core.activations import InputStatistics
from exporter.core.cases import Case
from exporter.core.tensors import Checkpoint
from exporter.families.captioners.qwen_vl import decoder_spec, library_features, tower_spec
from exporter.graphs.export import export_model
from exporter.pipeline.budget import Budget
from exporter.pipeline.forecast import forecast
from exporter.pipeline.plan import make_plan
from exporter.quantizers.block import fold_block
from exporter.quantizers.plan import plan_layers
from exporter.quantizers.schemes import find_scheme
from exporter.quantizers.sequential import BlockQuantizer, BlockStore, assemble
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import load_model
from tests.contract.test_families import noise, relative
from tests.support.adapters import distance, load, logits, write_adapter
from tests.support.family_cases import ALL
from tests.support.tiny_qwen import write_tiny_qwen

torch.set_num_threads(1)
KINDS = ("qwen2_vl", "qwen2_5_vl")
PROMPT, CAPTION = "Describe this medical image.", "Axial CT, a 19 mm lesion."
# Nats per token allowed on these random weights: 0.035 to 0.037 and 0.071 to 0.091 were measured.
KL = {"int4-gptq": 0.06, "int4-awq": 0.14}


class Built:
    """One model: published, merged, exported in float32, and torch's own."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.kind = root, kind
        self.base = write_tiny_qwen(root / "base", kind)
        self.merged, exported = root / "merged", root / "exported"
        self.merged.mkdir()
        exported.mkdir()
        merge_adapters(self.base, [], self.merged)
        export_model(self.merged, exported, float_storage="float32")
        self.exported = exported / "model"
        self.captioner = OrtCaptioner(self.exported, threads=1)
        self.config = json.loads((self.merged / "config.json").read_text())
        self.model = load_model(self.merged, self.config)
        self.spec = decoder_spec(self.config)
        self.checkpoint = Checkpoint.open(self.merged)

    def prompts(self, folder: Path) -> list[EmbeddedPrompt]:
        """Three images of other shapes, with captions."""
        cases = []
        for i, size in enumerate(((64, 64), (97, 31), (40, 90))):
            path = folder / f"{i}.png"
            noise(*size).save(path)
            cases.append(Case(str(i), path, f"p{i}", "ct", CAPTION))
        return embed_prompts(self.merged, self.exported, cases, PROMPT, threads=1)


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    kind: str = request.param
    return Built(tmp_path_factory.mktemp(kind), kind)


@pytest.mark.parametrize("size", [(64, 64), (8, 8), (24, 88), (97, 31), (9, 96), (90, 90)])
def test_features_equal_transformers_to_float32(built: Built, size: tuple[int, int]) -> None:
    """Windows that are full, cut at one edge, at both, and a single one."""
    preparer, engine = built.captioner.preparer, built.captioner.engine
    inputs = preparer.prepare([noise(*size), noise(48, 24)], PROMPT)
    with torch.inference_mode():
        expected = library_features(built.model, inputs).numpy()
    assert relative(engine.features(inputs), expected) < 1e-5


def test_windows_matter(built: Built) -> None:
    """With windows of another size the features are others: the test above would see it."""
    vision = built.config["vision_config"]
    if "window_size" not in vision:
        assert not tower_spec(built.config).window
        return
    inputs = built.captioner.preparer.prepare([noise(97, 31)], PROMPT)
    wider = {**built.config, "vision_config": {**vision, "window_size": 64}}
    with torch.inference_mode():
        expected = library_features(load_model(built.merged, wider), inputs).numpy()
    assert relative(built.captioner.engine.features(inputs), expected) > 1e-2


def torch_logits(built: Built, prompt: EmbeddedPrompt) -> np.ndarray:
    """Logits where the caption and its end are predicted, by transformers."""
    with torch.inference_mode():
        hidden = built.model.model.language_model(
            inputs_embeds=torch.from_numpy(prompt.embeds)[None],
            position_ids=torch.from_numpy(prompt.positions)[:, None],
        ).last_hidden_state[0]
        found: np.ndarray = built.model.lm_head(hidden[prompt.predicting]).numpy()
    return found


def test_calibration_computes_what_the_model_computes(built: Built, tmp_path: Path) -> None:
    prompts, spec = built.prompts(tmp_path), built.spec
    rotary = Rotary(spec, [p.length for p in prompts], [p.positions for p in prompts])
    for number, prompt in enumerate(prompts):
        hidden = torch.from_numpy(prompt.embeds)
        for layer in range(spec.layers):
            weights = load_block(built.checkpoint, spec, layer)
            hidden = run_block(spec, weights, hidden, rotary.tables(number))
        norm = torch.from_numpy(built.checkpoint.float32(spec.final_norm))
        head = torch.from_numpy(built.checkpoint.float32(spec.embedding))
        ours = rms_norm(hidden[prompt.predicting], norm, spec.norm_eps) @ head.T
        assert relative(ours.numpy(), torch_logits(built, prompt)) < 1e-5


@pytest.mark.parametrize("scheme", list(KL))
def test_calibrated_schemes_stay_near(built: Built, scheme: str, tmp_path: Path) -> None:
    prompts, spec, chosen = built.prompts(tmp_path), built.spec, find_scheme(scheme)
    store = BlockStore(tmp_path / "blocks", scheme)
    plans = plan_layers(built.checkpoint, spec, tower_spec(built.config), chosen)
    quantizer = BlockQuantizer(store, spec, plans)
    walk_decoder(built.checkpoint, spec, prompts, quantizer, threads=1)
    quantized, exported = tmp_path / "quantized", tmp_path / "exported"
    quantized.mkdir()
    exported.mkdir()
    assemble(built.merged, quantized, chosen, spec, store, threads=1)
    export_model(quantized, exported)
    decoder = OrtCaptioner(exported / "model", threads=1).engine
    divergences = []
    for size, prompt in zip(((64, 64), (97, 31), (40, 90)), prompts, strict=True):
        inputs = built.captioner.preparer.prepare([noise(*size)], PROMPT)
        answer = prompt.tokens[prompt.answer].tolist()
        rows = decoder.forced(inputs, decoder.features(inputs), answer)
        p, q = (
            torch.from_numpy(x.copy()).double().log_softmax(-1)
            for x in (torch_logits(built, prompt), rows)
        )
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert 0 < np.mean(divergences) < KL[scheme]


def test_folded_scales_leave_the_block_as_it_was(built: Built, tmp_path: Path) -> None:
    """AWQ's scale of the values divides their bias too."""
    prompt, spec = built.prompts(tmp_path)[0], built.spec
    plans = plan_layers(built.checkpoint, spec, tower_spec(built.config), find_scheme("int4-awq"))
    prefix = f"{spec.prefix}layers.0."
    block = [p for p in plans if p.name.startswith(prefix)]
    weights = {p.name: built.checkpoint.float32(p.name) for p in block}
    random = np.random.default_rng(0)
    inputs = {p.name: statistics(random, p.columns) for p in block if p.format}
    folded = fold_block(0, spec, block, weights, inputs).weights
    bias = prefix + "self_attn.v_proj.bias"
    assert not np.array_equal(folded[bias], weights[bias])
    rotary = Rotary(spec, [prompt.length], [prompt.positions]).tables(0)
    ours, theirs = (
        run_block(
            spec,
            {n.removeprefix(prefix): torch.from_numpy(np.array(w)) for n, w in ws.items()},
            torch.from_numpy(prompt.embeds),
            rotary,
        ).numpy()
        for ws in (folded, weights)
    )
    assert relative(ours, theirs) < 1e-5


def statistics(random: np.random.Generator, width: int) -> InputStatistics:
    """Inputs whose channels differ in size, so that scales are worth folding."""
    rows = random.standard_normal((64, width)) * np.exp(2 * random.standard_normal(width))
    rows = rows.astype(np.float32)
    return InputStatistics((rows.T @ rows) / len(rows), np.abs(rows).mean(0), rows, len(rows))


def test_old_and_new_adapter_keys_give_the_same_model(built: Built, tmp_path: Path) -> None:
    """Adapters of transformers up to 4.51 have names that peft now loads nothing of."""
    new = write_adapter(built.base, tmp_path / "new", target_modules=list(ALL), lora_alpha=4)
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_bytes((new / "adapter_config.json").read_bytes())
    tensors = load_file(new / "adapter_model.safetensors")
    renamed = {old_key(name): values for name, values in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, old / "adapter_model.safetensors")
    merged = {}
    for name, adapter in (("new", new), ("old", old)):
        merged[name] = tmp_path / f"merged-{name}"
        merged[name].mkdir()
        proof = merge_adapters(built.base, [adapter], merged[name])
        # The gated MLP of Qwen2.5-VL's vision part has the decoder's names.
        parts = 7 * 2 + (3 * 3 if built.kind == "qwen2_5_vl" else 0)
        assert len(proof.targets) == parts
    weights = [(folder / "model.safetensors").read_bytes() for folder in merged.values()]
    assert weights[0] == weights[1]
    found = prove_logits(built.base, [old], merged["old"])
    assert found.method == "logits"
    assert found.base_difference is not None
    assert found.tolerance is not None
    assert found.base_difference > 10 * found.tolerance


def old_key(key: str) -> str:
    """An adapter's key as transformers 4.51 named the modules."""
    key = key.replace("base_model.model.model.language_model.", "base_model.model.model.")
    return key.replace("base_model.model.model.visual.", "base_model.model.visual.")


def test_a_folder_of_transformers_5_gives_the_same_model(built: Built, tmp_path: Path) -> None:
    """New names and config.json with a text_config, against the published flat one."""
    base = write_tiny_qwen(tmp_path / "new", built.kind, old=False)
    merged, exported = tmp_path / "merged", tmp_path / "exported"
    merged.mkdir()
    exported.mkdir()
    merge_adapters(base, [], merged)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (merged, built.merged)]
    assert weights[0] == weights[1]
    export_model(merged, exported, float_storage="float32")
    image = noise(64, 40)
    ours = OrtCaptioner(exported / "model", threads=1).caption(image, PROMPT, 8)
    assert ours.tokens == built.captioner.caption(image, PROMPT, 8).tokens


def test_a_plan_reads_the_published_names(built: Built) -> None:
    planned = make_plan(
        model=str(built.base),
        scheme="int4-rtn",
        target="cpu-avx2",
        weights=None,
        adapters=(),
        offline=True,
    )
    parts = built.checkpoint, built.spec, tower_spec(built.config)
    assert planned.layers == plan_layers(*parts, find_scheme("int4-rtn"))
    mixed = forecast(built.base, find_scheme("mixed"), Budget())
    assert mixed == forecast(built.merged, find_scheme("mixed"), Budget())


def test_transformers_reads_the_published_folder_alike(built: Built) -> None:
    """The tiny folder in the old layout is what it claims to be."""
    whole: dict[str, Any] = {"input_ids": torch.arange(5, 40)[None]}
    assert distance(logits(load(built.base), whole), logits(built.model, whole)) < 1e-6
