"""What every family promises, on a tiny random model of each in its published layout.

The reference is transformers' own class, loaded with the merged float16 weights in float32: its
`generate`, its `forward` and its image features. A family is a row of `tests.support.family_cases`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from exporter.adapters.merge import merge_adapters
from exporter.adapters.prove import prove_logits
from exporter.families.base import PromptInputs
from exporter.families.checkpoints import layout_of
from exporter.families.table import family_of
from exporter.graphs.check import check_graphs
from exporter.graphs.export import export_model
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme
from exporter.runtimes.base import feature_rows
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import load_model
from tests.support.adapters import write_adapter
from tests.support.family_cases import CASES, FamilyCase, Renames

torch.set_num_threads(1)
PROMPT, LENGTH, TOLERANCE = "Describe this medical image.", 24, 1e-4
ALL_LINEAR, RANK = ("all-linear",), 4
WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
RAGGED = [(64, 64), (97, 31), (40, 90), (13, 77)]


@dataclass
class Built:
    """One family's model on disk: published, merged, exported in float32, and torch's own."""

    case: FamilyCase
    root: Path
    base: Path
    merged: Path
    model: Any
    captioners: dict[str, OrtCaptioner] = field(default_factory=dict)

    @cached_property
    def adapter(self) -> Path:
        """A LoRA adapter of the row's recipe, saved by peft."""
        recipe = self.case.recipe
        assert recipe.scaling is not None
        return write_adapter(
            self.base if self.case.torch_base else self.merged,
            self.root / "adapter",
            r=RANK,
            lora_alpha=round(recipe.scaling * RANK),
            target_modules="all-linear" if recipe.targets == ALL_LINEAR else list(recipe.targets),
        )

    def captioner(self, scheme: str) -> OrtCaptioner:
        """The exported model of a scheme; "float32" is not quantized."""
        if scheme not in self.captioners:
            source, out = self.merged, self.root / scheme
            out.mkdir()
            if scheme != "float32":
                source = self.root / f"{scheme}-quantized"
                source.mkdir()
                quantize_model(self.merged, source, find_scheme(scheme), threads=1)
            export_model(source, out, float_storage="float32")
            self.captioners[scheme] = OrtCaptioner(out / "model", threads=1)
        return self.captioners[scheme]

    def prepare(self, sizes: Sequence[tuple[int, int]], prompt: str = PROMPT) -> PromptInputs:
        """A prompt with a noise image for each (width, height), or for the first."""
        sizes = sizes[:1] if self.case.one_image else sizes
        return self.captioner("float32").preparer.prepare([noise(*s) for s in sizes], prompt)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Built]:
    case: FamilyCase = request.param
    root = tmp_path_factory.mktemp(case.name)
    base, merged = case.write(root / "base"), root / "merged"
    merged.mkdir()
    merge_adapters(base, [], merged)
    model = load_model(merged, json.loads((merged / "config.json").read_text()))
    return Built(case, root, base, merged, model)


