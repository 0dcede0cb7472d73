"""The table of tests/contract/test_tasks.py: one row per kind of model that does not caption.

A row writes a tiny random model folder as it is published and says what the contract needs to know of
it. A new row is tested by being there; a new task also has a function in `tests.support.task_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.families.base import Feed
from exporter.runtimes.graphs import Graphs
from tests.support.bert_references import (
    bert_tokenizer,
    biomedclip_outputs,
    distilbert_tokenizer,
    medclip_outputs,
    medclip_steps,
    medfilip_outputs,
    medfilip_steps,
    open_clip_steps,
)
from tests.support.plain_cris import plain_cris_outputs
from tests.support.task_inputs import (
    INPUTS,
    SIZES,
    TEXTS,
    noise,
    padded_encoder,
    padded_summary,
    padded_texts,
)
from tests.support.tiny_bert import LABELS, write_tiny_bert
from tests.support.tiny_biomedclip import write_tiny_biomedclip
from tests.support.tiny_biomedclipseg import plain_outputs, write_tiny_biomedclipseg
from tests.support.tiny_chinese_clip import chinese_processor, write_tiny_chinese_clip
from tests.support.tiny_clip import write_tiny_chexzero, write_tiny_clip
from tests.support.tiny_clipseg import write_tiny_clipseg
from tests.support.tiny_cris import write_tiny_cris
from tests.support.tiny_medbridge import (
    focal_processor,
    medbridge_outputs,
    write_tiny_medbridge,
)
from tests.support.tiny_medclip import write_tiny_medclip
from tests.support.tiny_medfilip import write_tiny_medfilip
from tests.support.tiny_siglip import siglip_processor, write_tiny_siglip
from tests.support.tiny_t5 import write_tiny_t5

Arrays = Mapping[str, NDArray[Any]]
# What ours gives, and what the library or a plain reference gives: equal within `slack`.
Pairs = Iterator[tuple[Arrays, Arrays]]


@dataclass(frozen=True)
class TaskCase:
    """One row.

    `write` writes the folder; `inputs`: a name of `task_inputs.INPUTS`, whose feeds have at least two
    shapes for each graph; `prepared` compares the preparer of a merged folder with transformers' own
    processor, or with a plain reference, and `slack` is what they may differ by; `error`: the
    relative error (of the whole output, by the norm) that a scheme may have on these random weights;
    `padded` gives inputs alone and padded (None where texts are never padded); `targets`: modules
    that LoRA is put on, empty where the family has no adapter; `reference`: outputs of another
    implementation of the published model for the feeds, by graph, where torch_outputs is our own
    class.
    """

    name: str
    write: Callable[[Path], Path]
    inputs: str
    prepared: Callable[[Path, Any], Pairs]
    error: Mapping[str, float]
    slack: float = 0.0
    padded: Callable[[Graphs], Iterator[tuple[str, Feed, Feed]]] | None = padded_texts
    targets: tuple[str, ...] = ()
    reference: Callable[[Path], Callable[[str, Feed], Arrays]] | None = None


def clip_processor(folder: Path, preparer: Any) -> Pairs:
    """CLIP's preparer against transformers' image processor and tokenizer."""
    from transformers import AutoTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil.from_pretrained(folder)
    for size in SIZES:
        for picture in (noise(*size), noise(*size, gray=True)):
            theirs = images([picture.convert("RGB")], return_tensors="np")
            yield preparer.images([picture]), {"pixel_values": theirs["pixel_values"]}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for texts in (TEXTS, TEXTS[:1], ("Café  au\tLAIT's 19 mm <|endoftext|> é", "")):
        limit = tokenizer.model_max_length
        found = tokenizer(
            list(texts), padding=True, truncation=True, max_length=limit, return_tensors="np"
        )
        yield preparer.texts(texts), dict(found)


def chest_steps(folder: Path, preparer: Any) -> Pairs:
    """CheXzero's preparer against the steps of its code in Pillow and torch."""
    import torch
    from PIL import Image

    for size in SIZES:
        picture = noise(*size)
        scale = 320 / max(size)
        small = picture.resize(
            (int(size[0] * scale), int(size[1] * scale)), Image.Resampling.LANCZOS
        )
        square = Image.new("L", (320, 320))
        square.paste(small, ((320 - small.width) // 2, (320 - small.height) // 2))
        levels = torch.from_numpy(np.asarray(square, np.float32)).expand(1, 3, 320, 320)
        normal = (levels - 101.48761) / 83.43944
        side = preparer.images([picture])["pixel_values"].shape[-1]
        shrunk = torch.nn.functional.interpolate(normal, (side, side), mode="bicubic")
        yield preparer.images([picture]), {"pixel_values": shrunk.numpy()}


def openai_outputs(folder: Path) -> Callable[[str, Feed], Arrays]:
    """The original CLIP code's arithmetic on a folder in its layout."""
    import torch
    from safetensors.torch import load_file

    from tests.support.plain_openai_clip import OpenaiClip
    from tests.support.tiny_clip import CONTEXT, PATCH, PROJECTION, SIDE

    state = {n: v.float() for n, v in load_file(folder / "model.safetensors").items()}
    rows = state["token_embedding.weight"].shape[0]
    model = OpenaiClip(rows, CONTEXT, SIDE, PATCH, PROJECTION)
    model.load_state_dict(state)
    model.eval()

    def outputs(graph: str, feed: Feed) -> Arrays:
        with torch.inference_mode():
            if "pixel_values" in feed:
                embeds = model.encode_image(torch.from_numpy(feed["pixel_values"]))
                return {"image_embeds": embeds.numpy()}
            ids = np.zeros((len(feed["input_ids"]), CONTEXT), np.int64)
            ids[:, : feed["input_ids"].shape[1]] = feed["input_ids"] * feed["attention_mask"]
            embeds = model.encode_text(torch.from_numpy(ids))
            return {"text_embeds": embeds.numpy(), "logit_scale": model.logit_scale.exp().numpy()}

    return outputs


def clipseg_processor(folder: Path, preparer: Any) -> Pairs:
    """CLIPSeg's preparer against transformers' image processor and tokenizer."""
    from transformers import AutoTokenizer
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    images = ViTImageProcessorPil.from_pretrained(folder)
    for size in SIZES:
        for picture in (noise(*size), noise(*size, gray=True)):
            theirs = images([picture.convert("RGB")], return_tensors="np")
            yield preparer.images([picture]), {"pixel_values": theirs["pixel_values"]}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="np")
    yield preparer.texts(TEXTS), dict(found)


def biomed_seg_processor(folder: Path, preparer: Any) -> Pairs:
    """BiomedCLIPSeg's preparer against torchvision's steps in Pillow, and transformers' tokenizer."""
    from PIL import Image
    from transformers import AutoTokenizer

    for size in SIZES:
        picture = noise(*size)
        side = preparer.images([picture])["pixel_values"].shape[-1]
        small = picture.resize((side, side), Image.Resampling.BILINEAR)
        values = np.asarray(small, np.float32).transpose(2, 0, 1) / np.float32(255)
        mean, std = (
            np.array(v, np.float32)[:, None, None]
            for v in (
                (0.48145466, 0.4578275, 0.40821073),
                (0.26862954, 0.26130258, 0.27577711),
            )
        )
        yield preparer.images([picture]), {"pixel_values": ((values - mean) / std)[None]}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(
        list(TEXTS), padding=True, truncation=True, max_length=24, return_tensors="np"
    )
    found.pop("token_type_ids", None)
    yield preparer.texts(TEXTS), dict(found)


def cris_steps(folder: Path, preparer: Any) -> Pairs:
    """CRIS' preparer against the steps of its code: pixels in Pillow, tokens of a fixed length."""
    from PIL import Image
    from transformers import AutoTokenizer

    settings = preparer.settings.normalisation
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (settings.mean, settings.std))
    for size in SIZES:
        picture, side = noise(*size), preparer.settings.output()[0]
        small = picture.resize((side, side), Image.Resampling.BILINEAR)
        values = np.asarray(small, np.float32).transpose(2, 0, 1) / np.float32(255)
        yield preparer.images([picture]), {"pixel_values": ((values - mean) / std)[None]}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for texts in (TEXTS, TEXTS[:1]):
        ids = np.zeros((len(texts), preparer.length), np.int64)
        for row, text in zip(ids, texts, strict=True):
            found = tokenizer(text)["input_ids"][: preparer.length]
            row[: len(found)] = found
            # A text that is cut still ends with the end token.
            row[len(found) - 1] = tokenizer.eos_token_id
        yield preparer.texts(texts), {"input_ids": ids}


