"""What tests/support/task_cases.py holds BERT, BiomedCLIP and MedCLIP against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from exporter.families.base import Feed
from tests.support.task_inputs import SIZES, TEXTS, noise
from tests.support.tiny_biomedclip import plain_biomedclip
from tests.support.tiny_medclip import plain_medclip
from tests.support.tiny_medfilip import plain_medfilip

Arrays = Mapping[str, NDArray[Any]]
Pairs = Iterator[tuple[Arrays, Arrays]]
HARD = ("Café  au\tLAIT's 19 mm [SEP] é", "")


def bert_tokenizer(folder: Path, preparer: Any) -> Pairs:
    """A text preparer against transformers' tokenizer, its character offsets too."""
    yield from _tokens(folder, preparer, types=True)


def distilbert_tokenizer(folder: Path, preparer: Any) -> Pairs:
    """The same for a model without kinds of token."""
    yield from _tokens(folder, preparer, types=False)


def _tokens(folder: Path, preparer: Any, *, types: bool, limit: int | None = None) -> Pairs:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    limit = limit or tokenizer.model_max_length
    settings = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "np"}
    for texts in (TEXTS, TEXTS[:1], HARD):
        found = dict(tokenizer(list(texts), return_token_type_ids=types, **settings))
        yield preparer.texts(texts), found
    for text in (*TEXTS, *HARD) if hasattr(preparer, "tokens") else ():
        theirs = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)
        places = np.array(theirs["offset_mapping"])
        yield {"offsets": np.array(preparer.tokens(text))}, {"offsets": places}


def open_clip_steps(folder: Path, preparer: Any) -> Pairs:
    """BiomedCLIP's preparer against torchvision's rules, in Pillow and torch."""
    for size in SIZES:
        for picture in (noise(*size), noise(*size, gray=True)):
            pixels = preparer.images([picture])["pixel_values"]
            yield {"pixels": pixels[0]}, {"pixels": _open_clip(picture, pixels.shape[-1])}
    yield from _tokens(folder, preparer, types=False, limit=24)


def _open_clip(picture: Image.Image, side: int) -> NDArray[Any]:
    # The shorter edge becomes the side, the longer one is cut to a whole number of pixels.
    width, height = picture.size
    if width < height:
        width, height = side, int(side * height / width)
    else:
        width, height = int(side * width / height), side
    large = picture.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
    # The middle, where Python's round puts it.
    top, left = round((height - side) / 2.0), round((width - side) / 2.0)
    levels = torch.from_numpy(np.array(large)[top : top + side, left : left + side]).float() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((levels - mean) / std).permute(2, 0, 1).numpy()


def medclip_steps(folder: Path, preparer: Any) -> Pairs:
    """MedCLIP's preparer against the steps of its code in Pillow."""
    for size in SIZES:
        for picture in (noise(*size), noise(*size, gray=True)):
            pixels = preparer.images([picture])["pixel_values"]
            yield {"pixels": pixels[0]}, {"pixels": _medclip(picture, pixels.shape[-1])}
    yield from _tokens(folder, preparer, types=False)


def _medclip(picture: Image.Image, side: int) -> NDArray[Any]:
    width, height = picture.size
    square = max(side, width, height)
    canvas = Image.new("L", (square, square), 0)
    canvas.paste(picture, (int((square - width) / 2), int((square - height) / 2)))
    small = canvas.resize((side, side), Image.Resampling.BICUBIC)
    levels = torch.from_numpy(np.array(small)).float() / 255
    normal = (levels - 0.5862785803043838) / 0.27950088968644304
    return normal.expand(3, side, side).numpy()


def biomedclip_outputs(folder: Path) -> Callable[[str, Feed], Arrays]:
    """transformers' ViT and BERT with the weights of a folder that `write_tiny_biomedclip` wrote."""
    return _outputs(plain_biomedclip(folder), 2.5)


def medclip_outputs(folder: Path) -> Callable[[str, Feed], Arrays]:
    """The published code's arithmetic, whose temperature is kept below 100."""
    return _outputs(plain_medclip(folder), 4.6052)


def medfilip_steps(folder: Path, preparer: Any) -> Pairs:
    """MedFILIP's preparer against the steps of its code in Pillow and torch."""
    from transformers import AutoTokenizer

    for size in SIZES:
        for picture in (noise(*size), noise(*size, gray=True)):
            pixels = preparer.images([picture])["pixel_values"]
            side = (pixels.shape[-1], pixels.shape[-1])
            levels = torch.from_numpy(np.array(picture.convert("L"))).float()[None, None] / 255
            small = torch.nn.functional.interpolate(
                levels, side, mode="bilinear", antialias=True, align_corners=False
            )
            normal = ((small - 0.47) / 0.3).expand(1, 3, *side)
            yield {"pixels": pixels}, {"pixels": normal.numpy()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="np")
    yield preparer.texts(TEXTS), dict(found)


def medfilip_outputs(folder: Path) -> Callable[[str, Feed], Arrays]:
    """The published code's arithmetic with transformers' ResNet."""
    return _outputs(plain_medfilip(folder), 2.625)


def _outputs(model: Any, scale: float) -> Callable[[str, Feed], Arrays]:
    def outputs(graph: str, feed: Feed) -> Arrays:
        tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
        with torch.inference_mode():
            if "pixel_values" in tensors:
                return {"image_embeds": model.image(tensors["pixel_values"]).numpy()}
            embeds = model.text(tensors["input_ids"], tensors["attention_mask"]).numpy()
        return {"text_embeds": embeds, "logit_scale": np.exp(np.float32(scale))}

    return outputs
