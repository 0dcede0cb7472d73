"""KL with replaced weights against the whole torch model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporter.calibrate.evaluate import CaptionModel
from exporter.calibrate.prompts import EmbeddedPrompt
from exporter.core.activations import FloatModel
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint
from exporter.families.base import DecoderSpec
from exporter.families.captioners.idefics3 import decoder_spec
from exporter.runtimes.torch_reference import TorchCaptioner
from tests.support.tiny import write_tiny_model

BLOCK1 = "model.text_model.layers.1."
EMBEDDING = "model.text_model.embed_tokens.weight"


def noisy(checkpoint: Checkpoint, name: str, seed: int = 0) -> NDArray[np.float32]:
    values = checkpoint.float32(name)
    noise = np.random.default_rng(seed).standard_normal(values.shape).astype(np.float32)
    return np.asarray(values * (1 + 0.2 * noise))


def reference_kl(
    folder: Path, prompts: list[EmbeddedPrompt], replaced: dict[str, NDArray[np.float32]]
) -> float:
    """The same with transformers' model, all in one pass."""
    captioner = TorchCaptioner(folder, threads=1)
    model = captioner.model

    def log_probabilities() -> list[torch.Tensor]:
        rows = []
        with torch.inference_mode():
            table = model.get_input_embeddings().weight
            for p in prompts:
                embeds = torch.from_numpy(p.embeds).clone()
                text = torch.from_numpy(~p.image_positions)
                embeds[text] = table[torch.from_numpy(p.tokens)[text]]
                hidden = model.model.text_model(inputs_embeds=embeds[None]).last_hidden_state[0]
                logits = model.lm_head(hidden[p.answer.start - 1 :]).double()
                rows.append(torch.log_softmax(logits, -1))
        return rows

    before = log_probabilities()
    found = model.load_state_dict(
        {n: torch.from_numpy(v) for n, v in replaced.items()}, strict=False
    )
    assert not found.unexpected_keys
    after = log_probabilities()
    total = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(before, after, strict=True))
    return total / sum(len(a) for a in before)


@pytest.mark.parametrize("on_disk", [False, True])
def test_kl_is_that_of_the_torch_model(
    merged: Path,
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    prompts: list[EmbeddedPrompt],
    tmp_path: Path,
    on_disk: bool,
) -> None:
    changes = [
        [BLOCK1 + "mlp.down_proj.weight"],
        ["model.text_model.layers.2.self_attn.k_proj.weight", BLOCK1 + "input_layernorm.weight"],
        ["lm_head.weight"],
        ["model.text_model.norm.weight", EMBEDDING],
    ]
    with CaptionModel(
        checkpoint, spec, prompts, threads=1, spill=tmp_path if on_disk else None
    ) as ours:
        model: FloatModel = ours
        assert model.kl({}) == 0.0
        same = {BLOCK1 + "mlp.up_proj.weight": checkpoint.float32(BLOCK1 + "mlp.up_proj.weight")}
        assert model.kl(same) == 0.0
        for names in changes:
            replaced = {n: noisy(checkpoint, n) for n in names}
            expected = reference_kl(merged, prompts, replaced)
            assert expected > 1e-4
            assert model.kl(replaced) == pytest.approx(expected, rel=2e-3), names
        assert model.kl({}) == 0.0
        assert bool(list(tmp_path.iterdir())) == on_disk
    assert not list(tmp_path.iterdir())


def test_a_tied_head_changes_with_the_embedding(
    prompts: list[EmbeddedPrompt], tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "tied", tied=True, layers=1, seed=3)
    checkpoint = Checkpoint.open(folder)
    spec = decoder_spec(read_config(folder / "config.json"))
    model = CaptionModel(checkpoint, spec, prompts, threads=1)
    replaced = {EMBEDDING: noisy(checkpoint, EMBEDDING)}
    # The reference's prompts are embedded with this model's own table on both sides.
    table = checkpoint.float32(EMBEDDING)
    own = [
        EmbeddedPrompt(
            np.where(p.image_positions[:, None], p.embeds, table[p.tokens]),
            p.image_positions,
            p.tokens,
            p.answer,
        )
        for p in prompts
    ]
    model = CaptionModel(checkpoint, spec, own, threads=1)
    assert model.kl(replaced) == pytest.approx(reference_kl(folder, own, replaced), rel=2e-3)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is no tensor"):
        model.kl({"lm_head.weight": table})


def test_strangers_are_refused(
    checkpoint: Checkpoint, spec: DecoderSpec, prompts: list[EmbeddedPrompt]
) -> None:
    model = CaptionModel(checkpoint, spec, prompts[:1], threads=1)
    vision = "model.vision_model.encoder.layers.0.mlp.fc1.weight"
    for name in (vision, "model.text_model.layers.9.mlp.up_proj.weight"):
        with pytest.raises(ValueError, match="is no tensor of the decoder"):
            model.kl({name: np.zeros((128, 64), np.float32)})
    with pytest.raises(ValueError, match="not of the checkpoint's shape"):
        model.kl({BLOCK1 + "mlp.up_proj.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(InputRefused, match="no calibration prompts"):
        CaptionModel(checkpoint, spec, [], threads=1)
