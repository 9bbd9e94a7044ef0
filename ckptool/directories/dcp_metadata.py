"""What ``.metadata`` of a distributed checkpoint says: read without running its pickle, and written.

    state_dict_metadata    {name: the shape, the dtype and the boxes of a tensor, or that it is a Python value}
    planner_data           {name: its path in the tree that was flattened}
    storage_data           {name and first index of a box: the file, offset and length of its item}

Source: ``metadata.py`` and ``filesystem.py`` of ``torch/distributed/checkpoint``, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

from ckptool.core import pickled_names
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import is_countable
from ckptool.core.tree import LONG, Global, PyObject, brief
from ckptool.errors import FormatError, UnsupportedError
from ckptool.io.files import opened
from ckptool.limits import MAX_PICKLE, MAX_SHARED
from ckptool.pickling import load as pickles
from ckptool.pickling import torch_calls

Items = TypeVar("Items", bound=list[Any] | tuple[Any, ...])


class Part(NamedTuple):
    """A box of a tensor: its first index and its size along every dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Entry(NamedTuple):
    """A tensor and its boxes; ``dtype`` is None for a Python value."""

    dtype: str | None
    shape: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()


class Item(NamedTuple):
    """Where an item is: a range of a file."""

    file: str
    offset: int
    nbytes: int


