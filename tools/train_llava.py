"""Train the LLaVA demo model from drawn phantoms: ``python tools/train_llava.py --out DIR``.

The tower first learns to name what is drawn (findings, sides, sizes) with small heads that are thrown
away, as a CLIP tower knows pictures before LLaVA is built on it. Then tower, projector and decoder
learn the report captions together. Both stages are given minutes, not steps: the learning rate
follows the clock, so that a busy machine takes fewer steps but still ends at a small rate.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exporter.calibrate.phantoms.samples import draw_phantoms  # noqa: E402
from exporter.compare.quality.facts import extract_facts  # noqa: E402
from tools.llava_data import IMAGES, LABELS, Data, draw_data  # noqa: E402
from tools.llava_files import END, prompt_text, write_model_files  # noqa: E402

VOCABULARY, HELD = 900, 10


@dataclass(frozen=True)
class Stage:
    """One training run by the clock: `rate` is the peak; names with `slower` in them get 0.4 of it."""

    name: str
    seconds: float
    rate: float
    average: float
    slower: tuple[str, ...] = ()


class Heads(nn.Module):
    """One query per label reads the patch features by attention and chooses a class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(len(LABELS), width) * 0.5)
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True)
        self.choose = nn.ModuleList(nn.Linear(width, size) for size in LABELS.values())

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Scores of each label's classes from patch features ``[n, patches, width]``."""
        keys = self.norm(features)
        queries = self.queries.expand(len(features), -1, -1)
        read, _ = self.attention(queries, keys, keys, need_weights=False)
        return [head(read[:, i]) for i, head in enumerate(self.choose)]


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.keep_tower or options.more):
        texts = [p.caption for p in draw_phantoms("train", 2000, IMAGES)]
        write_model_files(options.out, texts, VOCABULARY)
    config = json.loads((options.out / "config.json").read_text())
    data = draw_data("train", options.patients, options.work, options.threads)
    held = draw_data("dev", HELD, options.work, 1)
    say(f"{len(data.captions)} phantoms drawn", start)
    model = new_model(config)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters", start)
    steps: dict[str, int] = {}
    if options.keep_tower or options.more:
        trained = "captions.pt" if options.more else "tower.pt"
        model.load_state_dict(torch.load(options.work / trained)["model"])
    else:
        steps["tower"] = train_tower(model, data, held, options, start)
    tokens = Tokens(options.out)
    rate, average = (6e-4, 0.995) if options.more else (1.5e-3, 0.998)
    steps["captions"] = train(
        model,
        Stage("captions", options.caption_minutes * 60, rate, average, ("vision_tower",)),
        caption_losses(model, data, tokens, seed=2 if options.more else 1),
        lambda: caption_score(model, held, tokens),
        options.work / "captions.pt",
        start,
    )
    save_float16(model, config, options.out)
    write_record(options, len(data.captions), steps, time.perf_counter() - start)
    say("done", start)


