"""A plain pickle, not written by torch.save, as ``pickle.dump(state_dict)`` writes it.

detectron2's model zoo has such files (``{"model": {name: ndarray}}``), and Paddle's ``.pdparams`` are.

The file is one pickle, of any protocol. Arrays are part of it, so they are read into memory. A tensor's storage is
``torch.storage._load_from_bytes(bytes)``; the bytes are in torch's legacy format, with that storage as the tree.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Array, Span, Storage
from ckptool.core.tree import PyObject, brief, nodes
from ckptool.errors import FormatError, UnsupportedError, listed
from ckptool.io.probe import Probe
from ckptool.limits import MAX_PICKLE
from ckptool.pickling import load as pickles
from ckptool.pickling import torch_calls as rebuild
from ckptool.pickling.streams import calls

_OLD = re.compile(rb"\((?:[dl]p?\d*\n|[dl]q.)|[}\]][q(].|c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n", re.DOTALL)
"""How a dict, a list, or an object begins in protocols 0 and 1."""

_STREAM = (
    b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00(X\x10\x00\x00\x00"
    b"protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq\x02\x88X\n\x00\x00\x00type_sizesq\x03}q\x04("
    b"X\x05\x00\x00\x00shortq\x05K\x02X\x03\x00\x00\x00intq\x06K\x04X\x04\x00\x00\x00longq\x07K\x04uu."
)
"""The first bytes of torch's legacy format: magic number, version, and the system info of a little-endian machine."""

_REFUSED = {
    **dict.fromkeys(
        (("joblib.numpy_pickle", "NDArrayWrapper"), ("joblib.numpy_pickle", "ZNDArrayWrapper")),
        "a joblib file of before 0.10, whose arrays are in files beside it",
    ),
    ("torch.distributed.checkpoint.metadata", "Metadata"): "the .metadata of a distributed checkpoint (DCP), renamed",
}


def matches(probe: Probe) -> bool:
    """Returns whether it begins like a pickle; protocols 0 and 1 have no PROTO opcode, so it must also end like one."""
    head = probe.head
    if head[:1] == b"\x80":
        return head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return _OLD.match(head) is not None and probe.file.read(probe.size - 1, 1) == b"."


def read(probe: Probe) -> Checkpoint:
    """Returns the checkpoint; reads the whole file. Raises: FormatError, LimitError, UnsupportedError."""
    file = probe.file
    if file.size > MAX_PICKLE.now():
        raise MAX_PICKLE.passed("the pickle is too long", file.size)
    pickled = file.read(0, file.size)
    end = pickles.scan(pickled)
    nested = _Nested(file.span(0, 0))
    builders = {**rebuild.builders, _STORAGE: nested.storage}
    tree, names = pickles.load(pickled, builders=builders)
    for name, what in _REFUSED.items():
        if name in names:
            raise UnsupportedError(f"{what}, which is not supported yet", file.path)
    if end < file.size:
        what = f"a plain pickle ends at byte {end}, and {file.size - end} bytes follow it{calls(names)}"
        raise FormatError(what, file.path)
    paddle = _without_names(tree) if not _TUPLE.isdisjoint(names) else ()
    tree = pickles.with_arrays(tree, names, file.span(0, 0), keep=False)
    every = tuple(name for name in dict.fromkeys((*names, *nested.names)) if name != _STORAGE)  # its bytes were read
    notes = (
        (f"Paddle's tensors (uint16 is its bfloat16), without the names in them: {listed(paddle)}",) if paddle else ()
    )
    return Checkpoint(tree, url=file.path, nbytes=file.size, names=every, notes=notes)


_TUPLE = {("builtins", "tuple"), ("__builtin__", "tuple")}


def _without_names(tree: Any) -> list[str]:
    """Puts arrays in the place of Paddle's tensors, which are calls ``tuple((name, array))``; returns the names."""
    found = []
    for node in list(nodes(tree)):
        for key, value in list(node.items()) if isinstance(node, dict) else ():
            if isinstance(value, PyObject) and (value.module, value.qualname) in _TUPLE and len(value.args) == 1:
                inner = value.args[0]
                if isinstance(inner, tuple) and len(inner) == 2 and isinstance(inner[0], str):
                    node[key] = inner[1]
                    found.append(inner[0])
    return found


_STORAGE = ("torch.storage", "_load_from_bytes")


class _Nested:
    """The storages of pickled tensors; ``names`` are the globals in the pickles nested inside them.

    Bytes that several calls share are read once: ``made`` maps id(bytes) to the bytes, kept so that the id stays
    valid, and their storage. ``nbytes`` is the sum of all bytes read, which `MAX_PICKLE` limits as if one pickle.
    """

    def __init__(self, span: Span) -> None:
        self.span = span
        self.names: dict[tuple[str, str], None] = {}
        self.made: dict[int, tuple[Any, Storage]] = {}
        self.nbytes = 0

    def storage(self, *args: Any) -> Storage:
        """Returns the storage that ``_load_from_bytes(*args)`` would load. Raises: CkptoolError."""
        from ckptool.pickling.numpy_calls import raw_bytes

        raw = args[0] if len(args) == 1 else None
        if id(raw) in self.made:
            return self.made[id(raw)][1]
        data = raw_bytes(raw)
        if data is None:
            raise FormatError(f"a tensor's storage is made of {brief(args)}")
        self.nbytes += len(data)
        if self.nbytes > MAX_PICKLE.now():
            raise MAX_PICKLE.passed("the pickles of its tensors are too long together")
        data = bytes(data)
        if not data.startswith(_STREAM):
            raise UnsupportedError("a pickled tensor whose bytes are not the stream that torch writes there")
        pid, end = self.pickle(data, len(_STREAM))
        keys, end = self.pickle(data, end)
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and keys == [pid[2]]):
            raise FormatError(f"a pickled storage calls itself {brief(pid)}, and lists {brief(keys)}")
        dtype = rebuild.dtype_of_storage(pid[1])
        nbytes = rebuild.storage_nbytes(dtype, pid[4])
        if len(data) != end + 8 + nbytes or struct.unpack_from("<q", data, end)[0] != pid[4] or any(pid[5:]):
            raise FormatError(f"a pickled storage of {brief(pid[4])} elements is not that long")
        memory = Array(memoryview(data)[end + 8 :])
        made = Storage(self.span._replace(nbytes=nbytes, memory=memory), dtype, rebuild.location(pid[3]))
        if not isinstance(raw, bytearray):  # a bytearray may be changed by the pickle before the next call
            self.made[id(raw)] = raw, made
        return made

    def pickle(self, data: bytes, start: int) -> tuple[Any, int]:
        end = pickles.scan(data, start)
        made, names = pickles.load(data, start, persistent_load=lambda pid: pid)
        self.names.update(dict.fromkeys(names))
        return made, end
