"""What a graph file consists of, read without the package onnx: operators and types of its inputs."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.core.errors import InputRefused

FLOAT, FLOAT16 = 1, 10  # TensorProto.DataType

# Field numbers of onnx.proto3 (IR version 10) and the two wire types that have to be followed.
MODEL_GRAPH, GRAPH_NODE, GRAPH_INPUT = 7, 1, 11
NODE_OP, NODE_DOMAIN = 4, 7
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_ELEMENT = 1, 2, 1, 1
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

Field = tuple[int, int, int]  # number, begin and end; a varint's value stands for begin


@dataclass(frozen=True)
class GraphFacts:
    """Operators of the main graph with their counts, ``domain::Op`` for those of other domains, and
    the element types (numbers of TensorProto.DataType) of its inputs.
    """

    operators: Mapping[str, int]
    inputs: Mapping[str, int]


def scan_graph(path: Path) -> GraphFacts:
    """Read `path` through a memory map, weights inside it untouched.

    Raises `InputRefused` when the file is missing or not a protobuf message of this form.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _facts(data)
    except OSError as error:
        raise InputRefused(f"{path}: {error.strerror}; expected an exported graph") from error
    except (ValueError, IndexError) as error:
        raise InputRefused(f"{path}: not an ONNX file ({error}); export the model again") from error


def _facts(data: mmap.mmap) -> GraphFacts:
    operators: Counter[str] = Counter()
    inputs: dict[str, int] = {}
    for _, begin, end in _only(data, 0, len(data), MODEL_GRAPH):
        for number, start, stop in _fields(data, begin, end):
            if number == GRAPH_NODE:
                op, domain = (_text(data, start, stop, f) for f in (NODE_OP, NODE_DOMAIN))
                operators[f"{domain}::{op}" if domain else op] += 1
            elif number == GRAPH_INPUT:
                inputs[_text(data, start, stop, VALUE_NAME)] = _element(data, start, stop)
    if not operators:
        raise ValueError("it has no operators")
    return GraphFacts(dict(operators), inputs)


def _element(data: mmap.mmap, begin: int, end: int) -> int:
    for _, a, b in _only(data, begin, end, VALUE_TYPE):
        for _, c, d in _only(data, a, b, TYPE_TENSOR):
            for _, value, _ in _only(data, c, d, TENSOR_ELEMENT):
                return value
    return 0


def _text(data: mmap.mmap, begin: int, end: int, field: int) -> str:
    for _, a, b in _only(data, begin, end, field):
        return data[a:b].decode("utf-8")
    return ""


def _only(data: mmap.mmap, begin: int, end: int, field: int) -> Iterator[Field]:
    return (found for found in _fields(data, begin, end) if found[0] == field)


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[Field]:
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value, value
            continue
        if wire == LENGTH:
            size, at = _varint(data, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > end:
            raise ValueError(f"a field of {size} bytes at byte {at} reaches beyond its message")
        yield number, at, at + size
        at += size


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number longer than 64 bits at byte {at}")
