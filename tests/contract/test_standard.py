"""The standard dialect of every causal family: operators, interface, and numbers against ort and torch.

Tolerances are shares of the largest value. In float32 about 1e-6 is seen, between the dialects and
against torch; in float16, whose rounding is 5e-4, up to 2e-3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from exporter.adapters.merge import merge_adapters
from exporter.families.base import PromptInputs
from exporter.families.table import family_of
from exporter.graphs.check import check_graphs
from exporter.graphs.export import export_model
from exporter.graphs.standard.examples import example_feeds
from exporter.graphs.standard.operators import require_supported
from exporter.quantizers.run import quantize_model
from exporter.quantizers.schemes import find_scheme, for_dialect
from exporter.runtimes.base import feature_rows
from exporter.runtimes.ort import PARTS, OrtCaptioner, OrtEngine
from exporter.runtimes.ort_session import open_session
from exporter.runtimes.torch_reference import load_model
from tests.contract.test_families import (
    LENGTH,
    PROMPT,
    RAGGED,
    Built,
    forward,
    generated,
    greedy,
    noise,
    relative,
)
from tests.support.family_cases import CASES, FamilyCase

torch.set_num_threads(1)
TOLERANCE, HALF_TOLERANCE = 1e-5, 1e-2


@dataclass
class Pair:
    """One family's model in both dialects, and torch's own in `built`."""

    built: Built
    ort: OrtCaptioner
    standard: OrtCaptioner
    folder: Path
    report: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)

    def note(self, **figures: float) -> None:
        """Remember measured differences, for the family's line at the end."""
        self.figures.update({k: max(v, self.figures.get(k, 0.0)) for k, v in figures.items()})


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case: FamilyCase = request.param
    root = tmp_path_factory.mktemp(case.name)
    base, merged, out = case.write(root / "base"), root / "merged", root / "standard"
    for folder in (merged, out):
        folder.mkdir()
    merge_adapters(base, [], merged)
    model = load_model(merged, json.loads((merged / "config.json").read_text()))
    built = Built(case, root, base, merged, model)
    export_model(merged, out, dialect="standard", float_storage="float32")
    report = json.loads((out / "export.json").read_text())
    standard = OrtCaptioner(out / "model", threads=1)
    return Pair(built, built.captioner("float32"), standard, out / "model", report)


def test_operators_are_those_of_the_parser(pair: Pair) -> None:
    for name in PARTS:
        path = pair.folder / "onnx" / f"{name}.onnx"
        graph = onnx.load(path)
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 21)]
        assert {n.domain for n in graph.graph.node} == {""}
        onnx.checker.check_model(graph, full_check=True)
        assert require_supported(path) == pair.report["standard"]["operators"][name]
    assert [c.name for c in check_graphs(pair.folder)] == list(PARTS)


def test_inputs_and_outputs_are_those_of_ort(pair: Pair) -> None:
    engines = pair.standard.engine, pair.ort.engine
    for part in ("vision", "embed"):
        ours, theirs = (faces(getattr(e, part)) for e in engines)
        assert ours == theirs
    ours, theirs = (faces(e.decoder.session) for e in engines)
    for name, (kind, shape) in theirs.items():
        if name.startswith("present."):
            assert shape[2] == "present_sequence_length"
            theirs[name] = kind, [*shape[:2], "total_sequence_length", shape[3]]
    assert ours == theirs
    assert [engine.decoder.concatenates for engine in engines] == [True, False]


def faces(session: Any) -> dict[str, tuple[str, list[int | str]]]:
    """Type and shape of each input and output."""
    return {i.name: (i.type, i.shape) for i in (*session.get_inputs(), *session.get_outputs())}


def test_every_input_has_an_optimization_profile(pair: Pair) -> None:
    profiles = pair.report["standard"]["profiles"]
    engine = pair.standard.engine
    sessions = dict(zip(PARTS, (engine.vision, engine.embed, engine.decoder.session), strict=True))
    for name, session in sessions.items():
        for found in profiles[name].values():
            assert found.keys() == {i.name for i in session.get_inputs()}
            for profile in found.values():
                bounds = zip(profile["min"], profile["opt"], profile["max"], strict=True)
                assert all(0 <= a <= b <= c for a, b, c in bounds)
    (vision,) = profiles["vision_encoder"].values()
    for feed in pair.built.prepare([RAGGED[0]]).vision:
        for name, array in feed.items():
            assert len(vision[name]["max"]) == array.ndim
            assert all(a <= b for a, b in zip(array.shape, vision[name]["max"], strict=True))


def test_features_of_each_number_of_tiles(pair: Pair) -> None:
    case, worst = pair.built.case, {"ort": 0.0, "torch": 0.0}
    family = family_of(json.loads((pair.built.merged / "config.json").read_text()))
    for size in case.tiles.values():
        inputs = pair.built.prepare([size])
        ours, theirs = (feature_rows(c.engine.features(inputs)) for c in (pair.standard, pair.ort))
        with torch.inference_mode():
            expected = family.library_features(pair.built.model, inputs).numpy()
        worst["ort"] = max(worst["ort"], relative(ours, theirs))
        worst["torch"] = max(worst["torch"], relative(ours, expected))
    pair.note(**{f"features/{k}": v for k, v in worst.items()})
    assert worst["ort"] < TOLERANCE
    assert worst["torch"] < TOLERANCE


