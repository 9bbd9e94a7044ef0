"""Distributed checkpoints (DCP): a directory that torch.distributed.checkpoint wrote.

    .metadata                         a pickle of Metadata: the boxes of every tensor, and where each item is
    __0.metadata, __1.metadata ...    instead of it, one of each process, if it was saved without collectives
    __0_0.distcp, __1_0.distcp ...    items, one behind the other

An item is one box of a tensor or one Python value, as torch.save writes it. With SAFETENSORS the tensors of a file are
one safetensors file behind the other items.
Nested containers were flattened when saving: ``planner_data`` maps each name to its path. Names of mappings are strings
there, so the ids in an optimizer's state are made integers again. Source: ``metadata.py``, ``filesystem.py`` and
``_nested_dict.py`` of ``torch/distributed/checkpoint``, torch 2.13.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Box, Opaque, TensorInfo, chunks, is_countable
from ckptool.core.tree import Global, PyObject, brief, walk
from ckptool.directories import sets
from ckptool.errors import CkptoolError, FormatError, IncompleteError, UnsupportedError, listed
from ckptool.formats.safetensors_file import sharding
from ckptool.io.probe import Probe
from ckptool.io.source import Files, LocalFile, Section, names_in
from ckptool.limits import MAX_LEVELS, MAX_PICKLE
from ckptool.pickling import load as pickles
from ckptool.pickling import torch_calls

LABEL = "dcp"

METADATA = re.compile(r"\.metadata|__\d{1,9}\.metadata")
"""Names of the files that say what is where."""

MERGED = ("common.pt", "meta.pt")
"""Files of values that are not sharded: Megatron-core's (dist_checkpointing) and Lightning's (FSDPStrategy)."""

GAPS = 1000
"""List positions that may be empty: a list of torch has None where an element held nothing to save."""


def matches(probe: Probe) -> bool:
    """Returns whether it is such a directory, or one of its files; a directory of a known loader's files is not."""
    if not probe.is_directory:
        if isinstance(probe.file, Section):  # an item
            return False
        if METADATA.fullmatch(probe.name):
            return probe.head[:1] == b"\x80"
        return probe.name.endswith(".distcp") and bool(_metadata_files(names_in(os.path.dirname(probe.path) or ".")))
    ours = any(METADATA.fullmatch(name) or name.endswith((".distcp", ".metadata.tmp")) for name in probe.names)
    return ours and not any(found.loader for found in sets.sets_in(probe.names))


def _metadata_files(names: Sequence[str]) -> list[str]:
    found = sorted((name for name in names if METADATA.fullmatch(name)), key=lambda name: (len(name), name))
    return [".metadata"] if ".metadata" in found else found


def read(probe: Probe, open_: Callable[..., Checkpoint]) -> Checkpoint:
    """Returns the checkpoint: the metadata is read, and the header of every item.

    Raises: IncompleteError for files, items or parts of tensors that are missing; UnsupportedError for transformed
    (compressed) items; FormatError, LimitError.
    """
    directory = probe.path if probe.is_directory else os.path.dirname(probe.path) or "."
    names = sorted(names_in(directory))
    files = _metadata_files(names)
    if not files:
        raise IncompleteError(
            "a torch.distributed checkpoint (DCP) without .metadata: was its save cut off?", directory
        )
    saved = _Saved()
    for name in files:
        path = os.path.join(directory, name)
        try:
            saved.add(path)
        except CkptoolError as error:
            error.path = error.path or path
            raise
    reader = _Items(directory, saved, open_)
    with reader.files:
        try:
            tree = _nested({key: reader.value(key) for key in saved.order()}, saved.paths)
        except CkptoolError as error:
            error.path = error.path or directory
            raise
        nbytes = sum(reader.files.open(path).size for path in reader.used)
        merged = list(_merge(tree, directory, names, open_))
    used = {*files, *map(os.path.basename, [*reader.used, *(one.url for one, _ in merged)])}
    notes = (*reader.notes(), *(note for _, note in merged), *_beside(directory, names, used))
    nbytes += sum(one.nbytes for one, _ in merged)
    nbytes += sum(os.path.getsize(os.path.join(directory, name)) for name in files)
    url = os.path.join(directory, files[0])
    every = tuple(dict.fromkeys((*saved.names, *reader.names, *(name for one, _ in merged for name in one.names))))
    return Checkpoint(tree, format=LABEL, url=url, nbytes=nbytes, names=every, notes=notes)


