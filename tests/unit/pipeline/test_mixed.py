"""The whole scheme on a tiny model: sensitivities against torch, the written folder, the graphs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from exporter.calibrate.evaluate import CaptionModel
from exporter.calibrate.imageset import ImageSet, Sample
from exporter.core.blocks import BlockFormat, dequantize
from exporter.core.digest import sha256_file, sha256_tree
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import copy_small_files, read_config, read_json
from exporter.core.tensors import Checkpoint
from exporter.families.table import family_of
from exporter.graphs.export import export_model
from exporter.pipeline.budget import read_budget
from exporter.pipeline.calibrated import Calibration
from exporter.pipeline.mixed import MixedJob, draw, quantize_mixed
from exporter.quantizers.rtn import quantize_matrix
from exporter.quantizers.run import write_planned
from exporter.quantizers.schemes import find_scheme
from exporter.quantizers.units import plan_units
from exporter.runtimes.ort import OrtCaptioner
from exporter.runtimes.torch_reference import TorchCaptioner
from tests.support.tiny import write_tiny_model

PROMPT = "Describe this medical image."
CAPTION = "Chest X-ray, frontal view. No pneumothorax."
SIZE = "0.42"


def image_set(folder: Path, count: int) -> ImageSet:
    samples = []
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 255, (40, 40), np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(values).save(path)
        samples.append(Sample(f"c{i}", path, f"p{i}", "x-ray", CAPTION[i:], (), sha256_file(path)))
    return ImageSet("tiny", "0" * 64, PROMPT, tuple(samples))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> MixedJob:
    """A job on 6 of 9 images, not yet run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mixed")
    merged = write_tiny_model(folder / "merged", layers=2, seed=5)
    export_model(merged, folder / "fp16")
    images = image_set(folder, 9)
    return MixedJob(
        merged=merged,
        exported=folder / "fp16",
        out=folder / "out",
        scheme=find_scheme("mixed"),
        calibration=Calibration(images, images.cases()[:6], PROMPT),
        budget=read_budget(SIZE, None, mixed=True),
        scratch=folder / "scratch",
        threads=1,
    )


@pytest.fixture(scope="module")
def done(job: MixedJob) -> dict[str, Any]:
    """The finished job's allocation."""
    job.out.mkdir()
    quantize_mixed(job)
    found: dict[str, Any] = read_json(job.out / "quantization.json")["allocation"]
    return found


@pytest.fixture(scope="module")
def model(job: MixedJob, done: dict[str, Any]) -> TorchCaptioner:
    return TorchCaptioner(job.merged, threads=1)


def torch_kl(
    captioner: TorchCaptioner,
    job: MixedJob,
    cases: list[str],
    replaced: dict[str, NDArray[np.float32]],
) -> float:
    """KL of the whole model, images and all, with `replaced` weights; independent of our decoder."""
    state = captioner.model.state_dict()
    before = {n: state[n].clone() for n in replaced}
    samples = [s for s in job.calibration.images.samples if s.id in cases]
    words = Tokenizer.from_file(str(job.exported / "model" / "tokenizer.json"))

    def rows() -> list[torch.Tensor]:
        found = []
        for s in samples:
            tokens = words.encode(" " + s.caption, add_special_tokens=False).ids
            with Image.open(s.image_path) as image:
                logits = captioner.score(image.convert("RGB"), PROMPT, tokens)
            found.append(torch.log_softmax(torch.from_numpy(logits).double(), -1))
        return found

    reference = rows()
    captioner.model.load_state_dict(
        {n: torch.from_numpy(v) for n, v in replaced.items()}, strict=False
    )
    try:
        other = rows()
    finally:
        captioner.model.load_state_dict(before, strict=False)
    total = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(reference, other, strict=True))
    return total / sum(len(a) for a in reference)


def test_sensitivities_are_those_of_the_torch_model(
    job: MixedJob, done: dict[str, Any], model: TorchCaptioner
) -> None:
    checkpoint = Checkpoint.open(job.merged)
    # Rounded plainly in 8 bits: what no calibration enters into.
    names = (
        "model.text_model.layers.1.self_attn.qkv",
        "model.text_model.layers.0.mlp.down_proj",
        "model.vision_model.encoder.layers.0",
        "model.connector.modality_projection.proj",
        "lm_head",
        "model.text_model.embed_tokens",
    )
    by_name = {unit["name"]: unit for unit in done["units"]}
    form = BlockFormat(8, 64, symmetric=True)  # the widest block that divides 64 columns
    for name in names:
        replaced = {}
        for tensor in by_name[name]["tensors"]:
            weight = checkpoint.float32(tensor)
            fitted = BlockFormat(8, 128, symmetric=True) if weight.shape[1] % 128 == 0 else form
            replaced[tensor] = dequantize(quantize_matrix(weight, fitted, search=False))
        expected = torch_kl(model, job, done["samples"]["sensitivity"], replaced)
        found = next(o["kl"] for o in by_name[name]["options"] if o["bits"] == 8)
        assert expected > 1e-7
        assert found == pytest.approx(expected, rel=0.02, abs=2e-7), name


