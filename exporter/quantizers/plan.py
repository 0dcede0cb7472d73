"""The plan of every tensor, before one is converted.

Nothing unknown, nothing missing, nothing silently left in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from exporter.core.blocks import QDATA, SCALES, ZEROS, BlockFormat
from exporter.core.errors import InputRefused
from exporter.core.header import shown
from exporter.core.nf4 import NF4_DATA, NF4_SCALES, nf4_shapes
from exporter.core.static8 import static_shapes
from exporter.core.tensors import FLOATS, ITEM_BYTES, Checkpoint
from exporter.families.base import BUFFERS, Role, TensorSpec, VisionSpec
from exporter.families.specs.decoder import TextDecoder
from exporter.families.specs.walked import require_folding, require_walked, seen_matrices
from exporter.families.table import family_of, task_family_of
from exporter.families.tasks import TaskFamily, task_tensors
from exporter.quantizers.packing import MIN_BLOCK, packed_bytes
from exporter.quantizers.schemes import BNB, Method, Scheme

Kind = Literal["linear", "head", "embedding", "float"]
UNSET = "the scheme keeps this part in float16"
KINDS: dict[Role, Kind] = {
    "decoder": "linear",
    "vision": "linear",
    "head": "head",
    "embedding": "embedding",
    "float": "float",
}


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one tensor.

    `format` is None for kind "float", and `reason` says why then; `bytes` is its size in the
    quantized folder. `turned`: the checkpoint has a quantized one as ``[columns, rows]``.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    format: BlockFormat | None
    method: Method
    reason: str
    bytes: int
    turned: bool = False

    @property
    def rows(self) -> int:
        """The first axis."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """The last axis, along which blocks are cut."""
        return self.shape[-1]

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that store it: name to (safetensors dtype, shape)."""
        fmt = self.format
        if fmt is None:
            return {self.name: ("F16", self.shape)}
        if self.method == "bnb-nf4":
            size, maxima = nf4_shapes(self.rows, self.columns, fmt.block)
            return {
                self.name + NF4_DATA: ("U8", (size,)),
                self.name + NF4_SCALES: ("F32", (maxima,)),
            }
        if self.method == "smoothquant":
            shapes = static_shapes(self.rows, self.columns)
            return {self.name + suffix: entry for suffix, entry in shapes.items()}
        blocks = -(-self.columns // fmt.block)
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            self.name + QDATA: ("U8", (self.rows, blocks, fmt.block * fmt.bits // 8)),
            self.name + SCALES: ("F16", (self.rows, blocks)),
        }
        if not fmt.symmetric:
            found[self.name + ZEROS] = ("U8", (self.rows, (blocks * fmt.bits + 7) // 8))
        return found


def plan_model(
    checkpoint: Checkpoint, config: Mapping[str, Any], scheme: Scheme
) -> tuple[LayerPlan, ...]:
    """One plan for each tensor of a model by its parsed config.json, whatever it does.

    Raises `InputRefused` as `plan_layers` and `plan_task` do.
    """
    task = task_family_of(config)
    if task is not None:
        return plan_task(checkpoint, task, config, scheme)
    family = family_of(config)
    return plan_layers(checkpoint, family.decoder_spec(config), family.tower_spec(config), scheme)


def plan_task(
    checkpoint: Checkpoint, family: TaskFamily, config: Mapping[str, Any], scheme: Scheme
) -> tuple[LayerPlan, ...]:
    """The same for a model of a task family: text layers as the scheme stores a decoder's.

    Raises `InputRefused` for a calibrated scheme, and as `plan_layers` does.
    """
    refuse_calibrated(family, scheme)
    expected = task_tensors(family, config)
    _refuse_strangers(checkpoint, {e.name for e in expected})
    return tuple(
        _planned(checkpoint, e, _by_role(e.role, scheme), scheme, seen=False) for e in expected
    )


def refuse_calibrated(family: TaskFamily, scheme: Scheme) -> None:
    """Raise `InputRefused` when a scheme calibrates on captions, which a task family has none of."""
    if scheme.calibrated:
        raise InputRefused(
            f"scheme {scheme.name} is calibrated on captions, and a {family.TASK} model writes none; "
            "use int8, int4-rtn or int4-hqq"
        )


def refuse_decoder(decoder: TextDecoder, scheme: Scheme) -> None:
    """Raise `InputRefused` when a scheme is calibrated in a way that the decoder's kind does not allow.

    GPTQ needs the inputs of each matrix; AWQ and `mixed` are written for Llama blocks alone.
    """
    if not scheme.calibrated:
        return
    if scheme.method == "gptq" and not scheme.choices:
        require_walked(decoder, f"scheme {scheme.name}")
    else:
        require_folding(decoder, f"scheme {scheme.name}")


def plan_layers(
    checkpoint: Checkpoint, decoder: TextDecoder, tower: VisionSpec, scheme: Scheme
) -> tuple[LayerPlan, ...]:
    """One plan for each tensor of the checkpoint, in the order in which they will be stored.

    A head that is bit for bit the embedding is stored once, under the embedding's name, and has no
    row; neither have buffers that follow from the config. Raises `InputRefused` when a tensor is unknown, missing, of another shape or not floating
    point, when a tied head differs from the embedding, or when the scheme is calibrated and the
    decoder of a kind that calibration cannot walk.
    """
    refuse_decoder(decoder, scheme)
    seen = seen_matrices(decoder)
    shared = _head_is_embedding(checkpoint, decoder)
    if decoder.tied and decoder.head in checkpoint and not shared:
        raise InputRefused(
            f"tensor '{decoder.head}' differs from '{decoder.embedding}', but config.json says "
            "tie_word_embeddings; set it to false or remove the head"
        )
    decoder = replace(decoder, tied=decoder.tied or shared)
    expected: Sequence[TensorSpec] = [*decoder.tensors(), *tower.tensors()]
    _refuse_strangers(
        checkpoint, {e.name for e in expected} | ({decoder.head} if shared else set())
    )
    return tuple(
        _planned(checkpoint, e, _wanted(e, decoder, scheme), scheme, seen=e.name in seen)
        for e in expected
    )


def fit_block(columns: int, fmt: BlockFormat, *, whole: bool) -> BlockFormat | None:
    """`fmt` with the block (a power of two from 16 up to its own) that stores a row of `columns`
    values in the fewest bytes, the larger one when equal.

    `whole` admits only blocks that divide `columns` (the embedding's lookup needs that); None when
    there is no such block.
    """
    blocks = [fmt.block >> n for n in range(16) if fmt.block >> n >= MIN_BLOCK]
    if whole:
        blocks = [b for b in blocks if columns % b == 0]
    formats = [replace(fmt, block=b) for b in blocks]
    return min(formats, key=lambda f: packed_bytes(1, columns, f), default=None)


def static_plan(name: str, shape: tuple[int, ...], *, turned: bool) -> LayerPlan:
    """The plan of a vision matrix in 8 bits with a scale per row and fixed inputs."""
    form = BlockFormat(8, shape[-1], symmetric=True)
    plan = LayerPlan(name, "linear", shape, form, "smoothquant", "", 0, turned)
    return replace(plan, bytes=_stored_bytes(plan))


def fit_bnb(rows: int, columns: int, fmt: BlockFormat) -> BlockFormat | None:
    """The form in which a ``[rows, columns]`` matrix takes a bitsandbytes format; None for none.

    NF4 blocks run over the flattened matrix, and only whole ones keep their values when the graphs
    stack matrices. Blocks of 8 bits only repeat their row's scale: the largest that divides a row.
    """
    if fmt.bits == 4:
        return fmt if rows * columns % fmt.block == 0 else None
    blocks = [fmt.block >> n for n in range(16) if fmt.block >> n >= MIN_BLOCK]
    return next((replace(fmt, block=b) for b in blocks if columns % b == 0), None)


def _stored_bytes(plan: LayerPlan) -> int:
    return sum(ITEM_BYTES[kind] * int(np.prod(shape)) for kind, shape in plan.entries().values())


def _wanted(tensor: TensorSpec, decoder: TextDecoder, scheme: Scheme) -> BlockFormat | None:
    """The format that the scheme gives a tensor by its role."""
    if tensor.role == "embedding" and decoder.tied:
        # A shared matrix is stored as finely as the finer of its two uses asks.
        formats = [f for f in (scheme.embedding, scheme.head) if f]
        return max(formats, key=lambda f: f.bits, default=None)
    return _by_role(tensor.role, scheme)


def _by_role(role: Role, scheme: Scheme) -> BlockFormat | None:
    formats: dict[Role, BlockFormat | None] = {
        "decoder": scheme.decoder,
        "vision": scheme.vision,
        "head": scheme.head,
        "embedding": scheme.embedding,
        "float": None,
    }
    return formats[role]


def _planned(
    checkpoint: Checkpoint,
    expected: TensorSpec,
    fmt: BlockFormat | None,
    scheme: Scheme,
    *,
    seen: bool,
) -> LayerPlan:
    """The plan of one tensor; `seen`: calibration sees its inputs."""
    info = checkpoint.info(expected.name)
    if info.shape != expected.shape or info.dtype not in FLOATS:
        raise InputRefused(
            f"tensor '{expected.name}' is {info.dtype} {list(info.shape)}; expected floating point "
            f"{list(expected.shape)} by config.json"
        )
    reason = expected.reason or UNSET
    shape = expected.shape[::-1] if expected.turned else expected.shape
    if fmt is not None:
        rows, columns = shape
        if scheme.method == "smoothquant" and expected.role == "vision":
            return static_plan(expected.name, shape, turned=expected.turned)
        if scheme.method in BNB:
            fmt, reason = fit_bnb(rows, columns, fmt), f"{rows} x {columns} makes no whole blocks"
        else:
            fmt = fit_block(columns, fmt, whole=expected.role == "embedding")
            reason = f"{columns} columns are no multiple of {MIN_BLOCK}"
    if fmt is None:
        size = 2 * int(np.prod(expected.shape))
        return LayerPlan(expected.name, "float", expected.shape, None, "none", reason, size)
    method = scheme.method_for(fmt, inputs=seen)
    plan = LayerPlan(
        expected.name, KINDS[expected.role], shape, fmt, method, "", 0, expected.turned
    )
    return replace(plan, bytes=_stored_bytes(plan))


def _head_is_embedding(checkpoint: Checkpoint, decoder: TextDecoder) -> bool:
    """Whether the checkpoint holds a head whose bytes are the embedding's."""
    both = decoder.head in checkpoint and decoder.embedding in checkpoint
    return both and checkpoint.same_bytes(decoder.head, decoder.embedding)


def _refuse_strangers(checkpoint: Checkpoint, names: set[str]) -> None:
    unknown = sorted(n for n in checkpoint.tensors.keys() - names if not BUFFERS.search(n))
    missing = sorted(names - checkpoint.tensors.keys())
    for what, found in (("unknown to this architecture", unknown), ("missing", missing)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise InputRefused(
                f"{len(found)} tensors are {what}: {', '.join(map(shown, found[:3]))}{more}; "
                "expected exactly those that config.json describes, as `medexport merge` names them"
            )
