"""Shape of CRIS: CLIP's ResNet and text transformer, a pyramid that joins both, a decoder of masks."""

from __future__ import annotations

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    EncoderShape,
    ModelShape,
    Weights,
    batch_norm,
    convolution,
    linear,
    norm,
    other,
    plain_blocks,
)
from exporter.families.shapes.resnet import bottleneck_maps
from exporter.families.specs.cris import (
    STRIDE,
    TAPS,
    Convolved,
    CrisImage,
    CrisMask,
    CrisSizes,
    cris_sizes,
)


def cris(facts: ConfigFacts) -> ModelShape:
    """CRIS for one image and one expression of its full length.

    The tower is that of both graphs that see pixels: its rows are the cells of the grid on which words
    are looked for, its maps those of the ResNet and of the mask's upsampling. What the mask's graph
    makes of the text alone is counted with the text.
    """
    sizes = cris_sizes(facts.values)
    cells, dim, words = sizes.grid**2, sizes.dim, sizes.word_len
    maps, image = _image(CrisImage(sizes))
    # Attention over the deepest cells, then of the grid to itself and to the words, in each layer.
    pooled = (cells // 4) ** 2 * sizes.deep // (cells * dim)
    tower = EncoderShape(
        hidden=dim,
        inner=sizes.dim_ffn,
        heads=sizes.num_head,
        sequence=cells,
        attended=(pooled, *(cells, words) * sizes.num_layers),
        side=sizes.input_size,
        # What the second upsampling and the layer behind it give: four times the grid's edges.
        maps=maps + 16 * (dim + dim // 2) * cells,
    )
    width = sizes.text_width
    text = EncoderShape(width, 4 * width, sizes.text_heads, words, (words,) * sizes.text_layers)
    return ModelShape("segmenter", (*image, *_text(sizes), *_mask(sizes)), tower, text)


def _image(spec: CrisImage) -> tuple[int, tuple[Weights, ...]]:
    """ResNet, pooling and the pyramid's first layers; strides are average pools."""
    sizes, deep, size = spec.sizes, spec.sizes.deep, spec.sizes.embed_dim
    edge = sizes.input_size // 2
    weights: list[Weights] = []
    for outputs, inputs, _ in spec.stem():
        weights += (*convolution(outputs, inputs, 3, edge**2), *batch_norm(outputs))
    maps = (sizes.vision_width // 2 + sizes.vision_width) * edge**2
    edge //= 2
    for _, block in spec.blocks():
        before, edge = edge, edge // block.stride
        weights += (
            *convolution(block.planes, block.inputs, 1, before**2),
            *convolution(block.planes, block.planes, 3, before**2),
            *convolution(block.outputs, block.planes, 1, edge**2),
            *batch_norm(block.planes, count=2),
            *batch_norm(block.outputs),
        )
        if block.downsampled:
            weights += convolution(block.outputs, block.inputs, 1, edge**2)
            weights += batch_norm(block.outputs)
        inside = 2 * block.planes * before**2
        taken, given = block.inputs * before**2, block.outputs * edge**2
        maps = max(maps, bottleneck_maps(taken, inside, given, projected=block.downsampled))
    cells = edge**2
    weights += (
        *other("vision", spec.cells**2 + 1, deep),
        *linear("vision", deep, deep, count=3, bias=True, rows_in=cells),
        *linear("vision", size, deep, bias=True, rows_in=cells),
        *convolution(size, deep, 1, cells),
        *batch_norm(size),
    )
    for level, scale in zip(spec.levels(), (4, 2, 1), strict=True):
        weights += _convolved(level, (scale * edge) ** 2)
    return maps, tuple(weights)


def _text(sizes: CrisSizes) -> tuple[Weights, ...]:
    """CLIP's text transformer; its scale is kept and not used."""
    width = sizes.text_width
    return (
        Weights("text", "embedding", sizes.vocab_size, width),
        *other("text", sizes.context_length, width),
        *plain_blocks("text", sizes.text_layers, width, 4 * width, sizes.word_len),
        *norm("text", width),
        *linear("text", sizes.embed_dim, width),
        *other("text", 1),
    )


def _mask(sizes: CrisSizes) -> tuple[Weights, ...]:
    """Pyramid, decoder and the kernel made of the text."""
    spec, dim, cells = CrisMask(sizes), sizes.dim, sizes.input_size**2 * 4 // STRIDE**2
    deepest, kernel, layers = sizes.pyramid[2], dim // 2, sizes.num_layers
    weights: list[Weights] = [
        *linear("text", deepest, sizes.embed_dim),
        *batch_norm(deepest, count=2),
    ]
    for name, level in spec.joins().items():
        weights += _convolved(level, cells // 4 if name == "f4_proj5" else cells)
    for level, places in zip(spec.upsampled(), (4 * cells, 16 * cells), strict=True):
        weights += _convolved(level, places)
    return (
        *weights,
        *convolution(kernel, kernel, 1, 16 * cells),
        *other("vision", kernel),
        *linear("text", kernel * TAPS + 1, sizes.embed_dim, bias=True),
        # Own attention and queries and output of that to the words, whose keys and values are few.
        *linear("vision", dim, dim, count=6 * layers, bias=True, rows_in=cells),
        *linear("vision", dim, dim, count=2 * layers, bias=True, rows_in=sizes.word_len),
        *linear("vision", sizes.dim_ffn, dim, count=layers, bias=True, rows_in=cells),
        *linear("vision", dim, sizes.dim_ffn, count=layers, bias=True, rows_in=cells),
        *norm("vision", dim, count=5 * layers + 1),
        *norm("vision", sizes.dim_ffn, count=layers),
    )


def _convolved(spec: Convolved, places: int) -> tuple[Weights, ...]:
    """A convolution with its norm."""
    kernel = convolution(spec.outputs, spec.inputs, spec.side, places)
    return (*kernel, *batch_norm(spec.outputs))
