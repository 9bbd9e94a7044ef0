"""Names the models that are protocol buffers (ONNX, TensorFlow, Core ML, Caffe), which have no magic number.

A message is a sequence of fields, each a tag (field number * 8 + wire type) and its value: 0 a varint, 1 eight bytes,
2 a length and as many bytes (a string or a message), 5 four bytes. A file is taken for a model if its first `MOST`
fields have numbers and wire types of the model's schema, and reach the end of the file if there are fewer.
Sources: onnx.proto, saved_model.proto, meta_graph.proto, graph.proto, Model.proto (Core ML), caffe.proto, caffe2.proto.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

MOST = 64
"""Fields of a message that are looked at."""

ReadAt = Callable[[int, int], bytes]


class Field(NamedTuple):
    """A field: its number and wire type, and where its value begins and ends."""

    number: int
    wire: int
    begin: int
    end: int


def kind(read_at: ReadAt, size: int) -> str | None:
    """Returns what model a file of ``size`` bytes is, None if it is none of those known."""
    fields = _fields(read_at, 0, size)
    seen = {(field.number, field.wire) for field in fields}
    if not fields:
        return None

    def inner(number: int) -> set[tuple[int, int]]:
        """Returns (number, wire type) of the fields of the first message with this number."""
        found = next((field for field in fields if (field.number, field.wire) == (number, 2)), None)
        return {(one.number, one.wire) for one in _fields(read_at, found.begin, found.end)} if found else set()

    if {(1, 0), (7, 2)} <= seen <= {(1, 0), (5, 0), *((n, 2) for n in (2, 3, 4, 6, 7, 8, 14, 20, 25, 26))}:
        return "an ONNX model"
    if {(1, 0), (2, 2)} == seen and inner(2):
        return "a TensorFlow SavedModel (.pb)"
    layers = seen - {(1, 0), (2, 2), (10, 0)}
    if {(1, 0), (2, 2)} <= seen and layers and all(wire == 2 and number >= 200 for number, wire in layers):
        return "a Core ML model (.mlmodel)"
    node = {(1, 2), (2, 2)}
    if seen <= {(1, 2), (2, 2), (3, 0), (4, 2), (5, 2)} and node <= inner(1):
        return "a TensorFlow graph (.pb)"
    if node <= seen <= {(n, 2) for n in range(1, 9)} and (5, 2) in inner(1) and (1, 2) in inner(2):
        return "a TensorFlow MetaGraph (.meta)"
    if node <= inner(100) or {(4, 2), (5, 0)} <= inner(2):
        return "a Caffe model (.caffemodel)"
    if seen <= {(1, 2), (2, 2), (3, 2), (4, 0), (5, 2), (6, 2), (7, 2), (8, 2), (9, 2)} and (4, 2) in inner(2):
        return "a Caffe2 net (.pb)"
    return None


def _fields(read_at: ReadAt, begin: int, end: int) -> list[Field]:
    """Returns the first fields of the message between two offsets; [] if it is none."""
    found: list[Field] = []
    at = begin
    while at < end and len(found) < MOST:
        head = read_at(at, min(20, end - at))
        tag, used = _varint(head, 0)
        value, after = _varint(head, used)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            begins = at + used
            at += after
        elif wire in (1, 5):
            begins, at = at + used, at + used + (8 if wire == 1 else 4)
        elif wire == 2:
            begins, at = at + after, at + after + value
        else:
            return []
        if not used or not number or at > end or (wire in (0, 2) and after <= used):
            return []
        found.append(Field(number, wire, begins, at))
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns (number, offset behind it); the offset is ``at`` itself if none begins there."""
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    return 0, at
