"""A pickle in one of torch's zip archives, with the storages that lie beside it: what torch.save and TorchScript share.

ROOT/NAME.pkl              the tree, protocol 2; tensors are calls that refer to a storage by persistent id
ROOT/NAME/0, 1, ...        raw storages
ROOT/byteorder             "little" | "big"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Span, Storage, TensorInfo
from ckptool.core.tree import brief
from ckptool.errors import FormatError, UnsupportedError, listed
from ckptool.limits import MAX_BYTEORDER, MAX_PICKLE, Limit
from ckptool.pickling import load as pickles
from ckptool.pickling import torch_calls as rebuild


class Archive(Protocol):
    """What is read of an archive: `ckptool.io.probe.Probe` is one. Records are named below ``root``."""

    @property
    def root(self) -> str: ...
    @property
    def members(self) -> Mapping[str, tuple[Span, int]]: ...
    def record(self, name: str, limit: Limit) -> bytes | None: ...


def is_saved(archive: Archive) -> bool:
    """Returns whether torch.save wrote it; an archive with constants.pkl is TorchScript, for torch.load too."""
    return f"{archive.root}/data.pkl" in archive.members and f"{archive.root}/constants.pkl" not in archive.members


Single = dict[bytes, tuple[TensorInfo, tuple[tuple[str, str], ...]]]
"""{a pickle of one tensor: (the tensor in an archive that has this pickle, its names)}."""

SINGLE = 1024
"""Bytes of the longest pickle that is kept there; a tensor's has some 200."""


def unpickled(
    archive: Archive, name: str = "data", builders: pickles.Builders = rebuild.builders, single: Single | None = None
) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """Returns (tree, names) of ``NAME.pkl``; reads the archive's directory and the pickle.

    Archives of one tensor each that have the same pickle differ in the tensor's storage only: with the same ``single``
    the pickle is run once. Raises: FormatError, LimitError.
    """
    prefix = f"{archive.root}/{name}/"
    refuse_ambiguous(archive, prefix)
    pickled = archive.record(f"{name}.pkl", MAX_PICKLE) or b""
    if single and pickled in single:
        tensor, names = single[pickled]
        old: Any = tensor.source
        span, crc32 = archive.members.get(f"{prefix}{old.key}", (old.span, 0))
        if span is not old.span and span.nbytes == old.nbytes and byteorder_of(archive) == old.byteorder:
            summed = crc32 if crc32 or not span.nbytes else None
            storage = Storage(span, old.dtype, old.location, old.byteorder, summed, old.key)
            return replace(tensor, source=storage), names
    leaf = storages(archive, f"{name}.pkl", prefix)
    pickles.scan(pickled)
    made = pickles.load(pickled, builders=builders, persistent_load=leaf, closed=rebuild.makes_closed_leaves)
    tree, names = made
    if (
        single is not None
        and len(pickled) <= SINGLE
        and isinstance(tree, TensorInfo)
        and tree.storage
        and not tree.extras
    ):
        single[pickled] = made
    return made


def storages(
    archive: Archive, pickle: str, prefix: str, suffix: str = "", numbers: bool = False
) -> Callable[[Any], Storage | rebuild.StorageView]:
    """Returns the function from a persistent id to its storage, the same one for equal keys: for one or more pickles.

    The storage of a key, which may be an integer if ``numbers``, is the member ``prefix`` key ``suffix``; ``pickle``
    names what is read in errors. Raises: FormatError.
    """
    members, byteorder = archive.members, byteorder_of(archive)
    known: dict[str, Storage] = {}
    kinds: dict[tuple[Any, Any, Any], tuple[str | None, str, int]] = {}

    def persistent_load(pid: Any) -> Storage | rebuild.StorageView:
        pid = pid if isinstance(pid, tuple) else rebuild.persistent(pid)
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise FormatError(f"it refers to something that is no storage: {brief(pid)}")
        _, storage_type, key, location, numel = pid[:5]
        if type(key) is not str:
            if not numbers or type(key) is not int:
                raise FormatError(f"a storage's key is {brief(key)}")
            key = str(key)
        exact = type(location) is str and type(numel) is int  # True == 1 == 1.0
        form = kinds.get((storage_type, location, numel)) if exact else None
        if form is None:
            dtype = rebuild.dtype_of_storage(storage_type)
            form = dtype, rebuild.location(location), rebuild.storage_nbytes(dtype, numel)
            kinds[storage_type, location, numel] = form
        dtype, tag, expected = form
        typed = dtype if dtype and DTYPES[dtype].storage else None
        storage = known.get(key)
        if storage is None:
            member = members.get(f"{prefix}{key}{suffix}")
            if member is None:
                raise FormatError(f"the storage {key!r} is named in {pickle} and absent from the archive")
            span, crc32 = member
            if span.nbytes != expected:
                raise FormatError(f"the storage {key!r} has {span.nbytes} bytes; {pickle} says {expected}")
            summed = crc32 if crc32 or not expected else None  # 0: torch was set to compute no CRC-32
            storage = known[key] = Storage(span, typed, tag, byteorder, summed, f"{key}{suffix}")
        elif storage.dtype != typed:
            raise UnsupportedError(f"the storage {key!r} is used under two types: {storage.dtype} and {typed}")
        return storage if typed == dtype else rebuild.StorageView(storage, 0, dtype)

    return persistent_load


def byteorder_of(archive: Archive) -> Literal["little", "big"]:
    """Returns the byte order of the storages. Raises: FormatError for one that there is not."""
    order = archive.record("byteorder", MAX_BYTEORDER)
    if order not in (None, b"little", b"big"):
        raise FormatError(f"its byteorder record reads {order!r}")
    return "big" if order == b"big" else "little"


def refuse_ambiguous(archive: Archive, data: str) -> None:
    """Raises FormatError for member names that torch refuses, or may confuse with another.

    Those of storages, ``data`` and a number, are not looked at.
    """
    members, root = archive.members, archive.root
    names = {name for name in members if not (name.startswith(data) and name[len(data) :].isdecimal())}
    if any(not name.startswith(f"{root}/") for name in names):
        raise FormatError(f"its members are not all below {root}/: torch.load refuses it too")
    alike: dict[str, str] = {}
    twice = []
    for name in names:
        lower = name[len(root) + 1 :].lower()
        if alike.setdefault(lower, name) is not name or (name != (low := f"{root}/{lower}") and low in members):
            twice.append(lower)
    if twice:  # torch finds names in any case
        raise FormatError(f"two zip members differ in case only: {listed(dict.fromkeys(twice))}")
