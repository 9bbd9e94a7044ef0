"""torch.export archives (.pt2): the weights and the constants of programs; graphs and compiled code are not read.

torch 2.9 and later:

    ROOT/archive_format                             "pt2"; ROOT/archive_version "0"
    ROOT/models/NAME.json                           the graph of a program
    ROOT/data/weights/NAME_weights_config.json      {"config": {key: {path_name, is_param, use_pickle, tensor_meta}}}
    ROOT/data/weights/weight_0, 1, ...              raw storages; with use_pickle files of torch.save
    ROOT/data/constants/NAME_constants_config.json  the same of what no state_dict has: constants, transient buffers
    ROOT/data/constants/tensor_0, custom_obj_0 ...  the latter are pickled objects
    ROOT/data/aotinductor/NAME/                     compiled code; weights_config.json says {key: [record, shape,
                                                    stride, offset]} if the weights are files of torch.save

torch 2.8 has files of torch.save in place of these configurations: ROOT/data/{weights,constants}/NAME.pt. Before, it is
a zip archive of serialized_exported_program.json and of such files: serialized_state_dict.pt, serialized_constants.pt
(2.1: .json). Source: ``torch/export/pt2_archive/_package.py``, ``torch/export/__init__.py`` and
``torch/_export/serde/schema.py`` of torch 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Storage, TensorInfo
from ckptool.core.tree import Global, as_mapping, brief, least_to_refuse, refuse_key
from ckptool.errors import CkptoolError, FormatError, UnsupportedError, listed
from ckptool.io.probe import Probe
from ckptool.io.source import Section, locate
from ckptool.io.zip_read import Member
from ckptool.limits import MAX_BYTEORDER, MAX_INDEX
from ckptool.pickling import torch_calls as rebuild
from ckptool.pickling.archives import byteorder_of, refuse_ambiguous, unpickled

T = TypeVar("T")

OLD = "serialized_exported_program.json"

NUMBERED = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
    34: "uint32", 35: "uint64",
}  # fmt: skip
"""The dtypes by their numbers in the schema."""

STRIDED = 7
"""The number of the layout of tensors that are one view of a storage."""


def matches(probe: Probe) -> bool:
    """Returns whether torch.export.save wrote it, or torch's AOTInductor."""
    return OLD in probe.members or f"{probe.root}/archive_format" in probe.members


def read(probe: Probe) -> Checkpoint:
    """Returns {"state_dict": ..., "constants": ...}; of several programs a dict of these by their names.

    Reads the configurations of the weights, and the pickles in files of torch.save. Raises: FormatError, LimitError,
    UnsupportedError.
    """
    old = OLD in probe.members
    archive = _Archive(probe, "" if old else f"{probe.root}/")
    tree = archive.serialized() if old else archive.programs()
    names, notes = tuple(archive.names), tuple(archive.notes())
    return Checkpoint(tree, url=probe.path, nbytes=probe.size, names=names, notes=notes)


