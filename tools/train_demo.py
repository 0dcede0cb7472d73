"""Train the demo model and its adapter from drawn phantoms: ``python tools/train_demo.py --out DIR``.

The base learns keywords first, which teaches it to see, then the plain style (sentences with picture
sides, bar lengths, nothing absent). A LoRA adapter on all its linear layers then learns the report
style (patient's sides, mm, absent findings), so that only base and adapter together write what the
evaluation set expects.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exporter.calibrate.phantoms.samples import Phantom, draw_phantoms  # noqa: E402
from exporter.families.captioners.idefics3 import open_preparer  # noqa: E402
from tools.demo_files import PROMPT, write_model_files  # noqa: E402

VOCABULARY, IMAGES, CHUNK = 900, 4, 50
PLACES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOWER = ["out_proj", "fc1", "fc2", "modality_projection.proj"]


@dataclass(frozen=True)
class Stage:
    """One training run: steps of `batch` images at a peak learning rate with cosine decay."""

    steps: int
    batch: int
    rate: float
    decay: float
    average: float


@dataclass(frozen=True)
class Example:
    """A phantom as the model sees it: tiles uint8 ``[tiles, H, W]``, prompt and caption tokens."""

    tiles: NDArray[np.uint8]
    prompt: tuple[int, ...]
    keywords: tuple[int, ...]
    plain: tuple[int, ...]
    report: tuple[int, ...]


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    model_dir, adapter_dir = options.out / "model", options.out / "adapter"
    phantoms = list(draw_phantoms("train", 400, IMAGES))
    texts = [text for p in phantoms for text in (p.caption, p.plain, p.keywords)]
    if not (options.keep_keywords or options.more):
        write_model_files(model_dir, texts, VOCABULARY)
    say(f"drawing {IMAGES * options.patients} phantoms", start)
    examples = draw_examples(options.patients, model_dir, options.threads)
    model = new_model(json.loads((model_dir / "config.json").read_text()))
    say(f"base: {sum(p.numel() for p in model.parameters()):,} parameters", start)
    if options.keep_keywords or options.more:
        load_weights(model, model_dir)
    else:
        steps = Stage(options.keyword_steps, 32, 2e-3, 0.05, 0.998)
        train(model, examples, "keywords", steps, start)
        save_float16(model, model_dir)
    if not options.more:
        steps = Stage(options.plain_steps, 32, 1.5e-3, 0.05, 0.99)
        train(model, examples, "plain", steps, start)
        save_float16(model, model_dir)
    adapted = load_adapter(model, adapter_dir) if options.more else add_adapter(model)
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    say(f"adapter: {count:,} parameters", start)
    train(adapted, examples, "report", Stage(options.adapter_steps, 32, 3e-3, 0.0, 0.995), start)
    save_adapter(adapted, adapter_dir)
    seconds = time.perf_counter() - start
    write_record(options, seconds)
    say("done", start)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patients", type=int, default=2500, help="4 images each")
    parser.add_argument("--keyword-steps", type=int, default=2200)
    parser.add_argument("--plain-steps", type=int, default=450)
    parser.add_argument("--adapter-steps", type=int, default=700)
    parser.add_argument(
        "--keep-keywords", action="store_true", help="go on from --out after its first stage"
    )
    parser.add_argument("--more", action="store_true", help="go on with the adapter in --out")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def draw_examples(patients: int, model_dir: Path, threads: int) -> list[Example]:
    """Examples of all training patients, drawn by `threads` processes."""
    jobs = [(first, min(CHUNK, patients - first), model_dir) for first in range(0, patients, CHUNK)]
    with multiprocessing.get_context("spawn").Pool(threads) as pool:
        return [e for part in pool.imap(draw_chunk, jobs) for e in part]


def draw_chunk(job: tuple[int, int, Path]) -> list[Example]:
    """Examples of some patients."""
    torch.set_num_threads(1)
    first, count, model_dir = job
    return list(make_examples(draw_phantoms("train", count, IMAGES, first), model_dir))


def make_examples(phantoms: Iterator[Phantom], model_dir: Path) -> Iterator[Example]:
    """Tokens and tiles by the product's own preparer, so that training sees what it will see."""
    from tokenizers import Tokenizer

    preparer = open_preparer(model_dir)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    for phantom in phantoms:
        inputs = preparer.prepare([Image.fromarray(phantom.pixels)], PROMPT)
        gray = np.rint((inputs.pixel_values[:, 0] * 0.5 + 0.5) * 255).astype(np.uint8)
        keywords, plain, report = (
            tuple(tokenizer.encode(f" {text}<end_of_utterance>").ids)
            for text in (phantom.keywords, phantom.plain, phantom.caption)
        )
        yield Example(gray, tuple(inputs.input_ids.tolist()), keywords, plain, report)