def test_logits_at_two_shapes(pair: Pair) -> None:
    random, worst = np.random.default_rng(3), {"ort": 0.0, "torch": 0.0}
    for sizes, count in (([RAGGED[3]], 5), (RAGGED[:2], 11)):
        inputs = pair.built.prepare(sizes, PROMPT + " x" * count)
        tokens = random.integers(5, 200, count).tolist()
        ours, theirs = (
            e.forced(inputs, e.features(inputs), tokens).copy()
            for e in (pair.standard.engine, pair.ort.engine)
        )
        worst["ort"] = max(worst["ort"], relative(ours, theirs))
        worst["torch"] = max(worst["torch"], relative(ours, forward(pair.built, inputs, tokens)))
    pair.note(**{f"logits/{k}": v for k, v in worst.items()})
    assert worst["ort"] < TOLERANCE
    assert worst["torch"] < TOLERANCE


def test_greedy_tokens(pair: Pair) -> None:
    """One image and several in a prompt: as `generate`, and as the ort dialect in a caption."""
    lengths = []
    for sizes in ([RAGGED[0]], RAGGED[1:3]):
        inputs = pair.built.prepare(sizes)
        found = greedy(pair.standard, inputs)
        assert found == generated(pair.built, inputs)
        lengths.append(len(found))
    assert max(lengths) == LENGTH
    for size in RAGGED:
        ours, theirs = (c.caption(noise(*size), PROMPT, LENGTH) for c in (pair.standard, pair.ort))
        assert ours.tokens == theirs.tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_two_with_padding(side: str, pair: Pair) -> None:
    """Two prompts of other lengths, then one more token of each behind the padded past."""
    built, engine = pair.built, pair.standard.engine
    prompts = [built.prepare([RAGGED[0]], "Hi"), built.prepare([RAGGED[1]], PROMPT + " x" * 9)]
    feed, places = padded(engine, prompts, side)
    decoder = engine.decoder
    empty = np.zeros((2, decoder.heads, 0, decoder.head_dim), np.float32)
    logits, *present = (
        np.asarray(a)
        for a in decoder.session.run(None, {**feed, **dict.fromkeys(decoder.past, empty)})
    )
    assert np.isfinite(logits).all()
    names = [o.name for o in decoder.session.get_outputs()][1:]
    past = dict(zip(names, present, strict=True))
    following = appended(engine, prompts, feed, 7)
    following.update({name: past[decoder.present(name)] for name in decoder.past})
    after = np.asarray(decoder.session.run(["logits"], following)[0])
    worst = 0.0
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        with torch.inference_mode():
            expected = built.model(**built.case.arguments(prompt)).logits[0].numpy()
        worst = max(worst, relative(logits[row, place], expected))
        worst = max(worst, relative(after[row], forward(built, prompt, [7])[1:]))
    pair.note(**{"padded batch/torch": worst})
    assert worst < TOLERANCE


def test_the_graphs_mean_the_same_to_onnx(pair: Pair) -> None:
    """onnx's own implementation, which takes no liberties with shapes and types."""
    feeds = example_feeds(pair.folder, [noise(*RAGGED[3])], "Hi")
    worst = 0.0
    for name in PARTS:
        path = pair.folder / "onnx" / f"{name}.onnx"
        session, reference = open_session(path, 1), ReferenceEvaluator(str(path))
        names = [o.name for o in session.get_outputs()]
        for feed in feeds[name]:
            found, meant = session.run(names, dict(feed)), reference.run(names, dict(feed))
            worst = max(worst, *(relative(a, b) for a, b in zip(found, meant, strict=True)))
    pair.note(**{"onnx reference": worst})
    assert worst < TOLERANCE


def test_float16_arithmetic(pair: Pair) -> None:
    """Logits and features against torch in float32 on the same float16 weights."""
    built, out = pair.built, pair.built.root / "float16"
    out.mkdir()
    export_model(built.merged, out, dialect="standard", compute="float16")
    for name in PARTS:
        path = out / "model" / "onnx" / f"{name}.onnx"
        require_supported(path)
        onnx.checker.check_model(onnx.load(path), full_check=True)
    kept = json.loads((out / "export.json").read_text())["standard"]["kept_float32"]
    assert kept == {name: {} for name in PARTS}
    engine = OrtCaptioner(out / "model", threads=1).engine
    tokens = np.random.default_rng(3).integers(5, 200, 8).tolist()
    inputs = built.prepare([RAGGED[3]])
    features = engine.features(inputs)
    found = engine.forced(inputs, features, tokens)
    worst = relative(found, forward(built, inputs, tokens))
    expected = feature_rows(pair.ort.engine.features(inputs))
    # Token by token, behind a past in float16.
    rows = [engine.prefill(inputs, features, len(inputs.input_ids) + 8).copy()]
    rows += [engine.step(token).copy() for token in tokens]
    worst = max(worst, relative(np.stack(rows), forward(built, inputs, tokens)))
    pair.note(**{"float16 logits/torch": worst})
    assert worst < HALF_TOLERANCE
    assert relative(feature_rows(features), expected) < HALF_TOLERANCE


