"""What a family tells the rest: its parts as small specs, and how images enter the prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.catalog.schema import Value
from exporter.families.layouts.names import Layout
from exporter.families.layouts.published import PublishedLayout
from exporter.families.shapes.parts import ShapeOf
from exporter.families.specs.decoder import TextDecoder, example_texts

if TYPE_CHECKING:
    import torch

# Why a tensor is kept in float16 whatever the scheme says.
NORM = "normalisation weights: few bytes, large effect"
BIAS = "bias: few bytes, added at full precision"
POSITIONS = "position embedding: added, not multiplied"
PATCHES = "patch convolution: first layer, few bytes"
# Buffers that older transformers saved although they follow from the config.
BUFFERS = re.compile(
    r"\.(rotary_emb\.inv_freq|embeddings\.position_ids|num_batches_tracked"
    r"|(attn|crossattention)\.(masked_)?bias)$"
)

# "decoder" and "vision" are linear layers, of which the scheme decides by the part they are in.
Role = Literal["embedding", "head", "decoder", "vision", "float"]
Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the architecture by its name in the checkpoint; `reason` why role "float" is float.

    `used`: whether a graph takes it; one that is not used has role "float", and its reason says why.
    `turned`: a linear layer that the checkpoint stores as ``[inputs, outputs]`` (GPT-2's Conv1D),
    which `shape` then is too; packed matrices are ``[outputs, inputs]`` for all layers.
    """

    name: str
    shape: tuple[int, ...]
    role: Role = "float"
    reason: str = ""
    used: bool = True
    turned: bool = False


def gated_block_shapes(
    hidden: int, inner: int, queries: int, keys: int
) -> dict[str, tuple[int, int]]:
    """Shape of each matrix of a block with a gated MLP, in the order of use, by its name within it."""
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def norm_tensors(name: str, size: int) -> Iterator[TensorSpec]:
    """Weight and bias of a layer norm called `name`."""
    yield TensorSpec(name + ".weight", (size,), reason=NORM)
    yield TensorSpec(name + ".bias", (size,), reason=BIAS)


@dataclass(frozen=True)
class VitNames:
    """What a vision transformer calls its parts: SigLIP's and CLIP's names unless given.

    `fused`: one matrix of all queries, all keys, all values, where they are no three; `flat`: the
    patch kernel is stored as a matrix.
    """

    patch: str = "embeddings.patch_embedding"
    blocks: str = "encoder.layers."
    attention: str = "self_attn."
    out: str = "out_proj"
    first_norm: str = "layer_norm1"
    second_norm: str = "layer_norm2"
    fused: str = ""
    flat: bool = False


SIGLIP_NAMES = VitNames()


def block_tensors(
    layer: str, hidden: int, inner: int, names: VitNames = SIGLIP_NAMES
) -> Iterator[TensorSpec]:
    """Every tensor of a vision transformer's block called `layer` (with its dot)."""
    shapes = {f"{names.attention}{n}_proj": (hidden, hidden) for n in "qkv"} | {
        f"{names.attention}{names.out}": (hidden, hidden),
        "mlp.fc1": (inner, hidden),
        "mlp.fc2": (hidden, inner),
    }
    for name, shape in shapes.items():
        yield TensorSpec(f"{layer}{name}.weight", shape, "vision")
        yield TensorSpec(f"{layer}{name}.bias", shape[:1], reason=BIAS)
    yield from norm_tensors(layer + names.first_norm, hidden)
    yield from norm_tensors(layer + names.second_norm, hidden)


class VisionSpec(Protocol):
    """The vision part of a family, projection included. `graphs.parts` has a writer for each kind."""

    @property
    def output_size(self) -> int:
        """Width of a feature row: the decoder's hidden size."""
        ...

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has."""
        ...

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random inputs of the graph at two or more shapes."""
        ...


