"""A made-up format: ``EXERCISE``, the header's length in 8 digits, JSON {name: [dtype, shape]}, then the elements."""

from __future__ import annotations

import json
from math import prod
from typing import Any

from ckptool.core.checkpoint import Checkpoint, refuse_tensors
from ckptool.core.dtypes import nbytes_of
from ckptool.core.tensor import Storage, TensorInfo, contiguous_stride
from ckptool.io.output import Output
from ckptool.io.probe import Probe
from ckptool.io.source import Files
from ckptool.values.blocks import tensor_blocks


def matches(probe: Probe) -> bool:
    return probe.head.startswith(b"EXERCISE")


def read(probe: Probe) -> Checkpoint:
    at = 16 + int(probe.head[8:16])
    tree = {}
    for name, (dtype, shape) in json.loads(probe.file.read(16, at - 16)).items():
        storage = Storage(probe.file.span(at, nbytes_of(dtype, prod(shape))), dtype)
        tree[name] = TensorInfo(dtype, tuple(shape), contiguous_stride(tuple(shape)), 0, storage)
        at += storage.nbytes
    return Checkpoint(tree, url=probe.path, nbytes=probe.size)


def header(checkpoint: Checkpoint) -> bytes:
    tensors = checkpoint.state_dict()
    refuse_tensors("exercise", tensors, lambda name, tensor: None)
    text = json.dumps({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}).encode()
    return b"EXERCISE%08d" % len(text) + text


def write(checkpoint: Checkpoint, output: Output, files: Files, map_location: Any) -> tuple[str, ...]:
    output.write(header(checkpoint))
    for tensor in checkpoint.state_dict().values():
        for block in tensor_blocks(tensor, files):
            output.write(block)
    return checkpoint.left_out()


def check(checkpoint: Checkpoint, map_location: Any) -> tuple[tuple[str, ...], int]:
    nbytes = sum(tensor.nbytes for tensor in checkpoint.state_dict().values())
    return checkpoint.left_out(), len(header(checkpoint)) + nbytes
