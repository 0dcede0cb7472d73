"""Shape of CNN-Transformer: DenseNet cells, encoder layers over them, a decoder with cross-attention."""

from __future__ import annotations

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    DecoderShape,
    EncoderShape,
    ModelShape,
    Weights,
    batch_norm,
    convolution,
    embedding,
    linear,
    norm,
    other,
    plain_blocks,
)
from exporter.families.shapes.read import biased_decoder
from exporter.families.specs.densenet import DenseNetSpec


def cnn_transformer(facts: ConfigFacts) -> ModelShape:
    """DenseNet, torch's encoder and decoder layers; no image token in the prompt."""
    spec = DenseNetSpec(
        growth=facts.size("growth_rate"),
        blocks=facts.counts("block_config", ()),
        first=facts.size("num_init_features"),
        bottleneck=facts.size("bn_size"),
        prefix="",
    )
    side, hidden = facts.size("image_size"), facts.size("hidden_size")
    inner, heads = facts.size("intermediate_size"), facts.size("num_attention_heads")
    below, cells = facts.size("encoder_layers"), spec.cells(side) ** 2
    maps, convolutions = _densenet(spec, side)
    tower = EncoderShape(hidden, inner, heads, cells, (cells,) * below, side=side, maps=maps)
    d = DecoderShape(
        layers=facts.size("decoder_layers"),
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=facts.size("vocab_size"),
        max_positions=facts.size("max_position_embeddings"),
        image_tokens=0,
        tied=facts.flag("tie_word_embeddings", False),
        cross_layers=facts.size("decoder_layers"),
        cross_tokens=cells,
        cross_width=hidden,
    )
    weights = (
        *convolutions,
        *linear("vision", hidden, spec.channels, bias=True, rows_in=cells),
        *other("vision", cells, hidden),
        *plain_blocks("vision", below, hidden, inner, cells),
        *embedding(d),
        *other("decoder", d.max_positions, hidden),
        *biased_decoder(d),
        *linear("decoder", hidden, hidden, count=2 * d.layers, bias=True),
        # Keys and values of the cells: once for each image.
        *linear("decoder", 2 * hidden, hidden, count=d.layers, bias=True, rows_in=0),
        *norm("decoder", hidden, count=3 * d.layers),
    )
    return ModelShape("captioner", weights, tower, decoder=d)


def _densenet(spec: DenseNetSpec, side: int) -> tuple[int, tuple[Weights, ...]]:
    """Values of the feature maps that live together, and all kernels and norms.

    A layer's input lives on beside its normed copy and the bottleneck's output, since it becomes a
    part of the layer's own output.
    """
    inner = spec.bottleneck * spec.growth
    stem = -(-side // 2)
    edge = -(-stem // 2)
    weights = [*convolution(spec.first, 3, 7, stem**2), *batch_norm(spec.first)]
    maps = spec.first * (stem**2 + edge**2)
    for block in spec.dense_blocks():
        places = edge**2
        for layer in block.layers:
            weights += (*batch_norm(layer.inputs), *convolution(inner, layer.inputs, 1, places))
            weights += (*batch_norm(inner), *convolution(spec.growth, inner, 3, places))
            maps = max(maps, (2 * layer.inputs + max(inner, 2 * spec.growth)) * places)
        if block.transition:
            half = block.outputs // 2
            weights += (*batch_norm(block.outputs), *convolution(half, block.outputs, 1, places))
            edge //= 2
        maps = max(maps, 2 * block.outputs * places)
    return maps, (*weights, *batch_norm(spec.channels))