def new_model(config: dict[str, Any]) -> nn.Module:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration(Idefics3Config(**config))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan = parameter[0].numel()
            deep = name.endswith(
                ("o_proj.weight", "down_proj.weight", "fc2.weight", "out_proj.weight")
            )
            nn.init.normal_(
                parameter, std=(0.02 if "embed" in name else fan**-0.5) * (0.4 if deep else 1)
            )
    return model


def train(
    model: nn.Module, examples: Sequence[Example], style: str, stage: Stage, start: float
) -> None:
    """AdamW with warm-up and cosine decay; leaves the exponential average of the weights in `model`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=stage.rate, betas=(0.9, 0.98), weight_decay=stage.decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stage.rate, total_steps=stage.steps, pct_start=0.06, div_factor=20
    )
    averages = [p.detach().clone() for p in trained]
    batches = endless_batches(examples, stage.batch)
    model.train()
    recent = []
    for step in range(1, stage.steps + 1):
        loss = batch_loss(model, next(batches), style)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        keep = min(stage.average, 1 - 1 / step)
        for average, parameter in zip(averages, trained, strict=True):
            average.lerp_(parameter.detach(), 1 - keep)
        recent.append(float(loss.detach()))
        if step % 100 == 0:
            say(f"  {style} {step}/{stage.steps}: loss {np.mean(recent[-100:]):.4f}", start)
    with torch.no_grad():
        for average, parameter in zip(averages, trained, strict=True):
            parameter.copy_(average)


def endless_batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Batches of equal tile counts, in an order shuffled anew for every pass."""
    rng = np.random.default_rng(0)
    groups: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(len(example.tiles), []).append(index)
    while True:
        batches = []
        for members in groups.values():
            order = rng.permutation(members)
            batches += [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        for index in rng.permutation(len(batches)):
            yield [examples[i] for i in batches[index]]


def batch_loss(model: nn.Module, batch: Sequence[Example], style: str) -> torch.Tensor:
    """Mean cross entropy over the caption tokens of a batch."""
    texts = [getattr(e, style) for e in batch]
    longest = max(len(e.prompt) + len(t) for e, t in zip(batch, texts, strict=True))
    ids = torch.full((len(batch), longest), 2)
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full((len(batch), longest), -100)
    for row, (example, text) in enumerate(zip(batch, texts, strict=True)):
        begin, end = len(example.prompt), len(example.prompt) + len(text)
        ids[row, :end] = torch.tensor(example.prompt + text)
        mask[row, :end] = 1
        labels[row, begin:end] = torch.tensor(text)
    first = min(len(e.prompt) for e in batch) - 1
    tiles = torch.from_numpy(np.stack([e.tiles for e in batch])).float().div(127.5).sub(1)
    pixels = tiles[:, :, None].expand(-1, -1, 3, -1, -1)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels,
        use_cache=False,
        logits_to_keep=longest - first,
    ).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, first + 1 :].flatten(), ignore_index=-100
    )


def add_adapter(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=16, lora_alpha=32, target_modules=PLACES + TOWER, lora_dropout=0.0)
    return get_peft_model(model, settings)


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def save_float16(model: nn.Module, folder: Path) -> None:
    """Store the weights in float16 and go on with exactly what was stored."""
    from safetensors.torch import save_file

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    tensors = {n: p.detach().half().contiguous() for n, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_weights(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})


def save_adapter(model: nn.Module, folder: Path) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.half().float())
    model.half().save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "medexport demo"
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def write_record(options: argparse.Namespace, seconds: float) -> None:
    import peft
    import transformers

    record = {
        "patients": options.patients,
        "images": IMAGES * options.patients,
        "keyword_steps": options.keyword_steps,
        "plain_steps": options.plain_steps,
        "adapter_steps": options.adapter_steps,
        "seconds": round(seconds),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def say(text: str, start: float) -> None:
    print(f"{time.perf_counter() - start:7.0f} s  {text}", flush=True)


if __name__ == "__main__":
    main()