class Saved:
    """What the metadata say. Those of several processes are merged; of the same box, the first process's is taken.

    ``flat``: the values were saved without flattening. ``twice``: keys of which several processes saved a box.
    ``reshaped``: tensors that Megatron-core did not store in their own shape.
    ``room``: how many more items of lists and tuples may be looked at in the file that is read.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.paths: dict[str, tuple[Any, ...]] = {}
        self.items: dict[tuple[str, tuple[int, ...] | None], Item] = {}
        self.names: dict[tuple[str, str], None] = {}
        self.twice: dict[str, None] = {}
        self.reshaped: dict[str, None] = {}
        self.flat = True
        self.files: set[str] = set()
        self.room = 0

    def order(self) -> list[str]:
        """Returns the keys in the order in which they were flattened, then the others."""
        return [
            *(key for key in self.paths if key in self.entries),
            *(key for key in self.entries if key not in self.paths),
        ]

    def add(self, path: str) -> None:
        """Reads one file of metadata. Raises: FormatError, LimitError."""
        with opened(path) as file:
            if file.size > MAX_PICKLE.now():
                raise MAX_PICKLE.passed("the pickle is too long", file.size)
            pickled = file.read(0, file.size)
        pickles.scan(pickled)
        tree, names = pickles.load(pickled, builders=torch_calls.builders, walked=False)
        self.room = MAX_SHARED.now() + 4 * len(pickled)
        # those that every such file has are no news
        self.names.update((name, None) for name in names if pickled_names.kind(*name) != "ordinary")
        fields = _fields(tree, "Metadata")
        for key, node in _mapping(fields, "state_dict_metadata").items():
            self._entry(_text(key), node)
        for index, where in _mapping(fields, "storage_data").items():
            self._item(_fields(index, "MetadataIndex"), _fields(where, "_StorageInfo"))
        if isinstance(reshaped := fields.get("mcore_data"), dict):  # Megatron-core up to 0.15
            self.reshaped.update((_text(key), None) for key, said in reshaped.items() if said)
        if isinstance(planned := fields.get("planner_data"), dict) and planned:
            self.flat = False
            for key, steps in planned.items():
                if (
                    not isinstance(steps, tuple)
                    or not steps
                    or not {str, int}.issuperset(map(type, self._count(steps)))
                ):
                    raise FormatError(f"the path of {brief(key)} in planner_data is {brief(steps)}")
                self.paths.setdefault(_text(key), steps)

    def _entry(self, key: str, node: Any) -> None:
        kind = type(node).qualname if isinstance(node, PyObject) else ""
        if kind == "BytesStorageMetadata":
            entry = Entry(None)
        else:
            fields = _fields(node, "TensorStorageMetadata")
            boxes = [_fields(box, "ChunkStorageMetadata") for box in self._count(_list(fields.get("chunks")))]
            every = [Part(self._numbers(box.get("offsets")), self._numbers(box.get("sizes"))) for box in boxes]
            parts = tuple(dict.fromkeys(every))  # old versions of torch let every process save what is replicated
            self.twice.update(dict.fromkeys([key] if len(parts) < len(every) else []))
            entry = Entry(_dtype(fields.get("properties")), self._numbers(fields.get("size")), parts)
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
        offset = None if index.get("offset") is None else self._numbers(index.get("offset"))
        if name not in self.files:
            steps = name.split("/") if len(name) <= LONG else [""]
            if any(step in ("", ".", "..") for step in steps) or any(odd in name for odd in "\\\0:"):
                raise FormatError(f"{key}: lies in a file outside the directory: {brief(name)}")
            self.files.add(name)
        if where.get("transform_descriptors"):
            how = brief(where["transform_descriptors"])
            raise UnsupportedError(f"{key}: is stored transformed ({how}), which is not supported: save it without")
        self.items.setdefault((key, offset), Item(name, *self._numbers((where.get("offset"), where.get("length")))))

    def _numbers(self, value: Any) -> tuple[int, ...]:
        """Returns a tuple or torch.Size of numbers that are not negative."""
        if isinstance(value, PyObject) and type(value).qualname == "Size" and len(value.args) == 1:
            value = value.args[0]
        exact = isinstance(value, (tuple, list)) and _INT.issuperset(map(type, self._count(value)))
        if exact and min(value, default=0) >= 0:
            return tuple(value)
        raise FormatError(f"its metadata have {brief(value)} where sizes or offsets belong")

    def _count(self, items: Items) -> Items:
        """Returns the items. Raises: LimitError for more than a pickle of this length has without shared ones."""
        self.room -= len(items)
        if self.room < 0:
            raise MAX_SHARED.passed("its metadata meet shared items again too often")
        return items


_INT = frozenset({int})


def _said(entry: Entry) -> str:
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


def _dtype(properties: Any) -> str:
    """Returns the dtype in a TensorProperties, whose state is a tuple that begins with it, or a dict."""
    state = properties.state if isinstance(properties, PyObject) else None
    found = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    if not isinstance(found, Global) or found.qualname not in DTYPES:
        raise FormatError(f"its metadata give a tensor the dtype {brief(found)}")
    return found.qualname


# --- writing ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """An item that was written: its name, its path in the tree, the tensor's dtype and shape, its box, and where it is.

    ``dtype`` is None for a Python value.
    """

    key: str
    path: tuple[str | int, ...]
    dtype: str | None
    shape: tuple[int, ...]
    part: Part
    item: Item


def _global(name: str, module: str = "torch.distributed.checkpoint.metadata") -> Global:
    return Global.named(module, name)


METADATA, TENSOR, BYTES = map(_global, ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata"))
PROPERTIES, CHUNK, INDEX = map(_global, ("TensorProperties", "ChunkStorageMetadata", "MetadataIndex"))
STORED, SIZE = _global("_StorageInfo", "torch.distributed.checkpoint.filesystem"), _global("Size", "torch")
STRIDED = _global("_get_layout", "torch.serialization")("torch.strided")
CONTIGUOUS = _global("_MEM_FORMAT_ENCODING")(0)


def pickled(rows: Iterable[Row]) -> bytes:
    """Returns the content of ``.metadata``; of each tensor, rows give all boxes.

    Nothing in it depends on the run or the path, unlike torch's own, which has both in ``storage_meta``.
    """
    from ckptool.pickling.dump import dump  # needed only to write

    entries: dict[str, Any] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    stored: dict[Any, Any] = {}
    boxes: dict[str, tuple[PyObject, list[PyObject]]] = {}
    properties: dict[str, PyObject] = {}
    for key, path, dtype, shape, part, item in rows:
        paths[key] = path
        place = _object(STORED, relative_path=item.file, offset=item.offset, length=item.nbytes)
        if dtype is None:
            entries[key] = _object(BYTES)
            stored[_object(INDEX, fqn=key, index=None)] = place
            continue
        if dtype not in properties:
            properties[dtype] = _object(PROPERTIES)
            properties[dtype].state = (_global(dtype, "torch"), STRIDED, False, CONTIGUOUS, False)
        begin = SIZE(part.offsets)
        if key not in boxes:
            boxes[key] = SIZE(shape), []
            entries[key] = _object(TENSOR, properties=properties[dtype], size=boxes[key][0], chunks=boxes[key][1])
        size, chunks = boxes[key]
        stored[_object(INDEX, fqn=key, index=len(chunks), offset=begin)] = place
        chunks.append(_object(CHUNK, offsets=begin, sizes=size if part.sizes == shape else SIZE(part.sizes)))
    return dump(
        _object(
            METADATA, state_dict_metadata=entries, planner_data=paths, storage_data=stored, storage_meta=None,
            version="1.0.0",
        )
    )  # fmt: skip


def _object(kind: Global, **fields: Any) -> PyObject:
    """Returns an object of a dataclass."""
    made: PyObject = kind()
    made.called = False
    made.state = fields or None
    return made
