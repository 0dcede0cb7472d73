"""The schemes: which part of a model is stored in which format. A new scheme is one row here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from exporter.core.blocks import BlockFormat
from exporter.core.errors import WrongUsage

Method = Literal["none", "rtn", "rtn-mse", "hqq", "gptq", "awq", "awq+gptq"]
# Methods that need the inputs of each layer; a scheme uses them on the decoder's linear layers.
CALIBRATED: frozenset[Method] = frozenset({"gptq", "awq", "awq+gptq"})


@dataclass(frozen=True)
class Scheme:
    """Which part of a model is stored in which format (None: float16), and how it gets there.

    `decoder` and `vision` are for linear layers. `method` holds for formats below 8 bits; 8-bit
    matrices are rounded plainly, since clipping lowers their error by about one per cent. Parts for
    which a calibrated method has no inputs (all but the decoder's layers) are clipped instead.
    """

    name: str
    title: str
    decoder: BlockFormat | None
    head: BlockFormat | None
    embedding: BlockFormat | None
    vision: BlockFormat | None
    method: Method

    @property
    def calibrated(self) -> bool:
        """Whether the method needs calibration images."""
        return self.method in CALIBRATED

    @property
    def quantizes(self) -> bool:
        """Whether any part is stored in fewer than 16 bits."""
        return any((self.decoder, self.head, self.embedding, self.vision))

    def method_for(self, fmt: BlockFormat, *, inputs: bool) -> Method:
        """How a matrix of that format is quantized; `inputs`: calibration sees its inputs."""
        if fmt.bits == 8:
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
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ROWS}


def find_scheme(name: str) -> Scheme:
    """The scheme called `name`. Raises `WrongUsage` with the nearest names when there is none."""
    if name in SCHEMES:
        return SCHEMES[name]
    near = difflib.get_close_matches(name.lower(), SCHEMES, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(SCHEMES)}."
    raise WrongUsage(f"no scheme '{name}'; {hint} `medexport schemes` lists all")
