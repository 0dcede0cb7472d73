"""Vision transformers of primitive operators: `graphs.vit.Vit` without onnxruntime's own."""

from __future__ import annotations

from exporter.core.errors import InputRefused
from exporter.families.base import VitSpec
from exporter.graphs.matrices import Matrix
from exporter.graphs.standard.linear import Weights
from exporter.graphs.standard.ops import Ops
from exporter.graphs.vit import QUICK_GELU_ALPHA, Stream, Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter

# Gelu of ai.onnx: by the error function, or its approximation by tanh (arXiv 1606.08415).
GELU_FORMS = {"gelu": "none", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}


class StandardVit(Vit):
    """The same pieces of a tower; values are float32 ``[tiles, rows, hidden]``."""

    def __init__(self, writer: GraphWriter, spec: VitSpec, weights: WeightSource) -> None:
        super().__init__(writer, spec, weights, accuracy_level=0)
        self.ops = Ops(writer)
        self.matrices = Weights(writer)

    def norm(self, tensor: str, x: Stream, *, last: bool = False) -> tuple[str, str]:  # noqa: ARG002
        """Layer norm of the stream's sum, and that sum (also of the `last`: it is there anyway)."""
        name, size = self._short(tensor), self.spec.hidden_size
        summed = self.total(f"{name}/sum", x)
        scale, shift = self.vector(f"{tensor}.weight", size), self.vector(f"{tensor}.bias", size)
        settings = {"epsilon": self.spec.norm_eps, "axis": -1}
        inputs = [summed, scale, shift]
        normed = self.writer.node("LayerNormalization", name, inputs, attributes=settings)
        return normed, summed

    def activate(self, name: str, kind: str, x: str, bias: str) -> str:
        """The activation `kind` of x + bias. Raises `InputRefused` for one that ai.onnx lacks."""
        biased = self.writer.node("Add", f"{name}/bias", [x, bias])
        if kind == "quick_gelu":
            return self.ops.swish(name, biased, QUICK_GELU_ALPHA)
        if kind not in GELU_FORMS:
            raise InputRefused(
                f"the standard dialect has no activation '{kind}'; export with --dialect ort"
            )
        form = {"approximate": GELU_FORMS[kind]}
        return self.writer.node("Gelu", name, [biased], attributes=form)

    def multiply(self, name: str, x: str, matrix: Matrix, *, output: str | None = None) -> str:
        """``x @ matrix.T``; `output` names the result."""
        return self.matrices.product(name, x, matrix, output=output)

    def attend(self, name: str, values: list[str], bias: str) -> str:
        """Attention of queries, keys and values ``[tiles, rows, hidden]`` plus their parts of `bias`."""
        size, heads = self.spec.hidden_size, self.spec.heads
        biases = [f"{name}.{part}_bias" for part in "qkv"]
        thirds = {"axis": 0, "num_outputs": 3}
        self.writer.node("Split", f"{name}.biases", [bias], outputs=biases, attributes=thirds)
        query, key, value = (
            self.ops.heads(
                f"{name}.{part}",
                self.writer.node("Add", f"{name}.{part}/biased", [made, added]),
                heads,
                size // heads,
            )
            for part, made, added in zip("qkv", values, biases, strict=True)
        )
        scale = self.ops.number((size // heads) ** -0.5)
        query = self.writer.node("Mul", f"{name}.q/scaled", [query, scale])
        return self.ops.attention(f"{name}.attention", query, key, value, size)
