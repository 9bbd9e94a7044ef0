"""What all ranks must agree on before one of them writes: the keys, and where the bytes of each come from."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Derived, Storage, TensorInfo
from ckptool.core.tree import path_text
from ckptool.errors import FormatError
from ckptool.ranks import world


def writes(checkpoint: Checkpoint, url: str, divided: bool, *how: Any) -> bool:
    """Returns whether this rank writes: all of `world.current` do, or rank 0 alone what is not divided.

    Raises: FormatError, on all ranks, if they would not write the same.
    """
    ranks = world.current
    if ranks is None:
        return True
    if not divided:
        ranks.together(lambda: None)
        world.current = None
        return ranks.leads
    every = ranks.together(lambda: fingerprint(checkpoint, url, *how))
    if len({*every}) > 1:
        rank = next(rank for rank, found in enumerate(every) if found != every[0])
        what = "would write other keys, shapes or values than rank 0: are the inputs the same, and no model drawn anew?"
        ranks.refuse({rank: FormatError(what, url)})
    return True


def fingerprint(checkpoint: Checkpoint, *how: Any) -> str:
    """Returns a text that is the same on every rank that would write the same.

    Reads values only that are in memory: those of a model in code, which every rank has drawn for itself.
    """
    digest = hashlib.sha256(repr(how).encode(errors="surrogatepass"))
    known: dict[int, str] = {}
    for path, tensor in checkpoint.tensors():
        said = f"{path_text(path)}\n{tensor.dtype} {tensor.shape} {tensor.stride} {tensor.storage_offset}"
        digest.update(f"{said} {_source(tensor, known)}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _source(tensor: TensorInfo, known: dict[int, str]) -> str:
    source = tensor.source
    if isinstance(source, Storage):
        span = source.span
        if span.memory is None:
            return f"{os.path.basename(span.url)} {span.offset} {span.nbytes}"
        if id(source) not in known:
            known[id(source)] = hashlib.sha256(span.memory()).hexdigest()
        return known[id(source)]
    if isinstance(source, Derived):
        return f"{source.op} {source.dim} {source.args!r} {[_source(one, known) for one in source.inputs]}"
    return f"{source.kind} {[_source(one, known) for one in source.parts]}"