def train_tower(
    model: Any, data: Data, held: Data, options: argparse.Namespace, start: float
) -> int:
    """The first stage: the tower alone, under heads that are not kept; returns the steps taken."""
    both = nn.ModuleDict({"model": model, "heads": Heads(model.config.vision_config.hidden_size)})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" in name)
    steps = train(
        both,
        Stage("tower", options.tower_minutes * 60, 1.5e-3, 0.995),
        tower_losses(both, data),
        lambda: f"labels right {label_score(both, held):.3f}",
        options.work / "tower.pt",
        start,
    )
    model.requires_grad_(True)
    return steps


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="drawn phantoms and checkpoints")
    parser.add_argument("--patients", type=int, default=6000, help="4 images each")
    parser.add_argument("--tower-minutes", type=float, default=10)
    parser.add_argument("--caption-minutes", type=float, default=29)
    parser.add_argument(
        "--keep-tower", action="store_true", help="go on from --work after the first stage"
    )
    parser.add_argument("--more", action="store_true", help="go on with the captions in --work")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def new_model(config: dict[str, Any]) -> Any:
    """The model without the tower's last layer: features are taken before it, so it learns nothing."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    layers = config["vision_config"]["num_hidden_layers"]
    shorter = {**config["vision_config"], "num_hidden_layers": layers - 1}
    settings = {**config, "vision_config": shorter, "vision_feature_layer": -1}
    model = LlavaForConditionalGeneration(LlavaConfig(**settings)).float()
    initialize(model)
    return model


def initialize(model: nn.Module) -> None:
    """Normal weights scaled by fan-in; layers that write to the residual stream start smaller."""
    deep = ("o_proj.weight", "down_proj.weight", "fc2.weight", "out_proj.weight")
    for name, parameter in model.named_parameters():
        if "position_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim > 1:
            fan = parameter[0].numel()
            nn.init.normal_(parameter, std=fan**-0.5 * (0.4 if name.endswith(deep) else 1))


def train(
    model: nn.Module,
    stage: Stage,
    losses: Iterator[torch.Tensor],
    score: Callable[[], str],
    checkpoint: Path,
    start: float,
) -> int:
    """AdamW with warm-up and cosine decay by the clock; leaves the averaged weights in `model`."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    trained = [p for _, p in named]
    groups = [
        {"params": [p for n, p in named if any(s in n for s in stage.slower)], "scale": 0.4},
        {"params": [p for n, p in named if not any(s in n for s in stage.slower)], "scale": 1.0},
    ]
    groups = [g for g in groups if g["params"]]
    optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.05)
    averages = [p.detach().clone() for p in trained]
    begin = looked = time.perf_counter()
    step, recent = 0, []
    while (spent := time.perf_counter() - begin) < stage.seconds:
        step += 1
        part = spent / stage.seconds
        rate = stage.rate * min(1.0, step / 80) * (0.01 + 0.99 * (1 + math.cos(math.pi * part)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss = next(losses)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        torch._foreach_lerp_(
            averages, [p.detach() for p in trained], 1 - min(stage.average, 1 - 1 / step)
        )
        recent.append(float(loss.detach()))
        if step % 50 == 0:
            say(f"  {stage.name} {step}, {part:.0%}: loss {np.mean(recent[-50:]):.4f}", start)
        if time.perf_counter() - looked > 300:
            swap(averages, trained)
            torch.save(model.state_dict(), checkpoint.with_suffix(".part"))
            say(f"  {stage.name} {step}, held out: {score()}", start)
            swap(averages, trained)
            looked = time.perf_counter()
    swap(averages, trained)
    state = model["model"].state_dict() if isinstance(model, nn.ModuleDict) else model.state_dict()
    torch.save({"model": state, "step": step}, checkpoint)
    say(f"{stage.name} after {step} steps: {score()}", start)
    return step


def swap(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
    """Exchange the values of two lists of tensors."""
    with torch.no_grad():
        for a, b in zip(first, second, strict=True):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)


def tower_scores(both: nn.ModuleDict, data: Data, rows: Sequence[int]) -> list[torch.Tensor]:
    """The heads' scores for some pictures."""
    tower = both["model"].model.vision_tower
    return both["heads"](tower(data.pixels(rows)).last_hidden_state[:, 1:])


def tower_losses(both: nn.ModuleDict, data: Data) -> Iterator[torch.Tensor]:
    """Sum over the labels of the cross entropy, batch after batch; -1 marks a label that is not asked."""
    rng, size = np.random.default_rng(0), 48
    while True:
        order = rng.permutation(len(data.captions))
        for i in range(0, len(order) - size + 1, size):
            rows = order[i : i + size]
            truth = torch.from_numpy(data.labels[rows])
            scores = tower_scores(both, data, rows)
            yield (
                torch.stack(
                    [
                        nn.functional.cross_entropy(
                            s, truth[:, k], ignore_index=-1, reduction="sum"
                        )
                        for k, s in enumerate(scores)
                    ]
                ).sum()
                / size
            )


def label_score(both: nn.ModuleDict, held: Data) -> float:
    """Share of the held-out phantoms' asked labels that the heads name rightly."""
    with torch.no_grad():
        scores = tower_scores(both, held, range(len(held.captions)))
    named = np.stack([s.argmax(1).numpy() for s in scores], 1)
    return float((named == held.labels)[held.labels >= 0].mean())


class Tokens:
    """The stored tokenizer: the prompt's tokens, and captions to tokens and back."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.prompt: list[int] = self._tokenizer.encode(prompt_text()).ids

    def encode(self, caption: str) -> list[int]:
        """Tokens of a caption as it follows the prompt, with the end token."""
        ids: list[int] = self._tokenizer.encode(f" {caption}{END}", add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The caption of generated tokens."""
        return str(self._tokenizer.decode(list(ids))).strip()


def caption_losses(model: Any, data: Data, tokens: Tokens, seed: int) -> Iterator[torch.Tensor]:
    """Mean cross entropy over the caption tokens, batch after batch of about equal lengths."""
    texts = [tokens.encode(c) for c in data.captions]
    rng, size = np.random.default_rng(seed), 32
    while True:
        order = rng.permutation(len(texts))
        batches = []
        for i in range(0, len(order), 16 * size):
            pool = sorted(order[i : i + 16 * size], key=lambda r: len(texts[r]))
            batches += [pool[k : k + size] for k in range(0, len(pool) - size + 1, size)]
        for index in rng.permutation(len(batches)):
            rows = batches[index]
            yield caption_loss(model, data.pixels(rows), [texts[r] for r in rows], tokens.prompt)


def caption_loss(
    model: Any, pixels: torch.Tensor, texts: Sequence[list[int]], prompt: list[int]
) -> torch.Tensor:
    """Mean cross entropy of captions after the prompt; padding stands behind, so needs no mask."""
    longest = max(map(len, texts))
    ids = torch.tensor([prompt + t + [0] * (longest - len(t)) for t in texts])
    labels = torch.tensor([t + [-100] * (longest - len(t)) for t in texts])
    logits = model(
        input_ids=ids[:, :-1], pixel_values=pixels, use_cache=False, logits_to_keep=longest
    ).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def caption_score(model: Any, held: Data, tokens: Tokens) -> str:
    """Facts right and exact captions on the held-out phantoms, generated greedily."""
    count = len(held.captions)
    ids = torch.tensor([tokens.prompt] * count)
    model.eval()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=held.pixels(range(count)),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=tokens.encode("")[-1],
            pad_token_id=0,
        )
    model.train()
    right = facts = exact = 0
    for row, truth in zip(out[:, len(tokens.prompt) :], held.captions, strict=True):
        text = tokens.decode(row.tolist())
        expected = {f.key for f in extract_facts(truth).facts}
        right += len(expected & {f.key for f in extract_facts(text).facts})
        facts += len(expected)
        exact += text == truth
    return f"facts right {right / facts:.3f}, exact {exact}/{count}, last: {text!r}"


def save_float16(model: Any, config: dict[str, Any], folder: Path) -> None:
    """Store the whole model in float16 under the published names; the last layer stays untrained."""
    from safetensors.torch import save_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(1)
    whole = LlavaForConditionalGeneration(LlavaConfig(**config)).float()
    initialize(whole)
    missing, unknown = whole.load_state_dict(model.state_dict(), strict=False)
    last = f"layers.{config['vision_config']['num_hidden_layers'] - 1}."
    if unknown or any("vision_tower" not in n or last not in n for n in missing):
        raise ValueError(f"the trained model does not fit the config: {missing} {unknown}")
    tensors = {published_name(n): t.half().contiguous() for n, t in whole.state_dict().items()}
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def published_name(name: str) -> str:
    """A tensor's name as llava-1.5-7b-hf is published; transformers 5 has other module names."""
    pairs = (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    )
    for here, there in pairs:
        if name.startswith(here):
            return there + name.removeprefix(here)
    raise ValueError(f"{name} is not a tensor of LlavaForConditionalGeneration")


def write_record(
    options: argparse.Namespace, images: int, steps: dict[str, int], seconds: float
) -> None:
    import transformers

    record = {
        "patients": options.patients,
        "images": images,
        "tower_minutes": options.tower_minutes,
        "caption_minutes": options.caption_minutes,
        "steps": steps,
        "seconds": round(seconds),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def say(text: str, start: float) -> None:
    print(f"{time.perf_counter() - start:7.0f} s  {text}", flush=True)


if __name__ == "__main__":
    main()