def _merge(
    tree: Any, directory: str, names: Sequence[str], open_: Callable[..., Checkpoint]
) -> Iterator[tuple[Checkpoint, str]]:
    """Adds to the tree what lies in a file beside the items, as its loader does; yields the file and a note."""
    for name in MERGED:
        if name in names and isinstance(tree, dict):
            found = open_(os.path.join(directory, name))
            if isinstance(found.tree, dict):
                twice = [key for key in found.tree if key in tree]
                tree.update((key, value) for key, value in found.tree.items() if key not in tree)
                less = f"; not {listed(twice)}, which the items have too" if twice else ""
                yield found, f"from {name}: {listed(key for key in found.tree if key not in twice)}{less}"


def _beside(directory: str, names: Sequence[str], used: set[str]) -> list[str]:
    """Returns notes on what else lies in the directory."""
    unnamed = [name for name in names if name.endswith(".distcp") and name not in used]
    rest = [*unnamed, *sets.others(directory, names, used)]
    notes = sets.trainers_state(names, used)
    notes += [f"also here, and not read: {listed(rest)}"] if rest else []
    if ".metadata.tmp" in names:
        notes.append(".metadata.tmp is left of a save that was cut off: the files may be newer than .metadata")
    return notes


# --- metadata --------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A box of a tensor: its first index and its size along every dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class _Entry(NamedTuple):
    """A tensor and its boxes; ``dtype`` is None for a Python value."""

    dtype: str | None
    shape: tuple[int, ...] = ()
    parts: tuple[_Part, ...] = ()


class _Item(NamedTuple):
    """Where an item is: a range of a file."""

    file: str
    offset: int
    nbytes: int


class _Saved:
    """What the metadata say. Those of several processes are merged; of the same box, the first process's is taken.

    ``flat``: the values were saved without flattening. ``twice``: keys of which several processes saved a box.
    """

    def __init__(self) -> None:
        self.entries: dict[str, _Entry] = {}
        self.paths: dict[str, tuple[Any, ...]] = {}
        self.items: dict[tuple[str, tuple[int, ...] | None], _Item] = {}
        self.names: dict[tuple[str, str], None] = {}
        self.twice: dict[str, None] = {}
        self.flat = True

    def order(self) -> list[str]:
        """Returns the keys in the order in which they were flattened, then the others."""
        return [
            *(key for key in self.paths if key in self.entries),
            *(key for key in self.entries if key not in self.paths),
        ]

    def add(self, path: str) -> None:
        """Reads one file of metadata. Raises: FormatError, LimitError."""
        with LocalFile(path) as file:
            if file.size > MAX_PICKLE.now():
                raise MAX_PICKLE.passed("the pickle is too long", file.size)
            pickled = file.read(0, file.size)
        pickles.scan(pickled)
        tree, names = pickles.load(pickled, builders=torch_calls.builders)
        self.names.update(dict.fromkeys(names))
        fields = _fields(tree, "Metadata")
        for key, node in _mapping(fields, "state_dict_metadata").items():
            self._entry(_text(key), node)
        for index, where in _mapping(fields, "storage_data").items():
            self._item(_fields(index, "MetadataIndex"), _fields(where, "_StorageInfo"))
        if isinstance(planned := fields.get("planner_data"), dict) and planned:
            self.flat = False
            for key, steps in planned.items():
                if not isinstance(steps, tuple) or not steps or any(type(step) not in (str, int) for step in steps):
                    raise FormatError(f"the path of {brief(key)} in planner_data is {brief(steps)}")
                self.paths.setdefault(_text(key), steps)

    def _entry(self, key: str, node: Any) -> None:
        kind = type(node).qualname if isinstance(node, PyObject) else ""
        if kind == "BytesStorageMetadata":
            entry = _Entry(None)
        else:
            fields = _fields(node, "TensorStorageMetadata")
            boxes = [_fields(box, "ChunkStorageMetadata") for box in _list(fields.get("chunks"))]
            parts = tuple(_Part(_numbers(box.get("offsets")), _numbers(box.get("sizes"))) for box in boxes)
            entry = _Entry(_dtype(fields.get("properties")), _numbers(fields.get("size")), parts)
            if not is_countable(entry.shape):
                raise FormatError(f"{key}: has shape {brief(entry.shape)}: more elements than can be counted")
        old = self.entries.get(key, entry)
        if old[:2] != entry[:2]:
            raise FormatError(f"{key}: is {_said(entry)} here, and {_said(old)} in another process's metadata")
        if old is not entry:
            self.twice.update(dict.fromkeys([key] if entry.dtype is None or {*old.parts} & {*entry.parts} else []))
            entry = old._replace(parts=(*old.parts, *(part for part in entry.parts if part not in {*old.parts})))
        self.entries[key] = entry

    def _item(self, index: dict[str, Any], where: dict[str, Any]) -> None:
        key, name = _text(index.get("fqn")), _text(where.get("relative_path"))
        offset = None if index.get("offset") is None else _numbers(index.get("offset"))
        if any(step in ("", ".", "..") for step in name.split("/")) or any(odd in name for odd in "\\\0:"):
            raise FormatError(f"{key}: lies in a file outside the directory: {name!r}")
        if where.get("transform_descriptors"):
            how = brief(where["transform_descriptors"])
            raise UnsupportedError(f"{key}: is stored transformed ({how}), which is not supported: save it without")
        self.items.setdefault((key, offset), _Item(name, *_numbers((where.get("offset"), where.get("length")))))