def t5_tokenizer(folder: Path, preparer: Any) -> Pairs:
    """T5's preparer against transformers' tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS[:3], "", "  two  spaces\nand a line "):
        yield preparer.text(text), dict(tokenizer([text], return_tensors="np"))


def write_head(folder: Path, kind: str, architecture: str) -> Path:
    """A tiny encoder with a classification head of three labels."""
    names = dict(enumerate(LABELS))
    label2id = {label: i for i, label in names.items()}
    return write_tiny_bert(
        folder, kind=kind, architecture=architecture, id2label=names, label2id=label2id
    )


BERT_ERROR = {"int8": 0.04, "int4-rtn": 0.4}
CLIP_ERROR = {"int8": 0.02, "int4-rtn": 0.25}
CASES = (
    TaskCase(
        "clip",
        write_tiny_clip,
        "zero-shot",
        clip_processor,
        CLIP_ERROR,
        targets=("q_proj", "v_proj"),
    ),
    TaskCase(
        "clip-own-end",
        lambda folder: write_tiny_clip(folder, legacy=False, text={"hidden_act": "gelu"}),
        "zero-shot",
        clip_processor,
        CLIP_ERROR,
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "visual_projection"),
    ),
    TaskCase(
        "chexzero",
        write_tiny_chexzero,
        "zero-shot",
        chest_steps,
        CLIP_ERROR,
        slack=2e-5,
        targets=("q_proj", "v_proj"),
        reference=openai_outputs,
    ),
    TaskCase(
        "medbridge",
        write_tiny_medbridge,
        "zero-shot",
        focal_processor,
        CLIP_ERROR,
        targets=("q_proj", "v_proj"),
        reference=medbridge_outputs,
    ),
    TaskCase(
        "clipseg",
        write_tiny_clipseg,
        "segmentation",
        clipseg_processor,
        {"int8": 0.02, "int4-rtn": 0.35},
        targets=("q_proj", "v_proj"),
    ),
    TaskCase(
        "clipseg-simple",
        lambda folder: write_tiny_clipseg(
            folder,
            legacy=False,
            use_complex_transposed_convolution=False,
            conditional_layer=2,
            extract_layers=[3, 1, 4],
        ),
        "segmentation",
        clipseg_processor,
        {"int8": 0.02, "int4-rtn": 0.35},
        targets=("q_proj", "v_proj"),
    ),
    TaskCase(
        "biomedclipseg",
        write_tiny_biomedclipseg,
        "segmentation",
        biomed_seg_processor,
        BERT_ERROR,
        slack=1e-6,
        targets=("query", "value"),
        reference=plain_outputs,
    ),
    TaskCase(
        "cris",
        write_tiny_cris,
        "segmentation",
        cris_steps,
        {"int8": 0.05, "int4-rtn": 0.5},
        slack=1e-6,
        # Texts have one length, whatever stands beside them.
        padded=None,
        reference=plain_cris_outputs,
    ),
    TaskCase(
        "t5",
        write_tiny_t5,
        "summary",
        t5_tokenizer,
        {"int8": 0.05, "int4-rtn": 0.5},
        padded=padded_summary,
        targets=("q", "v"),
    ),
    TaskCase(
        "t5-gated",
        lambda folder: write_tiny_t5(
            folder, feed_forward_proj="gated-gelu", tie_word_embeddings=False, own_head=True
        ),
        "summary",
        t5_tokenizer,
        {"int8": 0.08, "int4-rtn": 0.6},
        padded=padded_summary,
        targets=("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    ),
    TaskCase(
        "bert",
        lambda folder: write_tiny_bert(folder, old_names=True),
        "text-encoder",
        bert_tokenizer,
        BERT_ERROR,
        padded=padded_encoder,
        targets=("query", "value"),
    ),
    TaskCase(
        "bert-sequence",
        lambda folder: write_head(folder, "bert", "BertForSequenceClassification"),
        "text-encoder",
        bert_tokenizer,
        BERT_ERROR,
        padded=padded_encoder,
        targets=("query", "key", "value", "dense"),
    ),
    TaskCase(
        "bert-token",
        lambda folder: write_head(folder, "bert", "BertForTokenClassification"),
        "text-encoder",
        bert_tokenizer,
        BERT_ERROR,
        padded=padded_encoder,
        targets=("query", "value"),
    ),
    TaskCase(
        "distilbert",
        lambda folder: write_tiny_bert(
            folder, kind="distilbert", architecture="DistilBertForMaskedLM", dtype="float32"
        ),
        "text-encoder",
        distilbert_tokenizer,
        BERT_ERROR,
        padded=padded_encoder,
        targets=("q_lin", "v_lin"),
    ),
    TaskCase(
        "distilbert-bare",
        lambda folder: write_tiny_bert(
            folder, kind="distilbert", architecture="DistilBertModel", bare=True
        ),
        "text-encoder",
        distilbert_tokenizer,
        BERT_ERROR,
        padded=padded_encoder,
        targets=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
    ),
    TaskCase(
        "distilbert-sequence",
        lambda folder: write_head(folder, "distilbert", "DistilBertForSequenceClassification"),
        "text-encoder",
        distilbert_tokenizer,
        BERT_ERROR,
        padded=padded_encoder,
        targets=("q_lin", "v_lin", "pre_classifier"),
    ),
    TaskCase(
        "biomedclip",
        write_tiny_biomedclip,
        "zero-shot",
        open_clip_steps,
        BERT_ERROR,
        slack=1e-6,
        targets=("qkv", "query", "value"),
        reference=biomedclip_outputs,
    ),
    TaskCase(
        "chinese_clip",
        write_tiny_chinese_clip,
        "zero-shot",
        chinese_processor,
        BERT_ERROR,
        targets=("q_proj", "v_proj", "query", "value", "text_projection"),
    ),
    TaskCase(
        "medclip",
        write_tiny_medclip,
        "zero-shot",
        medclip_steps,
        BERT_ERROR,
        slack=1e-6,
        # Padding counts in the published model's average.
        padded=None,
        targets=("q_proj", "v_proj", "query", "value"),
        reference=medclip_outputs,
    ),
    TaskCase(
        "medclip-resnet",
        lambda folder: write_tiny_medclip(folder, resnet=True),
        "zero-shot",
        medclip_steps,
        BERT_ERROR,
        slack=1e-6,
        padded=None,
        targets=("query", "value"),
        reference=medclip_outputs,
    ),
    TaskCase(
        "medfilip",
        write_tiny_medfilip,
        "zero-shot",
        medfilip_steps,
        BERT_ERROR,
        slack=2e-5,
        targets=("q_proj", "v_proj"),
        reference=medfilip_outputs,
    ),
    TaskCase(
        "siglip",
        write_tiny_siglip,
        "zero-shot",
        siglip_processor,
        CLIP_ERROR,
        # Texts have one length, and the model sees padding.
        padded=None,
        targets=("q_proj", "v_proj"),
    ),
)
assert {case.inputs for case in CASES} <= INPUTS.keys()
