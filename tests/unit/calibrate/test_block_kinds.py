"""Every kind of decoder: its blocks against transformers' own, and what GPTQ gains on it by them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporter.adapters.merge import merge_adapters
from exporter.calibrate.blocks.table import BLOCKS, open_blocks
from exporter.calibrate.prompts import EmbeddedPrompt, embed_prompts
from exporter.calibrate.sets import open_set
from exporter.calibrate.walk import load_block, walk_decoder
from exporter.core.cases import Case
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.core.progress import silent
from exporter.core.tensors import Checkpoint
from exporter.families.captioners.gemma3 import decoder_spec
from exporter.families.specs.gemma3 import Gemma3Decoder
from exporter.families.specs.walked import STARTS, block_prefix, block_tensors, seen_matrices
from exporter.families.table import family_of
from exporter.graphs.export import export_model
from exporter.graphs.parts import DECODER_WRITERS
from exporter.pipeline.budget import read_budget
from exporter.pipeline.calibrated import open_calibration, quantize_calibrated
from exporter.pipeline.forecast import check_scheme
from exporter.pipeline.quantize import QuantizeOptions, quantize_folder
from exporter.pipeline.resolve import folder_profile, scheme_named
from exporter.quantizers.plan import plan_layers
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import SCHEMES, find_scheme
from exporter.runtimes.images import open_image
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import load_model
from tests.support.tiny_blip2 import write_tiny_blip2
from tests.support.tiny_cnn import write_tiny_cnn
from tests.support.tiny_gemma3 import write_tiny_gemma3
from tests.support.tiny_idefics import write_tiny_idefics
from tests.support.tiny_moondream import write_tiny_moondream
from tests.support.tiny_ved import write_tiny_ved
from tests.unit.calibrate.test_walk import Recorder, assert_same

torch.set_num_threads(1)
Array = NDArray[np.float32]
PROMPT, SET = "Describe this medical image.", "phantoms-calib"
CALIBRATION, HELD_OUT = 24, 12


@dataclass(frozen=True)
class Kind:
    """One row. `write` writes the published folder; `layers` finds the torch model's blocks, or what
    gives the hidden states behind each.
    """

    name: str
    write: Callable[[Path], Path]
    layers: Callable[[Any], Sequence[torch.nn.Module]]


def _gelu(folder: Path) -> Path:
    return write_tiny_ved(folder, old=False, decoder={"activation_function": "gelu"})


def _vector(folder: Path) -> Path:
    """Gates of a value per channel, no norms of queries and keys."""
    return write_tiny_idefics(folder, alpha_type="vector", qk_layer_norms=False)


def _cnn_layers(model: Any) -> list[torch.nn.Module]:
    return [layer.norm3 for layer in model.decoder.layers]


KINDS = (
    Kind("moondream2", write_tiny_moondream, lambda m: m._computing[0].layers),
    Kind("idefics", write_tiny_idefics, lambda m: m.model.layers),
    Kind("idefics-vector", _vector, lambda m: m.model.layers),
    Kind("vit-gpt2", write_tiny_ved, lambda m: m.decoder.transformer.h),
    Kind("vit-gpt2-gelu", _gelu, lambda m: m.decoder.transformer.h),
    Kind("cnn-transformer", write_tiny_cnn, _cnn_layers),
    Kind("blip2-opt", write_tiny_blip2, lambda m: m.language_model.model.decoder.layers),
)


class Built:
    """One model: published, merged, its float graphs and torch's own model."""

    def __init__(self, kind: Kind, root: Path) -> None:
        self.kind, self.base, self.merged = kind, kind.write(root / "base"), root / "merged"
        self.merged.mkdir()
        merge_adapters(self.base, [], self.merged)
        self.config = read_config(self.merged / "config.json")
        self.family: Any = family_of(self.config)
        self.spec = self.family.decoder_spec(self.config)
        self.checkpoint = Checkpoint.open(self.merged)
        self.graphs = root / "float" / "model"
        self.captioner = self.exported(self.merged, root / "float")
        drawn = open_set(SET).cases()
        self.cases = drawn[:: len(drawn) // 4][:4]
        self.prompts = self.embedded(self.cases)

    def embedded(self, cases: Sequence[Case], max_answer: int = 128) -> list[EmbeddedPrompt]:
        """The prompts of `cases` with their captions."""
        return embed_prompts(
            self.merged, self.graphs, cases, PROMPT, threads=1, max_answer=max_answer
        )

    def exported(self, source: Path, out: Path) -> OrtCaptioner:
        out.mkdir()
        export_model(source, out, float_storage="float32", accuracy_level=0)
        return OrtCaptioner(out / "model", threads=1)

    def tower(self) -> Any:
        return self.family.tower_spec(self.config)

    def states(self, prompt: EmbeddedPrompt, case: Case) -> tuple[list[Array], dict[str, Array]]:
        """Hidden states behind each block of the torch model, and the inputs of its linear layers."""
        model = load_model(self.merged, self.config)
        inputs = self.captioner.preparer.prepare([open_image(case.image)], PROMPT)
        cache = None
        with torch.inference_mode():
            if self.captioner.preparer.image_token_id is None:
                features = self.family.torch_features(model, inputs)
                cache = self.family.torch_start(model, features, inputs)
            behind: list[Array] = []
            seen: dict[str, Array] = {}
            for layer in self.kind.layers(model):
                layer.register_forward_hook(lambda _m, _a, out: behind.append(_rows(out)))
            for name, module in model.named_modules():
                module.register_forward_pre_hook(
                    lambda _m, args, n=name: seen.update({n: _rows(args)}) if args else None
                )
            self.family.torch_append(model, torch.from_numpy(prompt.embeds), cache, None)
        return behind, seen


def _rows(out: Any) -> Array:
    value = out[0] if isinstance(out, tuple) else out
    if not isinstance(value, torch.Tensor):
        return np.empty(0, np.float32)
    return value.reshape(-1, value.shape[-1]).numpy()


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    kind: Kind = request.param
    return Built(kind, tmp_path_factory.mktemp(kind.name))


def relative(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_blocks_equal_transformers(built: Built) -> None:
    """Each block on what the ones before it gave, and what each linear layer is multiplied with."""
    blocks = open_blocks(built.checkpoint, built.spec, built.prompts)
    for number in (0, 3):
        behind, seen = built.states(built.prompts[number], built.cases[number])
        hidden = torch.from_numpy(np.array(blocks.begin(number)))
        assert len(behind) == built.spec.layers
        compared = set()
        for layer, expected in enumerate(behind):
            weights = load_block(built.checkpoint, built.spec, layer)
            found: dict[tuple[str, ...], Array] = {}
            with torch.inference_mode():
                hidden = blocks.run(
                    layer, weights, hidden, number, lambda g, x, to=found: to.update({g: x.numpy()})
                )
            assert relative(hidden.numpy(), expected) < 1e-5
            assert tuple(found) == blocks.groups(layer)
            for group, x in found.items():
                for name in group:
                    whole = block_prefix(built.spec, layer) + name
                    compared.add(whole)
                    if whole.endswith(".weight"):  # torch's fused attention is no layer of its own
                        assert relative(x, seen[whole.removesuffix(".weight")]) < 1e-5
        assert compared == seen_matrices(built.spec)


def test_a_block_holds_its_tensors_as_they_are_planned(built: Built) -> None:
    """No tensor twice, no linear layer of the decoder left out, matrices as outputs by inputs."""
    blocks = [t.name for i in range(built.spec.layers) for t in block_tensors(built.spec, i)]
    assert len(blocks) == len(set(blocks))
    assert {t.name for t in built.spec.tensors() if t.role == "decoder"} <= set(blocks)
    stored = {p.name: p.shape for p in plans(built, "int4-gptq")}
    for name, values in load_block(built.checkpoint, built.spec, 0).items():
        assert tuple(values.shape) == stored[block_prefix(built.spec, 0) + name]


def plans(built: Built, scheme: str) -> tuple[Any, ...]:
    return plan_layers(built.checkpoint, built.spec, built.tower(), find_scheme(scheme))


def test_gptq_loses_less_than_rounding_at_equal_bytes(built: Built, tmp_path: Path) -> None:
    """KL and squared error of the logits on captions that calibration did not see.

    Measured: 0.04 to 0.31 of rounding's KL and squared error.
    """
    folders = {name: tmp_path / name for name in ("int4-gptq", "int4-rtn")}
    for folder in folders.values():
        folder.mkdir()
    options = QuantizeOptions(
        scheme="int4-gptq", threads=1, calibration_samples=CALIBRATION, prompt=PROMPT
    )
    quantize_folder(built.merged, folders["int4-gptq"], options)
    quantize_model(built.merged, folders["int4-rtn"], find_scheme("int4-rtn"), threads=1)
    sizes = {(f / "model.safetensors").stat().st_size for f in folders.values()}
    assert max(sizes) - min(sizes) < 512  # the header alone says more of one than of the other
    stored = {n: Checkpoint.open(folder) for n, folder in folders.items()}
    for plan in plans(built, "int4-gptq"):
        for name in () if plan.method == "gptq" else plan.entries():
            np.testing.assert_array_equal(*(c.raw(name) for c in stored.values()), err_msg=name)
    calibrated = json.loads((folders["int4-gptq"] / "calibration.json").read_text())["cases"]
    cases = [c for c in open_set(SET).cases() if c.id not in calibrated][:HELD_OUT]
    losses = {n: losses_of(built, built.exported(f, tmp_path / f"{n}-e"), cases)
              for n, f in folders.items()}  # fmt: skip
    kl, squared = (np.array([losses[n][i] for n in folders]) for i in (0, 1))
    assert 0 < kl[0] < 0.5 * kl[1]
    assert 0 < squared[0] < 0.5 * squared[1]


def losses_of(built: Built, candidate: OrtCaptioner, cases: Sequence[Case]) -> tuple[float, float]:
    """Mean KL in nats per caption token, and mean squared error of the logits."""
    divergences, squares = [], []
    for case, prompt in zip(cases, built.embedded(cases, max_answer=60), strict=True):
        image, tokens = open_image(case.image), prompt.tokens[prompt.answer].tolist()
        ours, theirs = (
            c.score(image, PROMPT, tokens).astype(np.float64) for c in (built.captioner, candidate)
        )
        p, q = (torch.from_numpy(x).log_softmax(-1) for x in (ours, theirs))
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
        squares.append(float(((ours - theirs) ** 2).mean()))
    return float(np.mean(divergences)), float(np.mean(squares))


def test_an_interrupted_calibration_leaves_the_same_bytes(built: Built, tmp_path: Path) -> None:
    """Stopped in a later block; the next run goes on there, from the scratch folder."""
    calibration = open_calibration(SET, 3, "", None)
    arguments = (find_scheme("int4-gptq"), calibration)

    def stop(done: int, total: int, what: str = "") -> None:
        if what == f"block {built.spec.layers - 1}":
            raise KeyboardInterrupt

    def run(name: str, scratch: str, progress: Any) -> str:
        out = tmp_path / name
        out.mkdir()
        folders = (built.merged, built.graphs.parent, out)
        return quantize_calibrated(
            *folders, *arguments, tmp_path / scratch, threads=1, progress=progress
        )

    assert run("whole", "one", silent) == ""
    with pytest.raises(KeyboardInterrupt):
        run("broken", "two", stop)
    last = built.spec.layers - 1
    assert run("again", "two", silent) == f"went on at block {last} of {built.spec.layers}"
    for name in ("model.safetensors", "quantization.json", "calibration.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_killed_walk_goes_on_at_its_block(built: Built, tmp_path: Path) -> None:
    whole, first, second = Recorder(0.02), Recorder(0.02, stop_at=1), Recorder(0.02)
    arguments = (built.checkpoint, built.spec, built.prompts)
    walk_decoder(*arguments, whole, threads=1)
    with pytest.raises(KeyboardInterrupt):
        walk_decoder(*arguments, first, threads=1, keep=tmp_path)
    assert walk_decoder(*arguments, second, threads=1, keep=tmp_path) == 1
    assert second.layers == list(range(1, built.spec.layers))
    assert_same(second, whole)
    assert not list(tmp_path.iterdir())


def test_what_a_prompt_says_of_its_image_is_part_of_the_walk(built: Built, tmp_path: Path) -> None:
    """States of other cross keys, another mask or another prefix are not gone on with."""
    prompt = built.prompts[0]
    changed = [
        replace(prompt, cross=(prompt.cross[0] + 1, *prompt.cross[1:])) if prompt.cross else None,
        replace(prompt, prefix_length=prompt.prefix_length - 1) if prompt.prefix_length else None,
        None if prompt.image_mask is None else replace(prompt, image_mask=1 - prompt.image_mask),
    ]
    visitor = Recorder(stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        walk_decoder(built.checkpoint, built.spec, [prompt], visitor, threads=1, keep=tmp_path)
    outputs = []
    for other in (prompt, *filter(None, changed)):
        blocks = open_blocks(built.checkpoint, built.spec, [other])
        weights = load_block(built.checkpoint, built.spec, 0)
        outputs.append(blocks.run(0, weights, torch.from_numpy(np.array(blocks.begin(0))), 0))
        if other is not prompt:
            with pytest.raises(InputRefused, match="of another model, calibration set or version"):
                walk_decoder(
                    built.checkpoint, built.spec, [other], Recorder(), threads=1, keep=tmp_path
                )
    assert all(not torch.equal(outputs[0], out) for out in outputs[1:])
    assert len(outputs) > 1 or built.kind.name == "blip2-opt"


def test_prompts_of_another_family_are_refused(built: Built) -> None:
    bare = [replace(p, cross=(), image_mask=None) for p in built.prompts]
    if built.prompts[0].cross:
        with pytest.raises(InputRefused, match="keys and values of 0 cross-attentions; expected"):
            open_blocks(built.checkpoint, built.spec, bare)
    if built.prompts[0].image_mask is not None:
        blind = [replace(p, image_mask=None) for p in built.prompts]
        with pytest.raises(InputRefused, match="does not say which tokens see its images"):
            open_blocks(built.checkpoint, built.spec, blind)


def test_the_table_of_a_quantized_folder_says_each_method(built: Built) -> None:
    """GPTQ where calibration sees the inputs; what the image is multiplied with is rounded."""
    seen, methods = seen_matrices(built.spec), {p.name: p.method for p in plans(built, "int4-gptq")}
    assert {n for n, m in methods.items() if m == "gptq"} == seen
    four_bits = {p.name for p in plans(built, "int4-gptq") if p.format and p.format.bits == 4}
    left = four_bits - seen
    if built.kind.name == "cnn-transformer":
        assert {n.split(".", 3)[3] for n in left} == {"multihead_attn.in_proj_weight"}
        assert {methods[n] for n in left} == {"rtn-mse"}
    else:
        assert not left


FOLDING = [n for n, s in SCHEMES.items() if s.calibrated and n != "int4-gptq"]


@pytest.mark.parametrize("scheme", FOLDING)
def test_what_needs_llama_blocks_is_refused_with_what_works(built: Built, scheme: str) -> None:
    chosen = find_scheme(scheme)
    message = (
        f"scheme {scheme} works with Llama decoders alone.*; use int4-gptq, int4-hqq or int4-rtn"
    )
    budget = read_budget(None, None, mixed=bool(chosen.choices))
    with pytest.raises(InputRefused, match=message):
        check_scheme(built.merged, chosen, budget)
    with pytest.raises(InputRefused, match=message):
        plans(built, scheme)
    check_scheme(built.merged, find_scheme("int4-gptq"), budget)


def test_int4_of_a_folder_is_what_was_measured_better(built: Built) -> None:
    assert scheme_named(folder_profile(built.merged), "int4") == "int4-gptq"
    assert scheme_named(folder_profile(built.merged), "int4-g32") == "int4-gptq-g32"


def test_one_row_per_kind() -> None:
    """Every kind of decoder that graphs are written for has blocks, or is named here."""
    assert STARTS.keys() == BLOCKS.keys()
    assert DECODER_WRITERS.keys() - BLOCKS.keys() == {Gemma3Decoder}


def test_a_kind_without_blocks_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_gemma3(tmp_path / "gemma3")
    spec = decoder_spec(read_config(folder / "config.json"))
    checkpoint = Checkpoint.open(folder)
    assert not seen_matrices(spec)
    with pytest.raises(InputRefused, match="calibration walks the decoder block by block, and the"):
        open_blocks(checkpoint, spec, [])
    message = "blocks of a Gemma3Decoder are not known to it; use int4-hqq or int4-rtn"
    with pytest.raises(InputRefused, match=f"scheme int4-gptq walks .*{message}"):
        check_scheme(folder, find_scheme("int4-gptq"), read_budget(None, None, mixed=False))
    with pytest.raises(InputRefused, match="Llama decoders alone.*; use int4-hqq or int4-rtn"):
        check_scheme(folder, find_scheme("int4-awq"), read_budget(None, None, mixed=False))
    assert scheme_named(folder_profile(folder), "int4") == "int4-rtn"
