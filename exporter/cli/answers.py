"""What `medexport run` prints for bundles that do other things than caption. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.core.errors import InputRefused, WrongUsage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exporter.runtimes.graphs import OrtGraphs

MAX_TEXT = 1 << 20
COMMAS = re.compile("[,，、]")
BEST = 5
# How a zero-shot model's probabilities come about: without or with a bias of the score. One label that
# shares with no other has none: it would be 1 on every image.
SHARED, ALONE, RANKED = "all labels together", "each label by itself", "images ranked by cosine"


@dataclass(frozen=True)
class Question:
    """What is asked of a bundle. `labels` of zero-shot and segmentation models, `prompt` of summaries.

    `template`: text around a label; ``{}`` alone gives the label as it is. `masks`: folder for masks.
    """

    inputs: tuple[Path, ...]
    labels: tuple[str, ...] = ()
    template: str | None = None
    masks: Path | None = None
    prompt: str = ""
    max_new_tokens: int = 0


def answer(model_dir: Path, task: str, asked: Question, threads: int | None) -> dict[str, Any]:
    """Run a bundle's ``model/`` folder on the inputs; the document that --json prints.

    Raises `WrongUsage` when the task needs what was not given, `InputRefused` on bad inputs.
    """
    from exporter.runtimes.graphs import OrtGraphs

    answers: Mapping[str, Callable[[OrtGraphs, Question], dict[str, Any]]] = {
        "zero-shot": _rank_labels,
        "segmentation": _draw_masks,
        "text-encoder": _encode,
        "summary": _summarise,
    }
    if task not in answers:
        raise InputRefused(f"{model_dir}: task {task!r}; use the medexport that made this bundle")
    if task in ("zero-shot", "segmentation") and not asked.labels:
        raise WrongUsage(f"this is a {task} model: give --labels TEXT,TEXT or --labels-file FILE")
    return answers[task](OrtGraphs(model_dir, threads=threads), asked)


def split_labels(given: str | None, file: Path | None) -> tuple[str, ...]:
    """Labels from a list with commas, Chinese and Japanese ones too, or one a line from a file.

    Raises `WrongUsage`, `InputRefused`.
    """
    if given and file:
        raise WrongUsage("give --labels or --labels-file, not both")
    parts = _read_text(file).splitlines() if file else COMMAS.split(given or "")
    labels = tuple(dict.fromkeys(p.strip() for p in parts if p.strip()))
    if (given or file) and not labels:
        raise WrongUsage("no label in what was given; expected --labels TEXT,TEXT")
    return labels


def show(task: str, found: Mapping[str, Any]) -> None:
    """Print an answer for people, a line or a few for each input."""
    rows = found["results"]
    if found.get("scoring") == RANKED:
        _show_ranking(found)
        return
    for row in rows:
        name = f"{row['input']}: " if len(rows) > 1 else ""
        if task == "zero-shot":
            best = sorted(row["scores"].items(), key=lambda item: -item[1])[:BEST]
            # What is scored by itself can be far below a percent: three digits tell labels apart.
            style = ".1f" if found["scoring"] == SHARED else ".3g"
            click.echo(name + ", ".join(f"{label} {100 * score:{style}}%" for label, score in best))
        elif task == "segmentation":
            for label, mask in row["masks"].items():
                where = f"  {mask['file']}" if mask["file"] else ""
                click.echo(f"{name}{label}: {mask['share']:.1%} of the image{where}")
        elif "summary" in row:
            click.echo(name + row["summary"] + ("" if row["stopped"] else "  [cut: length limit]"))
        else:
            click.echo(name + _encoded(row))
    if task == "zero-shot" and found["scoring"] == ALONE:
        click.echo("(each label scored by itself: these probabilities do not add up to 1)")
    if task == "zero-shot" and len(rows) > 1:
        for label, order in found["retrieval"].items():
            click.echo(f"best for '{label}': {order[0]}")


def _show_ranking(found: Mapping[str, Any]) -> None:
    (label,) = found["retrieval"]
    click.echo(f"best for '{label}', by cosine (one label alone has no probability):")
    ranked = sorted(found["results"], key=lambda row: -row["cosines"][label])
    for place, row in enumerate(ranked, 1):
        click.echo(f"{place}. {row['input']}: {row['cosines'][label]:.4f}")


def _encoded(row: Mapping[str, Any]) -> str:
    if "entities" in row:
        return ", ".join(f"{e['kind']} '{e['text']}'" for e in row["entities"]) or "no entity"
    if "scores" in row:
        best = sorted(row["scores"].items(), key=lambda item: -item[1])[:BEST]
        return ", ".join(f"{label} {score:.1%}" for label, score in best)
    values = row["embedding"]
    head = ", ".join(f"{v:.4f}" for v in values[:4])
    return f"vector of {len(values)} values [{head}, ...]; --json prints all"


def _rank_labels(graphs: OrtGraphs, asked: Question) -> dict[str, Any]:
    """Probabilities of the labels for each image, and the images in order for each label.

    One label is no question to a softmax: it ranks images, without probabilities. Raises `WrongUsage`
    where there is one image too.
    """
    from exporter.runtimes.images import open_image
    from exporter.runtimes.tasks.zero_shot import ZeroShot, label_scores, label_texts

    model = ZeroShot(graphs)
    texts = model.embed_texts(label_texts(asked.labels, asked.template or model.template))
    shared = model.logit_bias is None
    if shared and len(asked.labels) < 2 and len(asked.inputs) < 2:
        raise WrongUsage(
            f"one label, '{asked.labels[0]}': this model shares 100 % among the labels, and one alone "
            "always gets all of it; give two or more to choose from (its opposite, say), or several "
            "images to be ranked"
        )
    images = model.embed_images([open_image(path) for path in asked.inputs])
    scores = label_scores(images, texts, model.logit_scale, model.logit_bias)
    cosines = images @ texts.T
    names = [str(path) for path in asked.inputs]
    scoring = ALONE if not shared else SHARED if len(asked.labels) > 1 else RANKED
    results = [
        {"input": name}
        | ({"scores": _by_label(asked, row)} if scoring != RANKED else {})
        | {"cosines": _by_label(asked, cosine)}
        for name, row, cosine in zip(names, scores, cosines, strict=True)
    ]
    order = (-cosines).argsort(axis=0, kind="stable").T
    retrieval = {
        label: [names[i] for i in row.tolist()]
        for label, row in zip(asked.labels, order, strict=True)
    }
    return {
        "template": asked.template or model.template,
        "scoring": scoring,
        "results": results,
        "retrieval": retrieval,
    }


def _by_label(asked: Question, values: NDArray[Any]) -> dict[str, float]:
    return dict(zip(asked.labels, values.tolist(), strict=True))


def _draw_masks(graphs: OrtGraphs, asked: Question) -> dict[str, Any]:
    """The mask of each label on each image; written as PNG of the image's size with --masks.

    Nothing is written before all masks are there and all names are free.
    """
    from exporter.runtimes.images import open_image
    from exporter.runtimes.tasks.segment import Segmenter, resized

    segmenter = Segmenter(graphs)
    names = mask_files(asked.masks, asked.inputs, len(asked.labels)) if asked.masks else None
    seen = []
    for path in asked.inputs:
        image = open_image(path)
        seen.append((image.size, segmenter.masks(image, asked.labels)))
    if asked.masks:
        asked.masks.mkdir(parents=True, exist_ok=True)
    results = []
    for position, (path, (size, masks)) in enumerate(zip(asked.inputs, seen, strict=True)):
        row: dict[str, Any] = {}
        for number, (label, mask) in enumerate(zip(asked.labels, masks, strict=True)):
            inside = resized(mask, size) >= 0.5
            file = names and names[position][number]
            if file:
                _write_mask(file, inside)
            row[label] = {"share": float(inside.mean()), "file": str(file) if file else None}
        results.append({"input": str(path), "masks": row})
    return {"results": results}


def mask_files(folder: Path, inputs: Sequence[Path], labels: int) -> list[list[Path]]:
    """A file for each label of each image: IMAGE-01.png, or 01-IMAGE-01.png by the image's position
    where images of several folders have one name.

    Raises `InputRefused` when one exists already, or `folder` is none.
    """
    if folder.exists() and not folder.is_dir():
        raise InputRefused(f"{folder}: is a file; give --masks a folder")
    # A disk may not tell a.png from A.png.
    same = len({path.stem.casefold() for path in inputs}) < len(inputs)
    heads = [f"{i:02d}-" if same else "" for i in range(1, len(inputs) + 1)]
    files = [
        [folder / f"{head}{path.stem}-{number:02d}.png" for number in range(1, labels + 1)]
        for head, path in zip(heads, inputs, strict=True)
    ]
    for file in (file for of_image in files for file in of_image):
        if file.exists():
            raise InputRefused(f"{file}: exists; remove it or give another --masks folder")
    return files


def _write_mask(file: Path, inside: NDArray[np.bool_]) -> None:
    import numpy as np
    from PIL import Image

    with file.open("xb") as stream:
        Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(stream, format="PNG")


def _encode(graphs: OrtGraphs, asked: Question) -> dict[str, Any]:
    """Sentence vector, class scores or entities of each text, by the model's head."""
    import numpy as np

    from exporter.runtimes.tasks.encode import TextEncoder

    encoder = TextEncoder(graphs)
    results: list[dict[str, Any]] = []
    for path in asked.inputs:
        text = _read_text(path)
        row: dict[str, Any] = {"input": str(path)}
        if encoder.head == "none":
            row["embedding"] = encoder.embed([text])[0].tolist()
        elif encoder.head == "class":
            logits = encoder.logits([text])[0].astype(np.float64)
            weights = np.exp(logits - logits.max())
            shares = (weights / weights.sum()).tolist()
            row["scores"] = dict(zip(encoder.labels, shares, strict=True))
        else:
            row["entities"] = [
                {"kind": e.kind, "start": e.start, "end": e.end, "text": text[e.start : e.end]}
                for e in encoder.entities(text)
            ]
        results.append(row)
    return {"head": encoder.head, "results": results}


def _summarise(graphs: OrtGraphs, asked: Question) -> dict[str, Any]:
    from exporter.runtimes.tasks.summarise import Summariser

    summariser = Summariser(graphs)
    results = []
    for path in asked.inputs:
        said = summariser.summarise(asked.prompt + _read_text(path), asked.max_new_tokens)
        results.append(
            {
                "input": str(path),
                "summary": said.text,
                "tokens": list(said.tokens),
                "stopped": said.stopped,
                "seconds": {"first_token": said.timing.first_token, "total": said.timing.total},
            }
        )
    return {"prompt": asked.prompt, "results": results}


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise InputRefused(f"{path}: no such file; expected a text in UTF-8")
    if path.stat().st_size > MAX_TEXT:
        raise InputRefused(f"{path}: {path.stat().st_size} bytes; expected at most {MAX_TEXT}")
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputRefused(f"{path}: no UTF-8 text ({error.reason}); convert it first") from error
    if not text:
        raise InputRefused(f"{path}: empty; expected a text")
    return text
