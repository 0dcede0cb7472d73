"""The schemes: which part of a model is stored in which format. A new scheme is one row here."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal

from exporter.core.blocks import BlockFormat
from exporter.core.errors import WrongUsage
from exporter.core.nf4 import NF4_BLOCK

Method = Literal[
    "none", "rtn", "rtn-mse", "hqq", "gptq", "awq", "awq+gptq", "bnb-nf4", "bnb-int8", "smoothquant"
]
DIALECTS = ("ort", "standard")
# What may stand behind a row's name: another form of its 4-bit blocks.
GROUP_SIZES = (32, 64, 128)
SUFFIX = re.compile(r"-(?:g(?P<group>\d+)|(?P<sign>sym|asym|pos))$", re.ASCII)
# Methods that need the inputs of each layer; a scheme uses them on the decoder's linear layers, but
# "smoothquant" on those of the vision part.
CALIBRATED: frozenset[Method] = frozenset({"gptq", "awq", "awq+gptq", "smoothquant"})
# bitsandbytes' own storage, whatever the bits.
BNB: frozenset[Method] = frozenset({"bnb-nf4", "bnb-int8"})


@dataclass(frozen=True)
class Scheme:
    """Which part of a model is stored in which format (None: float16), and how it gets there.

    `decoder` and `vision` are for linear layers. `method` holds for formats below 8 bits; 8-bit
    matrices are rounded plainly, since clipping lowers their error by about one per cent. Parts for
    which a calibrated method has no inputs (all but the decoder's layers) are clipped instead.
    `choices`: formats among which (and float16) a budget chooses for each unit; the parts' own
    formats are then what the default budget allows.
    """

    name: str
    title: str
    decoder: BlockFormat | None
    head: BlockFormat | None
    embedding: BlockFormat | None
    vision: BlockFormat | None
    method: Method
    choices: tuple[BlockFormat, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether the method needs calibration images."""
        return self.method in CALIBRATED

    @property
    def quantizes(self) -> bool:
        """Whether any part is stored in fewer than 16 bits."""
        return any((self.decoder, self.head, self.embedding, self.vision))

    @property
    def formats(self) -> dict[str, BlockFormat | None]:
        """The format of each part, by its name in messages."""
        return {
            "decoder": self.decoder,
            "head": self.head,
            "embedding": self.embedding,
            "vision part": self.vision,
        }

    @property
    def positive(self) -> bool:
        """Whether 4-bit blocks are searched over positive scales alone."""
        return any(fmt.positive for fmt in self.formats.values() if fmt)

    def method_for(self, fmt: BlockFormat, *, inputs: bool) -> Method:
        """How a matrix of that format is quantized; `inputs`: calibration sees its inputs."""
        if fmt.bits == 8 and self.method not in BNB:
            return "rtn"
        return "rtn-mse" if self.calibrated and not inputs else self.method


# Symmetric: at 8 bits zero points take less than 0.002 off a relative error of 0.006 to 0.009, and
# other runtimes want none.
INT8 = BlockFormat(bits=8, block=128, symmetric=True)
# Asymmetric blocks of 64: 4.31 bits a weight. Blocks of 32 have 12 to 17 per cent less error at 4.63
# bits, but SmolVLM-500M would then miss 0.32 of its float16 bytes even with a shared head. Blocks of
# 128 have 8 to 16 per cent more, and save nothing where 128 does not divide the width (960).
INT4 = BlockFormat(bits=4, block=64, symmetric=False)
# Where bytes come first: SmolVLM-500M, whose head is its own, then takes 0.316 of its float16 bytes.
INT4_SMALL = BlockFormat(bits=4, block=128, symmetric=False)
# NF4 has 16 values of its own and a maximum per block; LLM.int8() one per row, which blocks repeat.
NF4 = BlockFormat(bits=4, block=NF4_BLOCK, symmetric=True)
BNB_INT8 = BlockFormat(bits=8, block=256, symmetric=True)


def _four_bits(name: str, method: Method, how: str) -> Scheme:
    """4-bit decoder, everything else 8-bit."""
    title = f"4-bit decoder {how}; head, embedding and vision part 8-bit"
    return Scheme(name, title, INT4, INT8, INT8, INT8, method)


_ROWS = (
    Scheme("fp16", "float16, the reference export", None, None, None, None, "none"),
    Scheme("int8", "8-bit weights in blocks", INT8, INT8, INT8, INT8, "rtn"),
    _four_bits("int4-rtn", "rtn-mse", "clipped by squared error"),
    _four_bits("int4-hqq", "hqq", "with half-quadratic zero points and scales"),
    _four_bits("int4-gptq", "gptq", "by GPTQ and coordinate descent"),
    _four_bits("int4-awq", "awq", "with activation-aware scales and clipping"),
    _four_bits("int4-awq-gptq", "awq+gptq", "with activation-aware scales, then GPTQ"),
    Scheme(
        "int4-rtn-small",
        "as int4-rtn, with the head and the embedding in 4 bits too and blocks up to 128",
        INT4_SMALL,
        INT4_SMALL,
        INT4_SMALL,
        INT8,
        "rtn-mse",
    ),
    Scheme(
        "mixed",
        "4 or 8 bits or float16 for each unit by its measured sensitivity, to --max-size or --max-kl",
        INT4,
        INT8,
        INT8,
        INT8,
        "gptq",
        (INT4, INT8),
    ),
    Scheme(
        "int8-static",
        "as int8; the vision part multiplies in 8 bits, its inputs too (SmoothQuant, ranges calibrated)",
        INT8,
        INT8,
        INT8,
        INT8,
        "smoothquant",
    ),
    Scheme(
        "bnb-nf4",
        "linear layers in bitsandbytes' NF4, the rest float16",
        NF4,
        None,
        None,
        NF4,
        "bnb-nf4",
    ),
    Scheme(
        "bnb-int8",
        "linear layers in bitsandbytes' int8 (LLM.int8() weights), the rest float16",
        BNB_INT8,
        None,
        None,
        BNB_INT8,
        "bnb-int8",
    ),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ROWS}


def find_scheme(name: str) -> Scheme:
    """The scheme called `name`: a row of `SCHEMES`, or a row's name with another form of its 4-bit
    blocks behind it, as in ``int4-gptq-g32-sym``.

    ``-sym`` stands for symmetric blocks, ``-pos`` for those with positive scales alone, ``-asym`` for
    zero points. A form that is the row's own leaves no trace in the name. Raises `WrongUsage` with the nearest
    names when there is no such row, and when the row has no 4-bit blocks of ours.
    """
    base, group, sign = _split_name(name)
    if base not in SCHEMES:
        near = difflib.get_close_matches(base.lower(), SCHEMES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(SCHEMES)}."
        raise WrongUsage(f"no scheme '{name}'; {hint} `medexport schemes` lists all")
    row = SCHEMES[base]
    return row if group is None and sign is None else _reshaped(row, group, sign)


def variant_name(name: str, group_size: int | None, symmetric: bool | None) -> str:
    """The name that asks `find_scheme` for the scheme `name` with these 4-bit blocks (None: as is)."""
    base, group, sign = _split_name(name)
    if symmetric is not None:
        sign = "sym" if symmetric else "asym"
    return _joined(base, group_size if group_size else group, sign)


def base_name(name: str) -> str:
    """A scheme's name without the form of its 4-bit blocks."""
    return _split_name(name)[0]


def for_dialect(scheme: Scheme, dialect: str) -> Scheme:
    """`scheme` as graphs of `dialect` can hold it.

    For `standard`, symmetric 4-bit blocks get positive scales alone, which its name then says
    (``int4-gptq-sym`` becomes ``int4-gptq-pos``). Asymmetric blocks stay what the user has to decide:
    raises `WrongUsage` as `refuse_for_dialect` does.
    """
    refuse_for_dialect(scheme, dialect)
    own = scheme.method not in BNB and any(f and f.bits == 4 for f in scheme.formats.values())
    if dialect != "standard" or not own:
        return scheme
    base, group, _ = _split_name(scheme.name)
    return find_scheme(_joined(base, group, "pos"))


def refuse_for_dialect(scheme: Scheme, dialect: str) -> None:
    """Raises `WrongUsage` when graphs of `dialect` cannot hold what `scheme` stores.

    The `standard` dialect has DequantizeLinear with zero point 0 and nothing of onnxruntime's own.
    """
    if dialect not in DIALECTS:
        raise WrongUsage(f"no dialect '{dialect}'; expected {' or '.join(DIALECTS)}")
    if dialect != "standard":
        return
    if scheme.method == "bnb-nf4":
        raise WrongUsage(
            "scheme bnb-nf4 stores NF4, which only onnxruntime's MatMulBnb4 reads; the standard "
            "dialect takes integers: choose another scheme, or --dialect ort"
        )
    if scheme.method == "smoothquant":
        raise WrongUsage(
            f"scheme {scheme.name} codes inputs around a zero point, which the standard dialect does "
            "not have: use int8, or --dialect ort"
        )
    asymmetric = [name for name, fmt in scheme.formats.items() if fmt and not fmt.symmetric]
    if asymmetric:
        raise WrongUsage(
            f"scheme {scheme.name} stores asymmetric blocks ({', '.join(asymmetric)}); the standard "
            "dialect takes symmetric ones only: add --symmetric, or use --dialect ort"
        )


def _split_name(name: str) -> tuple[str, int | None, str | None]:
    """A row's name, and what the suffixes behind it say of block and sign; the last one counts."""
    group: int | None = None
    sign: str | None = None
    while name not in SCHEMES and (found := SUFFIX.search(name)):
        name = name[: found.start()]
        if found["group"] and group is None:
            group = int(found["group"])
        if found["sign"] and sign is None:
            sign = found["sign"]
    return name, group, sign


def _joined(base: str, group: int | None, sign: str | None) -> str:
    return base + (f"-g{group}" if group else "") + (f"-{sign}" if sign else "")


def _sign(fmt: BlockFormat) -> str:
    """The suffix for the form of these blocks."""
    return "pos" if fmt.positive else "sym" if fmt.symmetric else "asym"


def _reshaped(row: Scheme, group: int | None, sign: str | None) -> Scheme:
    """`row` with its 4-bit blocks of `group` values and of that sign, named for what differs."""
    if group not in (None, *GROUP_SIZES):
        raise WrongUsage(
            f"blocks of {group} values; expected {', '.join(map(str, GROUP_SIZES[:-1]))} or "
            f"{GROUP_SIZES[-1]}"
        )
    own = {f for f in row.formats.values() if f and f.bits == 4}
    if not own or row.method in BNB:
        raise WrongUsage(
            f"scheme {row.name} has no 4-bit blocks of ours; --group-size and --symmetric are about these: "
            "leave them out, or take a 4-bit scheme"
        )

    def changed(fmt: BlockFormat | None) -> BlockFormat | None:
        if fmt is None or fmt.bits != 4:
            return fmt
        wanted = sign or _sign(fmt)
        return BlockFormat(4, group or fmt.block, wanted != "asym", positive=wanted == "pos")

    if all(changed(fmt) == fmt for fmt in own):
        return row
    name = _joined(
        row.name,
        group if {f.block for f in own} != {group} else None,
        sign if {_sign(f) for f in own} != {sign} else None,
    )
    return replace(
        row,
        name=name,
        decoder=changed(row.decoder),
        head=changed(row.head),
        embedding=changed(row.embedding),
        vision=changed(row.vision),
        choices=tuple(c for c in map(changed, row.choices) if c),
    )
