"""`medexport run`: a bundle's model on images or texts, on onnxruntime. No torch, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.answers import Question, answer, show, split_labels
from exporter.cli.console import print_json
from exporter.core.cases import MODALITY, prompt_for
from exporter.core.errors import InputRefused, WrongUsage

if TYPE_CHECKING:
    from PIL.Image import Image

    from exporter.bundle.manifest import Manifest
    from exporter.runtimes.base import Captioner
    from exporter.runtimes.providers import Device

FILE = click.Path(path_type=Path)
# What each task's bundles are asked with, beside the inputs and the options of all (--threads, --verify,
# --json). Anything else would change nothing, and is refused.
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "caption": ("prompt", "modality", "max_new_tokens", "device", "runtime"),
    "zero-shot": ("labels", "labels_file", "template"),
    "segmentation": ("labels", "labels_file", "masks"),
    "text-encoder": (),
    "summary": ("prompt", "modality", "max_new_tokens"),
}
OF_ALL = ("threads",)
# What --device and --runtime are where they are not given.
DEFAULTS = {"device": "cpu", "runtime": "onnxruntime"}


@click.command()
@click.argument("bundle", type=FILE)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=FILE)
@click.option(
    "--prompt",
    help="Captions and summaries; {modality} in it stands for --modality. Default: the bundle's own.",
)
@click.option(
    "--modality", metavar="TEXT", help="What the images are (ct), for a prompt with {modality}."
)
@click.option(
    "--labels",
    metavar="TEXT,TEXT",
    help="What a zero-shot or segmentation model seeks. Zero-shot: two or more, since most models share "
    "100 % among them; one alone ranks several images, without percentages.",
)
@click.option("--labels-file", type=FILE, metavar="FILE", help="The same, one a line.")
@click.option("--template", help="Text around a label, with one {}; default: the model's own.")
@click.option("--masks", type=FILE, metavar="DIR", help="Where a segmentation model writes masks.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Default: the bundle's own.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Default: the cores this process may use."
)
@click.option(
    "--device",
    type=click.Choice(("cpu", "cuda")),
    default=DEFAULTS["device"],
    show_default=True,
    help="Of --runtime onnxruntime. cuda: the first NVIDIA GPU; nothing falls back to the CPU.",
)
@click.option(
    "--runtime",
    type=click.Choice(("onnxruntime", "tensorrt")),
    default=DEFAULTS["runtime"],
    show_default=True,
    help="tensorrt: engines of `medexport engine build` on the first GPU; where they are refused the "
    "graph on the CPU, said aloud.",
)
@click.option(
    "--verify/--no-verify", "check", default=True, help="Check all files first (default)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def run(bundle: Path, check: bool, as_json: bool, **options: Any) -> None:
    """Run BUNDLE on images (PNG, JPEG, DICOM) or, where its model reads text, on text files.

    Captioners answer with a caption, zero-shot models with the probability of each label,
    segmentation models with masks, text models with vectors, scores, entities or summaries. An option
    that the bundle's task does not know is refused.
    """
    from exporter.bundle.manifest import read_manifest
    from exporter.bundle.verify import verify_bundle

    if (options["runtime"], options["device"]) == ("tensorrt", "cuda"):
        raise click.UsageError(
            "--runtime tensorrt uses the GPU by itself and, where its engines are refused, the graph on "
            "the CPU: leave out --device cuda, or --runtime tensorrt for onnxruntime on the GPU alone"
        )
    manifest = verify_bundle(bundle).manifest if check else read_manifest(bundle)
    usage = manifest.usage
    refuse_options(bundle, usage.task, options)
    where = _Where(options["threads"], options["device"], options["runtime"])
    prompt = usage.prompt if options["prompt"] is None else options["prompt"]
    asked = Question(
        inputs=options["inputs"],
        labels=split_labels(options["labels"], options["labels_file"]),
        template=options["template"],
        masks=options["masks"],
        # A prompt that the task does not read may hold anything.
        prompt=fill_prompt(prompt, options["modality"]) if "prompt" in OPTIONS[usage.task] else "",
        max_new_tokens=options["max_new_tokens"] or usage.max_new_tokens,
    )
    if usage.task == "caption":
        _caption(bundle, manifest, asked, where, as_json)
        return
    found = answer(bundle / "model", usage.task, asked, where.threads)
    if as_json:
        print_json({"bundle": manifest.name, "digest": manifest.digest, **found})
    else:
        show(usage.task, found)


def refuse_options(bundle: Path, task: str, options: Mapping[str, Any]) -> None:
    """Refuse options that were given and do nothing for `task`.

    Raises `WrongUsage` naming them, `InputRefused` for a task of a newer medexport.
    """
    if task not in OPTIONS:
        raise InputRefused(f"{bundle}: task {task!r}; use the medexport that made this bundle")
    given = [n for n, v in options.items() if v is not None and v != DEFAULTS.get(n)]
    known = ("inputs", *OF_ALL, *OPTIONS[task])
    wrong = [_option(name) for name in given if name not in known]
    if wrong:
        takes = ", ".join(map(_option, OPTIONS[task])) or "no option of its own"
        raise WrongUsage(
            f"{', '.join(wrong)}: without a use here; this bundle's task is {task}, which takes {takes}: "
            "leave the rest out"
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def fill_prompt(prompt: str, modality: str | None) -> str:
    """The prompt with the modality in its place. Raises `WrongUsage` where one has no other."""
    if MODALITY in prompt and not (modality or "").strip():
        raise WrongUsage(
            f"the prompt {prompt!r} names the modality, and none was given; give --modality TEXT "
            "(ct, mri, x-ray), or a --prompt without it"
        )
    if modality is not None and MODALITY not in prompt:
        raise WrongUsage(
            f"--modality: the prompt {prompt!r} has no place for it; leave it out, or give a --prompt "
            f"with {MODALITY}"
        )
    return prompt_for(prompt, modality or "")


@dataclass(frozen=True)
class _Where:
    """What a captioner runs on."""

    threads: int | None
    device: Device
    runtime: str


@contextmanager
def _open(bundle: Path, where: _Where) -> Iterator[tuple[Captioner, dict[str, str]]]:
    """The captioner, and what --json says of its runtime. A fallback is announced on stderr."""
    from exporter.runtimes.ort import OrtCaptioner

    if where.runtime == "onnxruntime":
        made = OrtCaptioner(bundle / "model", threads=where.threads, device=where.device)
        yield made, {"runtime": "onnxruntime"}
        return
    from exporter.engines.site import open_captioner

    def announce(line: str) -> None:
        click.echo(f"medexport: {line}", err=True)

    with open_captioner(bundle, threads=where.threads, announce=announce) as opened:
        yield opened.captioner, {"runtime": opened.runtime, "fallback": opened.fallback}


def _caption(
    bundle: Path, manifest: Manifest, asked: Question, where: _Where, as_json: bool
) -> None:
    from exporter.runtimes.images import open_image

    pictures = [open_image(path) for path in asked.inputs]
    with _open(bundle, where) as (captioner, runtime):
        rows = _captions(captioner, asked, pictures, as_json)
    if as_json:
        head = {"bundle": manifest.name, "digest": manifest.digest, "prompt": asked.prompt}
        print_json(head | runtime | {"results": rows})


def _captions(
    captioner: Captioner, asked: Question, pictures: Sequence[Image], as_json: bool
) -> list[dict[str, Any]]:
    rows = []
    for path, picture in zip(asked.inputs, pictures, strict=True):
        caption = captioner.caption(picture, asked.prompt, asked.max_new_tokens)
        timing = caption.timing
        if not as_json:
            name = f"{path}: " if len(asked.inputs) > 1 else ""
            click.echo(name + caption.text + ("" if caption.stopped else "  [cut: length limit]"))
        rows.append(
            {
                "image": str(path), "caption": caption.text, "tokens": list(caption.tokens),
                "stopped": caption.stopped, "prompt_tokens": caption.prompt_tokens,
                "seconds": {"first_token": timing.first_token, "total": timing.total},
            }
        )  # fmt: skip
    return rows


COMMANDS = (run,)
