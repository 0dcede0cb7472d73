"""Proves a merge against peft: the merged model computes what base and un-merged adapter compute.

Two proofs. On logits (the outputs of all graphs, where a model has no captions): base plus adapter in
float32 against the merged float16 weights computed in float32, so that nothing but the rounding of the
weights separates them. On weights: every merged
tensor lies within half a float16 step of peft's own float32 merge. A model over `limit_bytes` is
proven on weights only, layer by layer (`exporter.adapters.layerwise`), and the result says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from exporter.adapters.base import BaseModel, open_base
from exporter.adapters.layerwise import prove_layers
from exporter.adapters.probes import Outputs, Probe, agreement, difference, probe_for
from exporter.adapters.recipe import Recipe, open_recipe
from exporter.adapters.rewrite import write_current
from exporter.adapters.rounding import check_rounded, perturb
from exporter.core.errors import InputRefused, ParityFailed, require
from exporter.core.tensors import FLOATS, Checkpoint, total_bytes
from exporter.families.checkpoints import published_config
from exporter.families.table import task_family_of
from exporter.families.torch_classes import is_own
from exporter.runtimes.quiet import quiet_transformers
from exporter.runtimes.torch_reference import load_model, model_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The rounding noise is measured with this many random draws; merged logits may deviate this many
# times as much as the largest of them (the maximum of another draw of the same size exceeds the
# largest of three by a few tens of per cent, not fourfold; a wrong scaling does, or the weights show it).
DRAWS, MARGIN = 3, 4.0
# Noise below this is float32 arithmetic itself (other order of sums), not the weights' rounding.
FLOAT32_NOISE = 2e-6
DEFAULT_LIMIT = 4 << 30


class LogitProof(msgspec.Struct, frozen=True):
    """The result: errors are the largest absolute difference of logits over the largest absolute logit;
    for `method` 'outputs' that of each output of each graph, and the largest of all counts.

    The logit fields are null for `method` 'weights', and those of tokens for 'outputs'.
    `weight_steps` is the largest distance from peft's merge in float16 steps (0.5 is pure rounding).
    """

    method: str
    statement: str
    tensors: int
    weight_steps: float
    seed: int
    logit_error: float | None = None
    tolerance: float | None = None
    top1_agreement: float | None = None
    base_difference: float | None = None
    positions: int = 0
    image_tiles: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for canonical JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def prove_logits(
    checkpoint: Path,
    adapters: Sequence[Path],
    merged: Path,
    *,
    limit_bytes: int = DEFAULT_LIMIT,
    seed: int = 0,
) -> LogitProof:
    """Compare `merged` with `checkpoint` and the un-merged `adapters` in torch and peft.

    `limit_bytes`: largest float32 size of the model for which logits are computed. Raises
    `ParityFailed` when the merged model is another one or equals the base, `InputRefused` for
    unacceptable folders, `EnvironmentLacks` without torch, transformers or peft.
    """
    for module in ("transformers", "peft"):
        require(module, "build")
    if not adapters:
        raise InputRefused(f"{merged}: nothing to prove without an adapter; expected at least one")
    recipe = open_recipe(open_base(checkpoint), adapters)
    stored = Checkpoint.open(merged)
    if 2 * total_bytes(stored.tensors.values()) > limit_bytes:
        steps = prove_layers(recipe, stored)
        return LogitProof(
            method="weights",
            statement=f"model larger than {limit_bytes} bytes in float32: weights compared with peft's "
            "merge layer by layer, logits not computed",
            tensors=len(stored.tensors),
            weight_steps=steps,
            seed=seed,
        )
    with quiet_transformers():
        return _prove_whole(recipe, merged, stored, seed)


def _prove_whole(recipe: Recipe, merged: Path, stored: Checkpoint, seed: int) -> LogitProof:
    base, probe = recipe.base, probe_for(recipe.base.config, seed)
    with tempfile.TemporaryDirectory() as work:
        adapted, reference = _adapter_outputs(recipe, Path(work), probe)
    steps = check_rounded(reference, stored, base)
    noise = _rounding_noise(reference, probe, adapted, seed)
    tolerance = MARGIN * max(noise, FLOAT32_NOISE)
    ours = probe.run(_load(merged))
    error = difference(ours, adapted)
    if not error <= tolerance:
        raise ParityFailed(
            f"{merged}: merged {probe.kind} differ from the adapter's by {error:.3g} of the largest; expected "
            f"at most {tolerance:.3g}, what rounding the weights to float16 explains; report this merge"
        )
    plain = _load_base(base)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(parameter.half().float())
    moved = difference(ours, probe.run(plain))
    if not moved > 0:
        raise ParityFailed(
            f"{merged}: merged {probe.kind} equal the base's; expected the adapter to change them: check "
            "that the adapter is the trained one"
        )
    statement = (
        f"merged {probe.kind} equal the un-merged adapter's within {tolerance:.2g} (rounding of the weights "
        f"to float16), and differ from the base's by {moved:.2g}"
    )
    if probe.kind == "logits" and not probe.tiles:
        statement += "; text only: this family has no image path here"
    return LogitProof(
        method=probe.kind,
        statement=statement,
        tensors=len(stored.tensors),
        weight_steps=steps,
        seed=seed,
        logit_error=error,
        tolerance=tolerance,
        top1_agreement=agreement(ours, adapted),
        base_difference=moved,
        positions=ours["logits"].shape[1] if probe.kind == "logits" else 0,
        image_tiles=probe.tiles,
    )


def _load_base(base: BaseModel) -> PreTrainedModel:
    """The base in float32; one that transformers has no class for, through the newest names."""
    if _known_class(base.config):
        tensors = _float_tensors(base)
        own: PreTrainedModel = model_of(base.folder, base.config, tensors)
        return own
    if base.config["model_type"] == published_config(base.folder)["model_type"]:
        return _load(base.folder)
    from transformers import AutoConfig, AutoModelForImageTextToText

    settings = dict(base.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    tensors = _float_tensors(base)
    kind = AutoModelForImageTextToText._model_mapping[type(config)]
    model: PreTrainedModel = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def _known_class(config: dict[str, Any]) -> bool:
    """Whether the family names the torch class of a parsed config.json alone: transformers has no
    class for it, or none that its classes for text with images would find.
    """
    return is_own(config) or task_family_of(config) is not None


def _float_tensors(base: BaseModel) -> dict[str, torch.Tensor]:
    """The base's weights in float32, without the counters and masks that are no weights."""
    names = [n for n, info in base.tensors.tensors.items() if info.dtype in FLOATS]
    return {n: torch.from_numpy(base.tensors.float32(n)) for n in names}


