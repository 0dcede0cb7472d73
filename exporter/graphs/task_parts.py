"""Which writer makes the graph of which kind of task spec. A new kind is one file and one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporter.families.specs.bert import TextEncoderSpec
from exporter.families.specs.bert_towers import BertText
from exporter.families.specs.biomedclipseg import TimmStates
from exporter.families.specs.clip import ClipImage, ClipText
from exporter.families.specs.clipseg import ClipStates, MaskDecoder
from exporter.families.specs.cris import CrisImage, CrisMask, CrisText
from exporter.families.specs.resnet import ResNetImage
from exporter.families.specs.siglip import SiglipImage, SiglipText
from exporter.families.specs.t5 import T5Decoder, T5Encoder
from exporter.families.specs.timm_vit import TimmImage
from exporter.families.task_models.medbridge import BridgedImage
from exporter.families.task_models.medclip import SwinImage
from exporter.families.tasks import GraphSpec
from exporter.graphs.bert import write_text_encoder
from exporter.graphs.bert_text import write_bert_text
from exporter.graphs.biomedclipseg import write_timm_states
from exporter.graphs.clip_image import write_clip_image
from exporter.graphs.clip_text import write_clip_text
from exporter.graphs.clipseg import write_clip_states, write_mask_decoder
from exporter.graphs.cris import write_cris_image, write_cris_text
from exporter.graphs.cris_mask import write_cris_mask
from exporter.graphs.medbridge import write_bridged_image
from exporter.graphs.resnet import write_resnet_image
from exporter.graphs.siglip import write_siglip_image, write_siglip_text
from exporter.graphs.swin_image import write_swin_image
from exporter.graphs.t5 import write_t5_decoder, write_t5_encoder
from exporter.graphs.timm_vit import write_timm_image
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import WrittenGraph

# Folder, stem of the file, a spec of the row's own kind (hence Any), weights, accuracy level.
TaskWriter = Callable[[Path, str, Any, WeightSource, int], WrittenGraph]
TASK_WRITERS: Mapping[type, TaskWriter] = {
    ClipImage: write_clip_image,
    ClipText: write_clip_text,
    ClipStates: write_clip_states,
    MaskDecoder: write_mask_decoder,
    TimmStates: write_timm_states,
    CrisImage: write_cris_image,
    CrisText: write_cris_text,
    CrisMask: write_cris_mask,
    T5Encoder: write_t5_encoder,
    TextEncoderSpec: write_text_encoder,
    BertText: write_bert_text,
    TimmImage: write_timm_image,
    SwinImage: write_swin_image,
    ResNetImage: write_resnet_image,
    BridgedImage: write_bridged_image,
    SiglipImage: write_siglip_image,
    SiglipText: write_siglip_text,
    T5Decoder: write_t5_decoder,
}


def write_task_graph(
    folder: Path, name: str, spec: GraphSpec, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx`` for any kind of `spec`. Raises `InputRefused` on bad tensors."""
    return TASK_WRITERS[type(spec)](folder, name, spec, weights, accuracy_level)