class _Archive:
    """Reads records, which are named below ``root``. ``taken``: those that were asked for.

    ``several``: the names of programs, if there is more than one.
    ``objects``: keys of constants that are no tensors. ``fake``: keys of tensors that were saved without values.
    """

    def __init__(self, probe: Probe, root: str) -> None:
        self.probe = probe
        self.members = {name.removeprefix(root): member for name, member in probe.members.items()}
        self.taken: set[str] = set()
        self.names: dict[tuple[str, str], None] = {}
        self.several: list[str] = []
        self.objects: list[str] = []
        self.fake: list[str] = []
        self._saved: dict[str, Any] = {}
        self._storages: dict[str, tuple[Storage, str]] = {}
        self._byteorder = byteorder_of(probe)

    def serialized(self) -> dict[str, Any]:
        """Returns the tree of an archive of torch 2.1 to 2.7."""
        tree = {}
        for name in ("state_dict", "constants"):
            known = [
                record for record in self.members if record in (f"serialized_{name}.pt", f"serialized_{name}.json")
            ]
            tree[name] = self._mapping(known[0]) if known else {}
            if not known and name == "state_dict":
                raise FormatError("a torch.export archive without serialized_state_dict.pt")
        return _filled(tree)

    def programs(self) -> dict[str, Any]:
        """Returns the tree of an archive of torch 2.8 or later, or of AOTInductor."""
        refuse_ambiguous(self.probe, "")
        for name, expected in (("archive_format", b"pt2"), ("archive_version", b"0")):
            said = self.probe.record(name, MAX_BYTEORDER)
            if said is not None and said.strip() != expected:
                raise UnsupportedError(f"a torch.export archive with {name} {brief(said)}: {expected!r} is supported")
        tree: dict[str, dict[str, Any]] = {}
        code: dict[str, None] = {}
        for record in self.members:
            if record.startswith("models/") and record.endswith(".json"):
                name = record.removeprefix("models/").removesuffix(".json")
                self.taken.add(record)
                parts = {kind: self._payload(folder, name) for kind, folder in _FOLDERS.items()}
                tree.setdefault(name, {}).update(_filled(parts))
            elif record.startswith("data/aotinductor/"):
                name, _, file = record.removeprefix("data/aotinductor/").partition("/")
                code[name] = None
                if file == "weights_config.json":
                    tree.setdefault(name, {})["aotinductor"] = self._compiled(record)
        if not tree and code:
            what = "an AOTInductor package (.pt2): the weights are in its compiled code, which is not read"
            raise UnsupportedError(f"{what}: {listed(code)}")
        if not tree:
            raise FormatError("a torch.export archive (.pt2) without a program (models/NAME.json)")
        if len(tree) == 1:
            return next(iter(tree.values()))
        self.several = list(tree)
        return tree

    def notes(self) -> Iterator[str]:
        """Yields which programs there are, if several, and what is not in the tree."""
        if self.several:
            yield f"several programs, --root NAME/state_dict chooses one: {listed(self.several)}"
        if self.objects:
            yield f"constants that are objects, not tensors, are not read: {listed(self.objects)}"
        if self.fake:
            yield f"tensors that were saved without values (torch reads zeros): {listed(self.fake)}"
        others: dict[str, list[str]] = {what: [] for what in _OTHERS}
        for record in self.members:
            if record not in self.taken and not _KNOWN.match(record):
                others[next(what for what, mark in _OTHERS.items() if re.match(mark, record))].append(record)
        yield from (f"{what}: {listed(found)}" for what, found in others.items() if found)

    # --- weights as raw storages -------------------------------------------------------------------------------------

    def _payload(self, folder: str, name: str) -> Any:
        """Returns {key: tensor} of the weights or the constants of a program; a pickled one may be any object."""
        if f"data/{folder}/{name}.pt" in self.members:  # torch 2.8
            return self._mapping(f"data/{folder}/{name}.pt")
        record = f"data/{folder}/{name}_{folder}_config.json"
        found: dict[str, Any] = {}
        least = least_to_refuse()
        for key, entry in _field(self._json(record), "config", dict).items():
            if len(key) >= least:
                refuse_key(key)
            try:
                path = _field(entry, "path_name", str)
                if folder == "constants" and path.startswith(("custom_obj_", "opaque_obj_")):
                    self._taken(f"data/{folder}/{path}")
                    self.objects.append(key)
                elif _field(entry, "use_pickle", bool):
                    found[key] = self._torch_file(f"data/{folder}/{path}")
                else:
                    found[key] = self._raw(key, f"data/{folder}/{path}", entry)
            except CkptoolError as error:
                error.message = f"{record}: {brief(key)}: {error.message}"
                raise
        return found

    def _raw(self, key: str, record: str, entry: dict[str, Any]) -> TensorInfo:
        """Returns a view of a record. Raises: FormatError if it reaches outside."""
        dtype, location, shape, stride, offset, grad = _meta(entry.get("tensor_meta"))
        is_param = _field(entry, "is_param", bool)
        storage = self._storage(record, dtype, location)
        if storage.nbytes or 0 in shape:
            made = rebuild.strided(storage, offset, shape, stride, dtype=dtype)
            return TensorInfo(dtype, made.shape, made.stride, offset, storage, grad, is_param)
        self.fake.append(key)
        build = rebuild.builders["torch._utils", "_rebuild_meta_tensor_no_storage"]
        meta: TensorInfo = build(Global.named("torch", dtype), shape, stride, grad)
        return replace(meta, is_parameter=is_param)

    def _storage(self, record: str, dtype: str, location: str) -> Storage:
        """Returns the storage that is a record, the same one each time."""
        if record not in self._storages:
            span, crc32 = self._taken(record)
            typed = dtype if DTYPES[dtype].storage else None
            name = record.rpartition("/")[2]
            self._storages[record] = Storage(span, typed, location, self._byteorder, crc32 or None, name), dtype
        storage, known = self._storages[record]
        if (known, storage.location) != (dtype, location):
            what = f"{known} on {storage.location} and {dtype} on {location}"
            raise FormatError(f"{record} is used as two tensors that cannot share memory: {what}")
        return storage

    # --- weights as files of torch.save ------------------------------------------------------------------------------

    def _compiled(self, record: str) -> dict[str, TensorInfo]:
        """Returns the weights that lie beside compiled code: views of the tensors in files of torch.save."""
        found: dict[str, TensorInfo] = {}
        for key, row in self._json(record).items():
            refuse_key(key)
            if not isinstance(row, list) or len(row) != 4 or type(row[0]) is not str:
                raise FormatError(f"{record}: {brief(key)} is {brief(row)}: expected [name, shape, stride, offset]")
            whole = self._torch_file(f"data/weights/{row[0]}")
            if not isinstance(whole, TensorInfo):
                raise FormatError(f"data/weights/{row[0]} holds {brief(whole)}: expected a tensor")
            found[key] = rebuild.strided(whole.source, row[3], row[1], row[2], dtype=whole.dtype)
        return found

    def _mapping(self, record: str) -> Any:
        """Returns the dict in a file of torch.save; torch writes no bytes for an empty one."""
        tree = self._torch_file(record)
        if as_mapping(tree) is None:
            raise FormatError(f"{record} holds {brief(tree)}: expected a dict of tensors")
        return tree

    def _torch_file(self, record: str) -> Any:
        """Returns the tree in a record that torch.save wrote, the same one each time."""
        if record not in self._saved:
            file, span = self.probe.file, self._taken(record).span
            if span.member == "deflated":
                raise UnsupportedError(f"{record} is compressed in the archive: zip it again without compression")
            section = Section(file, locate(file, span).offset, span.nbytes)
            tree: Any = {}
            try:
                with Probe(self.probe.path, lambda _: section) as inner:
                    if inner.size:
                        if not inner.head.startswith(b"PK\3\4"):
                            raise FormatError("is no file of torch.save")
                        tree, names = unpickled(inner)
                        self.names.update(dict.fromkeys(names))
            except CkptoolError as error:
                error.message = f"{record}: {error.message}"
                raise
            self._saved[record] = tree
        return self._saved[record]

    def _json(self, record: str) -> dict[str, Any]:
        self.taken.add(record)
        return self.probe.json(record, MAX_INDEX)

    def _taken(self, record: str) -> Member:
        if record not in self.members:
            raise FormatError(f"{record} is absent from the archive: was its save or its download cut off?")
        self.taken.add(record)
        return self.members[record]


