"""What transformers of all kinds share: linear layers, norms and activations in onnxruntime's fused ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exporter.graphs.linear import linear
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import MICROSOFT, GraphWriter

# Ops that add a bias first: com.microsoft FastGelu is the tanh form, BiasGelu the erf form.
GELUS = {"gelu": "BiasGelu", "gelu_new": "FastGelu", "gelu_pytorch_tanh": "FastGelu"}
PLAIN = {"relu": "Relu", "tanh": "Tanh"}
# x * sigmoid(1.702 x), the approximation that CLIP was trained with (arXiv 1606.08415, section 2).
QUICK_GELU_ALPHA = 1.702


@dataclass(frozen=True)
class Stream:
    """A residual value and what waits to be added to it: the next norm adds both in the same pass."""

    residual: str
    addition: str = ""
    bias: str = ""


@dataclass(frozen=True)
class Projection:
    """A linear layer over `x`: its tensors' stem, ``(outputs, inputs)``, and its name in the graph."""

    tensor: str
    x: str
    shape: tuple[int, int]
    name: str


@dataclass(frozen=True)
class Layers:
    """Writes the layers of one part of a model into a graph.

    A layer is called by its tensors' stem, without those of `prefixes` that it begins with (one
    after the other), unless a name is given.
    """

    writer: GraphWriter
    weights: WeightSource
    accuracy_level: int
    norm_eps: float
    prefixes: tuple[str, ...] = ()

    def vector(self, tensor: str, size: int) -> str:
        """A bias or norm weight as a float32 value."""
        return self.writer.weight(self._short(tensor), self.weights.vector(tensor, size))

    def product(
        self,
        tensor: str,
        x: str,
        shape: tuple[int, int],
        *,
        name: str | None = None,
        turned: bool = False,
    ) -> tuple[str, str]:
        """Product with a linear layer ``(outputs, inputs)``, and its bias, still to be added.

        `turned`: the checkpoint stores ``[inputs, outputs]``.
        """
        matrix = self.weights.matrix(f"{tensor}.weight", *shape, turned=turned)
        name = self._short(tensor) if name is None else name
        product = linear(self.writer, name, x, matrix, self.accuracy_level)
        return product, self.vector(f"{tensor}.bias", shape[0])

    def projected(self, bias: str, parts: Sequence[Projection]) -> tuple[list[str], str]:
        """Product with each part, and one vector, called `bias`, of the biases of all, still to be added
        (the attention ops do it).
        """
        values, biases = [], []
        for part in parts:
            matrix = self.weights.matrix(f"{part.tensor}.weight", *part.shape)
            values.append(linear(self.writer, part.name, part.x, matrix, self.accuracy_level))
            biases.append(self.weights.vector(f"{part.tensor}.bias", part.shape[0]))
        return values, self.writer.weight(bias, np.concatenate(biases))

    def norm(
        self, tensor: str, x: Stream, size: int, *, last: bool = False, rms: bool = False
    ) -> tuple[str, str]:
        """Layer norm (`rms`: RMS norm) of the stream's sum, and that sum; see `add_norm`."""
        parts = ("weight",) if rms else ("weight", "bias")
        vectors = [self.vector(f"{tensor}.{part}", size) for part in parts]
        return add_norm(self.writer, self._short(tensor), x, vectors, self.norm_eps, last=last)

    def _short(self, tensor: str) -> str:
        for prefix in self.prefixes:
            tensor = tensor.removeprefix(prefix)
        return tensor


def add_norm(
    writer: GraphWriter,
    name: str,
    x: Stream,
    vectors: Sequence[str],
    epsilon: float,
    *,
    last: bool = False,
) -> tuple[str, str]:
    """Norm of the stream's sum over the last axis, and that sum (which the `last` norm does not give).

    `vectors`: weight and bias of a layer norm, the weight alone of an RMS norm (arXiv 1910.07467).
    """
    kind = "Simplified" if len(vectors) == 1 else ""
    if not x.addition:
        # onnxruntime registers the simplified op in the standard domain too.
        op, attributes = f"{kind}LayerNormalization", {"epsilon": epsilon, "axis": -1}
        return writer.node(op, name, [x.residual, *vectors], attributes=attributes), x.residual
    outputs = [f"{name}:0", *([] if last else ["", "", f"{name}:sum"])]
    writer.node(
        f"Skip{kind}LayerNormalization",
        name,
        [x.residual, x.addition, *vectors, *([x.bias] if x.bias else [])],
        domain=MICROSOFT,
        outputs=outputs,
        attributes={"epsilon": epsilon},
    )
    return outputs[0], outputs[-1]


def activate(writer: GraphWriter, name: str, kind: str, x: str, bias: str) -> str:
    """The activation `kind` of x + bias."""
    if kind in GELUS:
        return writer.node(GELUS[kind], name, [x, bias], domain=MICROSOFT)
    biased = writer.node("Add", f"{name}/bias", [x, bias])
    if kind == "quick_gelu":
        alpha = {"alpha": QUICK_GELU_ALPHA}
        return writer.node("QuickGelu", name, [biased], domain=MICROSOFT, attributes=alpha)
    return writer.node(PLAIN[kind], name, [biased])
