"""Attention without a past, in the graph's dialect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporter.graphs.writer import MICROSOFT, GraphWriter


def attention(
    writer: GraphWriter, name: str, inputs: Sequence[str], heads: int, head_dim: int
) -> str:
    """Softmax attention (arXiv 1706.03762), ``[batch, length, heads * head_dim]``.

    `inputs` are those of onnxruntime's MultiHeadAttention: queries; keys and values (as they are, or
    graph inputs by heads ``[batch, heads, rows, head_dim]``); then, each may be left out or "", biases
    of all three in one vector, the length int32 ``[batch]`` of each row's keys, and what is added to
    the scores.
    """
    if writer.dialect is not None:
        return writer.dialect.attention(name, inputs, heads, head_dim)
    # Without a mask onnxruntime's CPU kernel works in blocks: no length x length matrix.
    return writer.node(
        "MultiHeadAttention",
        name,
        inputs,
        domain=MICROSOFT,
        attributes={"num_heads": heads, "scale": float(np.float32(head_dim**-0.5))},
    )