def noise(width: int, height: int) -> Image.Image:
    """A gray picture in soft blocks, another for each size."""
    random = np.random.default_rng(width * 1000 + height)
    small = random.integers(0, 256, (5, 7), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def greedy(captioner: OrtCaptioner, inputs: PromptInputs) -> list[int]:
    """Up to LENGTH tokens of our runtime, without the stop token."""
    engine, stops = captioner.engine, captioner.preparer.generation.stop_ids
    features = engine.features(inputs)
    logits = engine.prefill(inputs, features, len(inputs.input_ids) + LENGTH)
    tokens: list[int] = []
    while len(tokens) < LENGTH and int(logits.argmax()) not in stops:
        tokens.append(int(logits.argmax()))
        logits = engine.step(tokens[-1])
    return tokens


def generated(built: Built, inputs: PromptInputs) -> list[int]:
    """The same by transformers' `generate`."""
    stops = built.captioner("float32").preparer.generation.stop_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = built.model.generate(
            **built.case.arguments(inputs),
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=sorted(stops),
        )
    tokens: list[int] = found[0, len(inputs.input_ids) :].tolist()
    return [t for t in tokens if t not in stops]


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def forward(built: Built, inputs: PromptInputs, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits of transformers' `forward` from the prompt's last position on."""
    whole = np.concatenate([inputs.input_ids, np.array(tokens, np.int64)])
    arguments = built.case.arguments(replace(inputs, input_ids=whole))
    with torch.inference_mode():
        logits = built.model(**arguments).logits[0]
    rows: NDArray[np.float32] = logits[len(inputs.input_ids) - 1 :].numpy()
    return rows


def test_graphs_load_and_run(built: Built) -> None:
    built.captioner("float32")
    checks = check_graphs(built.root / "float32" / "model")
    assert [c.name for c in checks] == ["vision_encoder", "embed_tokens", "decoder_model_merged"]


def test_tokens_equal_generate(built: Built) -> None:
    """Ragged sizes; one image and several in a prompt."""
    lengths = []
    for sizes in ([RAGGED[0]], [RAGGED[1]], RAGGED[1:3], RAGGED[:3]):
        inputs = built.prepare(sizes)
        found = greedy(built.captioner("float32"), inputs)
        assert found == generated(built, inputs)
        lengths.append(len(found))
    assert max(lengths) == LENGTH


def test_logits_equal_forward_at_two_shapes(built: Built) -> None:
    random = np.random.default_rng(3)
    for sizes, count in (([RAGGED[3]], 5), (RAGGED[:2], 11)):
        inputs = built.prepare(sizes, PROMPT + " x" * count)
        tokens = random.integers(5, 200, count).tolist()
        engine = built.captioner("float32").engine
        found = engine.forced(inputs, engine.features(inputs), tokens)
        assert relative(found, forward(built, inputs, tokens)) < TOLERANCE


def test_features_of_each_number_of_tiles(built: Built) -> None:
    captioner, case = built.captioner("float32"), built.case
    family = family_of(json.loads((built.merged / "config.json").read_text()))
    for tiles, size in case.tiles.items():
        inputs = built.prepare([size])
        assert len(inputs.pixel_values) == tiles
        with torch.inference_mode():
            expected = family.library_features(built.model, inputs).numpy()
            own = case.rows(built.model, family.torch_features(built.model, inputs)).numpy()
        assert relative(own, expected) < 1e-6
        assert relative(feature_rows(captioner.engine.features(inputs)), expected) < TOLERANCE


def test_a_batch_of_two_with_padding(built: Built) -> None:
    """The decoder graph on two prompts of other lengths, the shorter padded on the right."""
    captioner = built.captioner("float32")
    engine, session = captioner.engine, captioner.engine.decoder.session
    prompts = [built.prepare([RAGGED[0]], "Hi"), built.prepare([RAGGED[1]], PROMPT + " x" * 9)]
    features = [engine.features(p) for p in prompts]
    if engine.decoder.cross:
        embeds = [engine._embedded(p.input_ids) for p in prompts]
    else:
        embeds = [engine._merged(p, f) for p, f in zip(prompts, features, strict=True)]
    longest = max(map(len, embeds))
    assert min(map(len, embeds)) < longest
    feed: dict[str, Any] = {
        "inputs_embeds": np.zeros((2, longest, embeds[0].shape[1]), np.float32),
        "attention_mask": np.zeros((2, longest), np.int64),
        "num_logits_to_keep": np.array(0, np.int64),
    }
    if prompts[0].prefix_length:
        feed["prefix_length"] = np.array(prompts[0].prefix_length, np.int64)
    for name in engine.decoder.cross:
        feed[name] = np.concatenate([found[name] for found in features])
    if prompts[0].positions is not None:
        feed["position_ids"] = np.zeros((len(prompts[0].positions), 2, longest), np.int64)
    if engine.decoder.masked:
        feed["image_attention_mask"] = np.zeros((2, longest, 1), np.int64)
    for row, (prompt, embedded) in enumerate(zip(prompts, embeds, strict=True)):
        feed["inputs_embeds"][row, : len(embedded)] = embedded
        feed["attention_mask"][row, : len(embedded)] = 1
        if prompt.positions is not None:
            feed["position_ids"][:, row, : len(embedded)] = prompt.positions
        if prompt.image_mask is not None:
            feed["image_attention_mask"][row, : len(embedded)] = prompt.image_mask
    decoder = engine.decoder
    empty = np.zeros((2, decoder.heads, 0, decoder.head_dim), np.float32)
    run: ort.InferenceSession = session
    logits = np.asarray(run.run(["logits"], {**feed, **dict.fromkeys(decoder.past, empty)})[0])
    for row, prompt in enumerate(prompts):
        length = len(prompt.input_ids)
        with torch.inference_mode():
            expected = built.model(**built.case.arguments(prompt)).logits[0].numpy()
        assert relative(logits[row, :length], expected) < TOLERANCE


@pytest.mark.parametrize("scheme", ["int8", "int4-rtn"])
def test_quantized_models_stay_near(built: Built, scheme: str) -> None:
    reference, candidate = built.captioner("float32").engine, built.captioner(scheme).engine
    divergences = []
    for size in RAGGED[:2]:
        inputs = built.prepare([size])
        tokens = greedy(built.captioner("float32"), inputs)
        p, q = (e.forced(inputs, e.features(inputs), tokens) for e in (reference, candidate))
        a, b = (torch.from_numpy(x.copy()).double().log_softmax(-1) for x in (p, q))
        divergences.append(float((a.exp() * (a - b)).sum(-1).mean()))
    assert 0 < np.mean(divergences) < built.case.kl[scheme]


def test_an_adapter_merges_and_is_proven(built: Built, tmp_path: Path) -> None:
    """An adapter of the published recipe: each of its targets is a module of the family."""
    recipe, out = built.case.recipe, tmp_path / "out"
    out.mkdir()
    proof = merge_adapters(built.base, [built.adapter], out)
    assert {t.scaling for t in proof.targets} == {recipe.scaling}
    changed = [t.tensor.removesuffix(".weight") for t in proof.targets]
    if recipe.targets == ALL_LINEAR:
        modules = built.model.named_modules()
        linear = {name for name, module in modules if isinstance(module, torch.nn.Linear)}
        assert set(changed) == linear - {"lm_head"}
    else:
        for target in recipe.targets:
            assert any(f".{name}".endswith(f".{target}") for name in changed), target
    found = prove_logits(built.base, [built.adapter], out)
    assert found.method == "logits"
    assert found.image_tiles >= 2
    assert found.base_difference is not None
    assert found.tolerance is not None
    assert found.base_difference > 10 * found.tolerance


def test_key_layouts_of_adapters_merge_alike(built: Built, tmp_path: Path) -> None:
    """The adapter with the keys that it would have of other versions or of the published class."""
    stored = load_file(built.adapter / WEIGHTS)
    layouts = {"newest": stored}
    for version, renames in built.case.keys.items():
        layouts[version] = {older(key, renames): value for key, value in stored.items()}
        assert layouts[version].keys() != stored.keys(), version
    if len(layouts) == 1:
        config = json.loads((built.merged / "config.json").read_text())
        assert not layout_of(config).renames, "a family with several layouts needs a row of them"
    digests = set()
    for version, tensors in layouts.items():
        out = tmp_path / f"{version}-merged"
        out.mkdir()
        adapter = Path(shutil.copytree(built.adapter, tmp_path / version))
        save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
        merge_adapters(built.base, [adapter], out)
        digests.add(sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def older(key: str, renames: Renames) -> str:
    """The key of an adapter under another version's names."""
    name = key.removeprefix(PREFIX)
    for new, old in renames:
        if name.startswith(new):
            return PREFIX + old + name.removeprefix(new)
    return key


WITHOUT_TORCH = """
import json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "onnx", "peft", "torchvision"}:
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
from exporter.runtimes.images import open_image
from exporter.runtimes.ort import OrtCaptioner
captioner = OrtCaptioner(Path(sys.argv[1]), threads=1)
caption = captioner.caption(open_image(Path(sys.argv[2])), sys.argv[3], 24)
print(json.dumps({"tokens": caption.tokens, "text": caption.text}))
"""


def test_it_runs_without_torch(built: Built, tmp_path: Path) -> None:
    picture, captioner = noise(*RAGGED[1]), built.captioner("int4-rtn")
    picture.save(tmp_path / "a.png")
    arguments = [str(built.root / "int4-rtn" / "model"), str(tmp_path / "a.png"), PROMPT]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        check=True,
        capture_output=True,
        timeout=120,
    )
    expected = captioner.caption(picture, PROMPT, LENGTH)
    assert json.loads(done.stdout) == {"tokens": list(expected.tokens), "text": expected.text}