_FOLDERS = {"state_dict": "weights", "constants": "constants"}

_KNOWN = re.compile(rf"(archive_format|archive_version|byteorder|version|{OLD})\Z|\.data/")
"""Records that need no note."""

_OTHERS = {
    "sample inputs, which are not read": r"data/sample_inputs/|serialized_example_inputs\.",
    "files of the user, which are not read": r"extra(_files)?/",
    "compiled code, which is not read": r"data/(aotinductor|executorch)/",
    "also in the archive, and not read": "",
}


def _filled(parts: dict[str, Any]) -> dict[str, Any]:
    """Returns the parts of a program without constants if there are none."""
    return {name: part for name, part in parts.items() if part or name == "state_dict"}


def _field(entry: Any, name: str, kind: type[T]) -> T:
    """Returns a field of a JSON object."""
    found = entry.get(name) if isinstance(entry, dict) else None
    if type(found) is not kind:
        raise FormatError(f"its {name} is {brief(found)}: expected {kind.__name__}")
    return found


def _meta(meta: Any) -> tuple[str, str, tuple[int, ...], tuple[int, ...], int, bool]:
    """Returns (dtype, device tag, shape, stride, offset, requires_grad) of a tensor as the schema describes it."""
    try:
        number, layout, grad = meta["dtype"], meta["layout"], meta["requires_grad"]
        kind, index = meta["device"]["type"], meta["device"].get("index")
        shape = tuple([size["as_int"] for size in meta["sizes"]])
        stride = tuple([step["as_int"] for step in meta["strides"]])
        offset = meta["storage_offset"]["as_int"]
    except (AttributeError, KeyError, TypeError) as error:
        raise FormatError(f"its tensor_meta is {brief(meta, 400)}: expected what torch.export writes") from error
    numbers = (number, layout, offset, 0 if index is None else index, *shape, *stride)
    if not _INT.issuperset(map(type, numbers)) or type(grad) is not bool or type(kind) is not str:
        raise FormatError(f"its tensor_meta has a value of a wrong type: {brief(meta, 400)}")
    if number not in NUMBERED or layout != STRIDED:
        raise UnsupportedError(f"has dtype {number} and layout {layout} of torch's schema, which are not known")
    return NUMBERED[number], kind if index is None else f"{kind}:{index}", shape, stride, offset, grad


_INT = frozenset({int})