def test_the_final_kl_is_that_of_the_written_folder(
    job: MixedJob, done: dict[str, Any], model: TorchCaptioner
) -> None:
    quantized = TorchCaptioner(job.out, threads=1).model.state_dict()
    replaced = {n: quantized[n].numpy() for n in model.model.state_dict()}
    expected = torch_kl(model, job, done["samples"]["held_out"], replaced)
    assert done["measured_kl"] == pytest.approx(expected, rel=0.02)


def test_the_folder_is_within_its_budget_and_as_recorded(
    job: MixedJob, done: dict[str, Any]
) -> None:
    data = (job.out / "model.safetensors").read_bytes()
    size = len(data) - 8 - int.from_bytes(data[:8], "little")
    assert size == done["bytes"] <= done["budget"]["bytes"]
    assert done["budget"]["bytes"] == int(float(SIZE) * done["float16_bytes"])
    rows = {r["name"]: r["bits"] for r in read_json(job.out / "quantization.json")["layers"]}
    for unit in done["units"]:
        assert {rows.get(n, 16) for n in unit["tensors"]} == {unit["bits"]}
        assert [o["bits"] for o in unit["options"]] == [4, 8, 16]
    assert len({unit["bits"] for unit in done["units"]}) > 1
    chosen = [o["kl"] for u in done["units"] for o in u["options"] if o["bits"] == u["bits"]]
    assert done["predicted_kl"] == pytest.approx(sum(chosen))
    samples = done["samples"]
    fitted = {c.id for c in job.calibration.cases}
    assert set(samples["sensitivity"]) <= fitted
    assert samples["held_out"] and not set(samples["held_out"]) & fitted
    points = read_json(job.out / "tradeoff.json")["points"]
    assert sum(p["kind"] == "hull" for p in points) >= 6
    assert not (job.scratch / "vision").exists()


def test_the_same_inputs_give_the_same_bytes(
    job: MixedJob, done: dict[str, Any], tmp_path: Path
) -> None:
    again = replace(job, out=tmp_path / "out", scratch=tmp_path / "scratch")
    again.out.mkdir()
    quantize_mixed(again)
    assert sha256_tree(again.out) == sha256_tree(job.out)


def test_a_block_of_mixed_formats_runs_as_torch_does(job: MixedJob, tmp_path: Path) -> None:
    config = read_config(job.merged / "config.json")
    family, checkpoint = family_of(config), Checkpoint.open(job.merged)
    decoder = family.decoder_spec(config)
    plans = plan_units(checkpoint, decoder, family.tower_spec(config), job.scheme)
    at = "model.text_model.layers.0."
    bits = dict.fromkeys((u.name for u in plans.units), 16)
    bits |= {at + "self_attn.qkv": 4, at + "self_attn.o_proj": 8, at + "mlp.down_proj": 4}
    bits |= {"model.vision_model.encoder.layers.1": 4, "lm_head": 4}
    plan = [replace(p, method="rtn") if p.method == "gptq" else p for p in plans.chosen(bits)]
    folder = tmp_path / "quantized"
    folder.mkdir()
    copy_small_files(job.merged, folder)
    write_planned(checkpoint, plan, folder, "mixed", threads=1)
    export_model(folder, tmp_path / "exported", accuracy_level=0)
    with Image.open(job.calibration.cases[0].image) as opened:
        image = opened.convert("RGB")
    ours = OrtCaptioner(tmp_path / "exported" / "model", threads=1).score(image, PROMPT, [5, 9, 40])
    theirs = TorchCaptioner(folder, threads=1).score(image, PROMPT, [5, 9, 40])
    assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()


def test_held_out_cases_are_set_aside_where_the_set_has_no_others(job: MixedJob) -> None:
    images = job.calibration.images
    whole = draw(Calibration(images, images.cases(), PROMPT))
    ids = {c.id for c in whole.calibration.cases}, {c.id for c in whole.held_out}
    assert not ids[0] & ids[1] and ids[0] | ids[1] == {s.id for s in images.samples}
    single = ImageSet("one", "0" * 64, PROMPT, images.samples[:1])
    with pytest.raises(InputRefused, match="at least two"):
        draw(Calibration(single, single.cases(), PROMPT))


def test_a_killed_run_goes_on_without_measuring_again(
    job: MixedJob, done: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(job.scratch, tmp_path / "scratch")
    again = replace(job, out=tmp_path / "out", scratch=tmp_path / "scratch")
    again.out.mkdir()
    calls: list[int] = []
    measure = CaptionModel.kl

    def counted(self: CaptionModel, *given: Any) -> float:
        calls.append(1)
        return measure(self, *given)

    monkeypatch.setattr(CaptionModel, "kl", counted)
    quantize_mixed(again)
    assert len(calls) == 1  # the result itself
    assert sha256_tree(again.out) == sha256_tree(job.out)