def _said(entry: _Entry) -> str:
    return "a Python value" if entry.dtype is None else f"{entry.dtype} of shape {brief(entry.shape)}"


def _fields(node: Any, qualname: str) -> dict[str, Any]:
    """Returns the fields of an object of torch's class of that name."""
    if isinstance(node, PyObject) and type(node).qualname == qualname:
        state = {} if node.state is None else node.state
        if isinstance(state, dict) and not node.args:
            return state
    raise FormatError(f"its metadata have {brief(node)}: expected {qualname} of torch.distributed.checkpoint")


def _mapping(fields: dict[str, Any], name: str) -> dict[Any, Any]:
    if not isinstance(found := fields.get(name), dict):
        raise FormatError(f"its metadata have no {name}")
    return found


def _text(value: Any) -> str:
    if type(value) is not str:
        raise FormatError(f"its metadata have {brief(value)} where a name belongs")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"its metadata have {brief(value)} where a list belongs")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    """Returns a tuple or torch.Size of numbers that are not negative."""
    if isinstance(value, PyObject) and type(value).qualname == "Size" and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, (tuple, list)) or any(type(number) is not int or number < 0 for number in value):
        raise FormatError(f"its metadata have {brief(value)} where sizes or offsets belong")
    return tuple(value)


def _dtype(properties: Any) -> str:
    """Returns the dtype in a TensorProperties, whose state is a tuple that begins with it, or a dict."""
    state = properties.state if isinstance(properties, PyObject) else None
    found = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    if not isinstance(found, Global) or found.qualname not in DTYPES:
        raise FormatError(f"its metadata give a tensor the dtype {brief(found)}")
    return found.qualname


# --- items -----------------------------------------------------------------------------------------------------------