def test_quantized_models_equal_the_ort_dialects(pair: Pair) -> None:
    """Without rounded inputs; 4-bit blocks stay in 4 bits where TensorRT has them at all."""
    built, root = pair.built, pair.built.root
    chosen = for_dialect(find_scheme("int4-hqq-sym"), "standard")
    folders = [root / f"int4-{part}" for part in ("quantized", "ort", "standard")]
    for folder in folders:
        folder.mkdir()
    quantize_model(built.merged, folders[0], chosen, threads=1)
    record = json.loads((folders[0] / "quantization.json").read_text())
    assert (record["scheme"], record["settings"]["scales"]) == ("int4-hqq-pos", {"positive": True})
    export_model(folders[0], folders[1], accuracy_level=0)
    report = export_model(folders[0], folders[2], dialect="standard")
    assert report.standard is not None
    for why in report.standard.widened.values():
        assert re.fullmatch(r"\d*[13579] rows; .*|4-bit blocks of (16|32); .*", why)
    inputs, tokens = built.prepare([RAGGED[0]]), [5, 9, 30]
    theirs, ours = (OrtCaptioner(f / "model", threads=1).engine for f in folders[1:])
    found, expected = (e.forced(inputs, e.features(inputs), tokens).copy() for e in (ours, theirs))
    pair.note(**{"int4 logits/ort": relative(found, expected)})
    assert relative(found, expected) < TOLERANCE


def padded(
    engine: OrtEngine, prompts: Sequence[PromptInputs], side: str
) -> tuple[dict[str, NDArray[Any]], list[slice]]:
    """Inputs of the decoder graph but the past, and where each prompt stands in its row."""
    features = [engine.features(p) for p in prompts]
    if engine.decoder.cross:
        embeds = [engine._embedded(p.input_ids) for p in prompts]
    else:
        embeds = [engine._merged(p, f) for p, f in zip(prompts, features, strict=True)]
    longest = max(map(len, embeds))
    assert min(map(len, embeds)) < longest
    feed: dict[str, NDArray[Any]] = {
        "inputs_embeds": np.zeros((2, longest, embeds[0].shape[1]), np.float32),
        "attention_mask": np.zeros((2, longest), np.int64),
        "num_logits_to_keep": np.array(0, np.int64),
    }
    for name in engine.decoder.cross:
        feed[name] = np.concatenate([found[name] for found in features])
    if engine.decoder.prefixed:
        feed["prefix_length"] = np.array(prompts[0].prefix_length, np.int64)
    if prompts[0].positions is not None:
        feed["position_ids"] = np.zeros((len(prompts[0].positions), 2, longest), np.int64)
    if engine.decoder.masked:
        feed["image_attention_mask"] = np.zeros((2, longest, 1), np.int64)
    places = []
    for row, (prompt, embedded) in enumerate(zip(prompts, embeds, strict=True)):
        start = longest - len(embedded) if side == "left" else 0
        places.append(slice(start, start + len(embedded)))
        feed["inputs_embeds"][row, places[row]] = embedded
        feed["attention_mask"][row, places[row]] = 1
        if prompt.positions is not None:
            feed["position_ids"][:, row, places[row]] = prompt.positions
        if prompt.image_mask is not None:
            feed["image_attention_mask"][row, places[row]] = prompt.image_mask
    return feed, places


def appended(
    engine: OrtEngine, prompts: Sequence[PromptInputs], before: dict[str, NDArray[Any]], token: int
) -> dict[str, NDArray[Any]]:
    """Inputs of the decoder graph, but the past, for one more `token` behind each text of `before`."""
    mask = np.concatenate([before["attention_mask"], np.ones((2, 1), np.int64)], axis=1)
    embeds = np.stack([engine._embedded([token])] * 2)
    feed = {**before, "attention_mask": mask, "inputs_embeds": embeds}
    if engine.decoder.prefixed:
        feed["prefix_length"] = np.array(0, np.int64)
    if prompts[0].positions is not None:
        last = [p.positions.max() + 1 for p in prompts if p.positions is not None]
        feed["position_ids"] = np.broadcast_to(
            np.array(last, np.int64)[None, :, None], (len(prompts[0].positions), 2, 1)
        ).copy()
    if engine.decoder.masked:
        rows = [p.image_mask[-1:] for p in prompts if p.image_mask is not None]
        feed["image_attention_mask"] = np.stack(rows)
    return feed


def test_the_measured_differences(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each family, of what the tests before this one measured."""
    line = ", ".join(f"{what} {value:.1e}" for what, value in pair.figures.items())
    with capsys.disabled():
        print(f"\nstandard dialect, {pair.built.case.name}: {line}", end=" ")
    assert all(value < HALF_TOLERANCE for value in pair.figures.values())