def _load(folder: Path) -> PreTrainedModel:
    """The model of a checked folder in float32. Its config was read by `open_base` or written by us."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    settings = published_config(folder)
    if _known_class(settings):
        own: PreTrainedModel = load_model(folder, settings)
        return own
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    known = type(config) in AutoModelForImageTextToText._model_mapping
    loader: Any = AutoModelForImageTextToText if known else AutoModelForCausalLM
    model: PreTrainedModel = loader.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="eager",
    )
    return model.eval()


def _adapter_outputs(recipe: Recipe, work: Path, probe: Probe) -> tuple[Outputs, PreTrainedModel]:
    """Outputs with the last adapter un-merged (those before it merged by peft), and peft's float32 merge."""
    from peft import PeftModel

    model: Any = _load_base(recipe.base)
    _separate_head(model)
    outputs: Outputs = {}
    for index, (adapter, plan) in enumerate(recipe.adapters):
        folder = work / str(index)
        write_current(adapter, plan, recipe.base, folder)
        with_adapter = PeftModel.from_pretrained(model, str(folder)).eval()
        if index + 1 == len(recipe.adapters):
            # The model inside, whose layers peft has replaced: it has the methods of its own class.
            outputs = probe.run(with_adapter.get_base_model())
        model = with_adapter.merge_and_unload()
    return outputs, model


def _separate_head(model: Any) -> None:
    # Peft adds an embedding's delta to the shared tensor when it merges, and so to the head, which
    # the un-merged adapter leaves alone. A head of its own says the same before and is safe after.
    head = model.get_output_embeddings()
    if head is None:
        return
    embedding = model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _rounding_noise(reference: PreTrainedModel, probe: Probe, adapted: Outputs, seed: int) -> float:
    """Largest output error of `DRAWS` random changes of peft's merge within float16's rounding."""
    worst = 0.0
    exact = {name: value.detach().clone() for name, value in reference.named_parameters()}
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(seed * DRAWS + draw + 1)
        with torch.no_grad():
            for name, value in reference.named_parameters():
                value.copy_(perturb(exact[name], generator))
        worst = max(worst, difference(probe.run(reference), adapted))
    return worst