class _Items:
    """Reads items. ``used``: the files that have some of them. ``names``: what their pickles name."""

    def __init__(self, directory: str, saved: _Saved, open_: Callable[..., Checkpoint]) -> None:
        self.open_ = open_
        self.directory = directory
        self.saved = saved
        self.files = Files()
        self.names: dict[tuple[str, str], None] = {}
        self.used: dict[str, None] = {}
        self.blobs: dict[tuple[str, int], Checkpoint] = {}
        self.left = set(saved.items)
        self.raw: list[str] = []
        self.whole: list[str] = []
        there = set(names_in(directory))
        gone: dict[str, list[str]] = {}
        for (key, _), item in saved.items.items():
            if item.file not in there and not os.path.exists(os.path.join(directory, item.file)):
                gone.setdefault(item.file, []).append(key)
        if gone:
            what = "; ".join(f"{name}, which has {listed(dict.fromkeys(keys), 4)}" for name, keys in gone.items())
            raise IncompleteError(f"a file is missing: {what}", directory)

    def value(self, key: str) -> Any:
        """Returns the tensor or the Python value of that key."""
        entry = self.saved.entries[key]
        if entry.dtype is None:
            found = self._read(key, None)
            if self.saved.flat and any(isinstance(node, TensorInfo) for _, node in walk(found)):
                self.whole.append(key)
            return found
        boxes: list[Box] = [(*part, self._tensor(key, part)) for part in entry.parts]
        if len(boxes) == 1 and boxes[0][1] == entry.shape and not any(boxes[0][0]):
            tensor = boxes[0][2]
            if tensor.dtype == entry.dtype and (tensor.shape == entry.shape or isinstance(tensor.source, Opaque)):
                return tensor
        try:
            return chunks(entry.dtype, entry.shape, boxes)
        except FormatError as error:
            raise IncompleteError(f"{key}: {error.message}", self.directory) from error

    def _tensor(self, key: str, part: _Part) -> TensorInfo:
        found = self._read(key, part.offsets)
        if not isinstance(found, TensorInfo):
            raise FormatError(f"{key}: the item at {brief(part.offsets)} is no tensor: {brief(found)}", self.directory)
        return found

    def _read(self, key: str, offset: tuple[int, ...] | None) -> Any:
        item = self.saved.items.get((key, offset))
        if item is None:
            where = "" if offset is None else f" the part at {brief(offset)} of"
            raise IncompleteError(f"the metadata say of no file that it has{where} {key}", self.directory)
        self.left.discard((key, offset))
        path = os.path.join(self.directory, item.file)
        self.used[path] = None
        file = self.files.open(path)
        if item.offset + item.nbytes > file.size:
            end = item.offset + item.nbytes
            raise IncompleteError(f"{key}: ends at byte {end} of a file of {file.size}: a truncated download?", path)
        try:
            if file.read(item.offset, min(2, item.nbytes)) == b"PK":
                return self._saved_by_torch(path, Section(file, item.offset, item.nbytes))
            if self.saved.entries[key].dtype is not None:
                return self._in_safetensors(key, offset, path, item.offset)
            if item.nbytes > MAX_PICKLE.now():
                raise MAX_PICKLE.passed("is too long", item.nbytes)
            self.raw.append(key)
            return file.read(item.offset, item.nbytes)
        except CkptoolError as error:
            error.message = f"{key}, at byte {item.offset}: {error.message}"
            error.path = error.path or path
            raise

    def _saved_by_torch(self, path: str, section: Section) -> Any:
        found = self.open_(path, lambda _: section)
        if found.format != "torch-zip":
            raise FormatError(f"is a file of {found.format}, which torch.save did not write")
        self.names.update(dict.fromkeys(found.names))
        return found.tree

    def _in_safetensors(self, key: str, offset: tuple[int, ...] | None, path: str, begin: int) -> TensorInfo:
        """Returns a tensor of the safetensors file that is the rest of a file: all its tensors have that offset.

        Of several parts of one tensor torch writes the last one only, so it must be the one that is looked for.
        """
        found = self.blobs.get((path, begin))
        if found is None:
            file = self.files.open(path)
            found = self.open_(path, lambda _: Section(file, begin, file.size - begin))
            if found.format != "safetensors":
                raise FormatError(f"is a file of {found.format}, neither a torch.save nor a safetensors file")
            self.blobs[path, begin] = found
        if key not in found.tree:
            raise IncompleteError(f"is a safetensors file of {listed(found.tree)}")
        if (held := (sharding(found.metadata) or {}).get(key)) != offset:
            raise IncompleteError(f"holds the part at {brief(held)}, not that at {brief(offset)}, which torch lost")
        tensor: TensorInfo = found.tree[key]
        return tensor

    def notes(self) -> Iterator[str]:
        """Yields what else is to be known of the items."""
        absent = [key for key in self.saved.paths if key not in self.saved.entries]
        for what, keys in {
            "saved whole by one process, not flattened (flatten_state_dict=False): what other processes held of "
            "sharded tensors is not in the checkpoint": self.whole,
            "saved by several processes, the first one's taken": self.saved.twice,
            "no torch.save inside, kept as bytes": self.raw,
            "in planner_data only": absent,
            "items that belong to no key, not read": dict.fromkeys(key for key, _ in sorted(self.left, key=str)),
        }.items():
            if keys:
                yield f"{what}: {listed(keys)}"


# --- the tree --------------------------------------------------------------------------------------------------------


class _Branch(dict[Any, Any]):
    """A container that was flattened, unlike a dict that is a value."""


def _nested(values: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> Any:
    """Returns the tree of which the values are leaves; without a path, the key is the only step."""
    top = _Branch()
    for key, value in values.items():
        *steps, last = paths.get(key, (key,))
        if len(steps) > MAX_LEVELS.now():
            raise MAX_LEVELS.passed(f"{brief(key)} is nested too deep", len(steps))
        node = top
        for step in steps:
            node = node.setdefault(step, _Branch())
            if type(node) is not _Branch:
                raise FormatError(f"{brief(key)} lies below another value: {brief(paths[key])}")
        if last in node:
            raise FormatError(f"two values have the path of {brief(key)}: {brief(paths.get(key))}")
        node[last] = value
    return _container(top)


def _container(branch: _Branch) -> Any:
    """Returns the dict or list that a branch stands for."""
    found = {step: _container(node) if type(node) is _Branch else node for step, node in branch.items()}
    if found and all(type(step) is int for step in found):
        size = max(found) + 1
        if min(found) < 0 or size > len(found) + GAPS:
            raise FormatError(f"a list has {len(found)} elements, one of them at {brief(max(found, key=abs))}")
        return [found.get(index) for index in range(size)]
    if "param_groups" in found and type(branch.get("state")) is _Branch and all(map(_is_number, branch["state"])):
        found["state"] = {int(step): value for step, value in found["state"].items()}
    return found


def _is_number(step: Any) -> bool:
    return type(step) is str and step.isascii() and step.isdecimal() and len(step) < 19 and str(int(step)) == step