@dataclass(frozen=True)
class DecoderSpec:
    """A causal decoder of the LLaMA kind; sizes in elements, names as in the checkpoint.

    `prefix` is put before ``layers.{i}.self_attn.q_proj.weight`` and its siblings, `embedding`,
    `final_norm` and `head` are whole tensor names. `tied` says that the head is the embedding.
    `qkv_bias`: queries, keys and values have a bias. `mrope`: how many of a head's ``head_dim / 2``
    frequencies turn with the position on each axis in turn, where a position has several (M-RoPE,
    Qwen2-VL, arXiv 2409.12191); empty where a position is the place in the text.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    prefix: str
    embedding: str
    final_norm: str
    head: str
    tied: bool
    qkv_bias: bool = False
    mrope: tuple[int, ...] = ()

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each matrix of a block by its name within the block, in the order of use."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return gated_block_shapes(self.hidden_size, self.intermediate_size, queries, keys)

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has: the embedding first, the head (unless tied) last."""
        hidden, table = (self.hidden_size,), (self.vocab_size, self.hidden_size)
        yield TensorSpec(self.embedding, table, "embedding")
        for i in range(self.layers):
            layer = f"{self.prefix}layers.{i}."
            yield TensorSpec(layer + "input_layernorm.weight", hidden, reason=NORM)
            for name, shape in self.matrix_shapes().items():
                yield TensorSpec(f"{layer}{name}.weight", shape, "decoder")
                if self.qkv_bias and name.endswith(("q_proj", "k_proj", "v_proj")):
                    yield TensorSpec(f"{layer}{name}.bias", shape[:1], reason=BIAS)
            yield TensorSpec(layer + "post_attention_layernorm.weight", hidden, reason=NORM)
        yield TensorSpec(self.final_norm, hidden, reason=NORM)
        if not self.tied:
            yield TensorSpec(self.head, table, "head")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random inputs of the graph: a prompt, and one token behind three in a batch of two."""
        for batch, length, past, feed in example_texts(self, rng):
            if self.mrope:
                shape = (len(self.mrope), batch, length)
                feed["position_ids"] = rng.integers(0, 9, shape) + past
            yield feed


@dataclass(frozen=True)
class VitSpec:
    """Sizes of a pre-norm vision transformer on square tiles of `image_size` pixels.

    `prefix` is put before ``embeddings...`` and ``encoder.layers.{i}...`` in the tensors' names.
    `names`: what its parts are called where it is of another kind.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    norm_eps: float
    activation: str
    prefix: str
    names: VitNames = field(default=SIGLIP_NAMES, kw_only=True)

    @property
    def patches(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TowerSpec(VitSpec):
    """A vision transformer of the SigLIP kind with pixel shuffle and one projection.

    A tile gives ``(image_size / patch_size / shuffle)**2`` rows of the decoder's hidden size.
    `projection` is a whole tensor name.
    """

    shuffle: int
    output_size: int
    projection: str

    @property
    def tokens(self) -> int:
        """Rows of features per tile."""
        return (self.patches // self.shuffle) ** 2

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower and projection."""
        hidden = self.hidden_size
        patch = f"{self.prefix}embeddings.patch_embedding."
        side = self.patch_size
        yield TensorSpec(patch + "weight", (hidden, 3, side, side), reason=PATCHES)
        yield TensorSpec(patch + "bias", (hidden,), reason=BIAS)
        positions = f"{self.prefix}embeddings.position_embedding.weight"
        yield TensorSpec(positions, (self.patches**2, hidden), reason=POSITIONS)
        for i in range(self.layers):
            layer = f"{self.prefix}encoder.layers.{i}."
            yield from block_tensors(layer, hidden, self.intermediate_size)
        yield from norm_tensors(self.prefix + "post_layernorm", hidden)
        yield TensorSpec(self.projection, (self.output_size, hidden * self.shuffle**2), "vision")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random tiles, alone and in a batch of two."""
        for batch in (1, 2):
            shape = (batch, 1, 3, self.image_size, self.image_size)
            yield {"pixel_values": rng.uniform(-1, 1, shape).astype(np.float32)}


@dataclass(frozen=True)
class PromptInputs:
    """One prompt with its images, ready for the graphs.

    input_ids: int64 ``[length]`` with one image token per feature row; vision: the inputs of the
    vision graph for each of its runs, whose feature rows one after the other belong to the image
    tokens; positions: int64 ``[axes, length]`` where a position is more than a place in the text (its
    places on several axes, or its place and the last one that it sees);
    sizes: (height, width) of each image as it came, where the torch model asks for it; image_mask:
    int64 ``[length, images]``, 1 where a token sees an image, where the decoder asks for it (the
    answer sees what the prompt's last token sees); prefix_length: so many of the first positions see
    one another.
    """

    input_ids: NDArray[np.int64]
    vision: tuple[Feed, ...]
    positions: NDArray[np.int64] | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    image_mask: NDArray[np.int64] | None = None
    prefix_length: int = 0

    @property
    def pixel_values(self) -> NDArray[np.float32]:
        """The pixels of all runs: float32 ``[tiles, ...]``, or ``[patches, values]`` of patches."""
        runs = (feed["pixel_values"] for feed in self.vision)
        return np.concatenate([run if run.ndim == 2 else run[0] for run in runs])


@dataclass(frozen=True)
class ReaderFiles:
    """What other readers look for in the small files: classes of the processor and extra settings.

    `processor_class` is empty where there is no joint processor of image and text; `genai`: whether
    onnxruntime-genai can run the graphs as a chain.
    """

    processor_class: str
    image_processor_type: str
    processor: Mapping[str, Any]
    genai: bool


@dataclass(frozen=True)
class GenerationSettings:
    """When greedy decoding stops: any of `stop_ids`, or the context is full."""

    stop_ids: frozenset[int]
    max_positions: int


class Preparer(Protocol):
    """Turns images and a prompt into inputs, and tokens into text, with one model's own files."""

    generation: GenerationSettings

    @property
    def image_token_id(self) -> int | None:
        """The token in whose place a feature row goes; None where the decoder sees the image by
        cross-attention.
        """
        ...

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """Split, resize and normalise `images` (RGB or gray) and render the chat template."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens without special tokens, stripped."""
        ...


class KnownFamily(Protocol):
    """What the file of any family says of checkpoints and sizes, by model_type."""

    MODEL_TYPES: tuple[str, ...]
    # Class of transformers by model_type, or by what architectures says where heads differ;
    # ``module:Class`` for a class of the family's own.
    TORCH_CLASSES: Mapping[str, str]
    # Names of tensors in older versions of transformers; layouts of other libraries.
    LAYOUTS: tuple[Layout, ...]
    PUBLISHED: Mapping[str, PublishedLayout]
    # What the config class puts where config.json has no key, by dotted key.
    CONFIG_DEFAULTS: Mapping[str, Value]
    # Sizes for plans.
    SHAPES: Mapping[str, ShapeOf]


class Family(KnownFamily, Protocol):
    """The module-level names of a family's file. The torch functions are for the build side only.

    A family without use for an instruction has an empty ``DEFAULT_PROMPT`` too.
    """

    def decoder_spec(self, config: Mapping[str, Any]) -> TextDecoder:
        """Spec of the decoder from a parsed config.json. Raises `InputRefused` on a bad config."""
        ...

    def tower_spec(self, config: Mapping[str, Any]) -> VisionSpec:
        """Spec of the vision part from a parsed config.json. Raises `InputRefused` on a bad config."""
        ...

    def open_preparer(self, model_dir: Path) -> Preparer:
        """Read tokenizer, template and image settings of a model folder."""
        ...

    def reader_files(self, config: Mapping[str, Any]) -> ReaderFiles:
        """What transformers.js and onnxruntime-genai need to know about a parsed config.json."""
        ...

    def proof_inputs(
        self, config: Mapping[str, Any], rng: np.random.Generator, ids: NDArray[np.int64]
    ) -> tuple[dict[str, NDArray[Any]], int]:
        """Arguments of the torch model for the text `ids` ``[length]`` behind random images, and
        how many tiles these have.
        """
        ...

    def torch_features(self, model: Any, inputs: PromptInputs) -> torch.Tensor:
        """Feature rows ``[rows, hidden]`` of the torch model, as the vision graph gives them."""
        ...

    def library_features(self, model: Any, inputs: PromptInputs) -> torch.Tensor:
        """The same by transformers' own method, to check the graphs against."""
        ...

    def torch_append(
        self, model: Any, embeds: torch.Tensor, cache: Any, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        """Last hidden states ``[length, hidden]`` of embeddings ``[length, hidden]`` behind `cache`
        (None: nothing), and the new cache; `positions` int64 ``[axes, length]``.
        """
        ...


class CrossFamily(Family, Protocol):
    """A family whose decoder sees the image by cross-attention.

    What its `torch_features` gives is what its `torch_start` takes.
    """

    def torch_start(self, model: Any, features: torch.Tensor, inputs: PromptInputs) -> Any:
        """The cache of an empty text behind the features of a prompt's images, for `torch_append`."""
        ...
