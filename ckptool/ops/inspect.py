"""Describes a checkpoint: its weights, the rest of its tree, and what to know before using it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import prod
from typing import TYPE_CHECKING, Any

from ckptool.core import keys as names
from ckptool.core import modules, optimizers, roots
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.pickled_names import NameKind, beyond_tensors
from ckptool.core.tensor import Storage, TensorInfo
from ckptool.core.tree import Global, Path, PyObject, as_mapping, attributes, nodes, path_text, walk

if TYPE_CHECKING:  # imported only where values are read
    from ckptool.core.findings import Check, PrefixStats, Stats

SHOWN = 120
"""Most characters shown of a value beside the weights."""


@dataclass(slots=True)  # not frozen: that takes 1 us more for each of 100,000 rows
class TensorRow:
    """One tensor at root."""

    key: str
    """The full key, as in the state_dict."""
    shape: list[int] | None
    """Its sizes; null where it has none of its own, as a list of parts."""
    dtype: str
    """The name that torch gives, without ``torch.``; what a format calls a type of its own."""
    nbytes: int
    """Bytes of its elements."""
    tied_to: str | None = None
    """The first key of its tie group; absent for that key, and for tensors that share nothing."""
    device: str | None = None
    """The device tag that the file records, where its format has them."""
    kind: str | None = None
    """Sparse, quantized or nested; absent for a dense tensor."""
    stats: Stats | None = None
    """With --stats, where they can be computed."""
    hash: str | None = None
    """With --hash: the sha256 of its dtype, shape and values; absent where it has none."""
    elements: int | None = None
    """How many there are in all parts; absent where the shape says it."""

    def numel(self) -> int:
        """Returns how many elements it has."""
        return prod(self.shape) if self.shape is not None else self.elements or 0


@dataclass(slots=True)
class Node:
    """A module with all that is below it, or a tensor."""

    tensors: int = 0
    """How many are below it, or 1."""
    parameters: int = 0
    """Elements, each tie group where its first key is, counters aside."""
    nbytes: int = 0
    """Bytes, each tie group where its first key is."""
    below: dict[str, Node] = field(default_factory=dict)
    """{segment of keys: what is there}, in the order of the keys; a module's segment ends in its dot or slash."""
    key: str | None = None
    """Of a tensor: its key."""


@dataclass(frozen=True, slots=True)
class Beside:
    """A value in the tree beside the weights."""

    path: str
    """Where it is in the tree, steps joined with /."""
    text: str
    """What it is, in a few words."""
    nbytes: int | None = None
    """Bytes of the tensors in it."""
    key: str | None = None
    """Its key, if it is an object at root."""


@dataclass(frozen=True, slots=True)
class InspectReport:
    """What a checkpoint holds."""

    path: str
    """The path that was opened."""
    format: str
    """The label of its format."""
    root: str
    """Where the weights are in the tree, steps joined with /; empty: at the top."""
    nbytes: int
    """The size of the file, or of all files."""
    tensors: list[TensorRow]
    """All tensors at root, or those that --include and --exclude choose."""
    unsafe: list[str]
    """Names in the pickle that tensors do not need; none was imported or called."""
    parameters: int
    """Elements, each tie group once, counters aside."""
    tensor_nbytes: int
    """Bytes of the tensors at root, each tie group once."""
    dtypes: dict[str, list[int]]
    """{dtype: [tensors, bytes]}, each tie group once."""
    devices: dict[str, int]
    """{device tag: tensors at root}."""
    beside: list[Beside] = field(default_factory=list)
    """What the tree holds beside the weights."""
    wrapper: str = ""
    """The wrapper that all keys or the whole tree stand in, such as ``module.``."""
    prefix: str = ""
    """What every key begins with."""
    ema: list[str] = field(default_factory=list)
    """Places with averaged copies of the weights."""
    other_roots: list[str] = field(default_factory=list)
    """Other places with weights."""
    tied: list[list[str]] = field(default_factory=list)
    """Groups of keys whose tensors share memory."""
    stored_nbytes: int = 0
    """Bytes of all storages in the file."""
    used_nbytes: int = 0
    """Bytes of them that tensors use."""
    empty: list[str] = field(default_factory=list)
    """Keys of tensors without elements."""
    counters: dict[str, int] = field(default_factory=dict)
    """How many BatchNorm layers have num_batches_tracked (``present``), and how many lack it (``absent``)."""
    loose: list[str] = field(default_factory=list)
    """Tensors of an nn.Module that are not in its state_dict."""
    inside: list[TensorRow] = field(default_factory=list)
    """Tensors inside entries that are no tensors, such as packed parameters; their keys are ENTRY/PATH."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The text that safetensors and others keep beside the tensors."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with the file, and did not keep it from being read."""
    notes: list[str] = field(default_factory=list)
    """What else was noticed."""
    prefixes: list[PrefixStats] | None = None
    """With --stats: the statistics of every prefix."""
    hash: str | None = None
    """With --hash: the sha256 of all chosen tensors together."""
    check: Check | None = None
    """With --check: what it found."""
    tree: Node | None = None
    """With --tree: the modules of ``tensors``; with --depth, so many levels behind what all keys begin with."""
    kinds: Mapping[str, NameKind] = field(default_factory=dict)
    """Of each name in ``unsafe``: ordinary, unknown or acting."""
    device_tags: list[str] = field(default_factory=list)
    """The device tags of all storages, an optimizer's too."""
    files: list[str] = field(default_factory=list)
    """The names of the files that the tensors were found in, where the format has several."""


def _nbytes(tensor: TensorInfo) -> int:
    """Returns the bytes of a tensor's elements; of one that is only described, those that they would take."""
    if tensor.described_in and tensor.kind == "meta":
        return -(-DTYPES[tensor.dtype].bits * tensor.numel // 8)
    return tensor.nbytes


def once(rows: Iterable[TensorRow]) -> Iterator[TensorRow]:
    """Yields the first row of each tie group, and all rows that are in none."""
    seen = set()
    for row in rows:
        first = row.tied_to or row.key
        if first not in seen:
            seen.add(first)
            yield row


def tree_of(rows: Sequence[TensorRow], depth: int | None = None) -> Node:
    """Returns the modules of tensors, in their order; of a tie group the first of these tensors counts.

    ``depth``: how many levels, behind the segments that all keys share.
    """
    keys = [row.key for row in rows]
    ends = [_segments(end(keys))[:-1] for end in (min, max)] if rows and depth else []
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))
    levels = None if depth is None else depth + len(list(shared))
    counted = {row.key for row in once(rows)}
    top = Node()
    for row in rows:
        nbytes = row.nbytes if row.key in counted else 0
        parameters = row.numel() if row.key in counted and not names.is_counter(row.key) else 0
        segments = _segments(row.key)
        path = [top]
        for segment in segments[:levels]:
            known = path[-1].below
            if segment not in known:
                known[segment] = Node()
            path.append(known[segment])
        for node in path:
            node.tensors += 1
            node.parameters += parameters
            node.nbytes += nbytes
        if len(path) > len(segments):
            path[-1].key = row.key
    return top


LEVELS = 200
"""Most levels of a tree; what is behind them is one segment. Dots in keys are bounded already, slashes are not."""


def _segments(key: str) -> list[str]:
    """Returns the segments of a key, each with the dot or slash behind it.

    >>> _segments("G/conv.weight")
    ['G/', 'conv.', 'weight']
    """
    return _ENDS.split(key, LEVELS)


_ENDS = re.compile(r"(?<=[./])")


def inspect(checkpoint: Checkpoint, devices: bool = True) -> InspectReport:
    """Returns the description of a checkpoint; ``devices``: with the tensors' devices, which not every format records.

    Of a tree without tensors at root, ``beside`` is all of it. Raises: IncompleteError if that is for lack of shards.
    """
    tensors = checkpoint.state_dict()
    if not tensors:
        checkpoint.require_whole()
    tied = checkpoint.shared()
    first_of = {key: group[0] for group in tied for key in group[1:]}
    rows, inside = (
        [
            TensorRow(
                key, None if one.shape is None else list(one.shape), one.dtype, _nbytes(one), first_of.get(key),
                one.location if devices else None, None if one.kind == "dense" else one.kind,
                elements=one.numel if one.shape is None else None,
            )
            for key, one in some.items()
        ]
        for some in (tensors, checkpoint.inside())
    )  # fmt: skip
    stored, used, tags = _stored_and_used(checkpoint)
    found = roots.find_root(checkpoint.tree)
    by_dtype: dict[str, list[int]] = {}
    parameters = 0
    for row, tensor in zip(rows, tensors.values(), strict=True):
        if row.tied_to is None:
            entry = by_dtype.setdefault(row.dtype, [0, 0])
            entry[0] += 1
            entry[1] += row.nbytes
            if not names.is_counter(row.key):
                parameters += tensor.numel
    keys = list(tensors)
    node = checkpoint.at(checkpoint.root)
    kinds = beyond_tensors(checkpoint.names)
    return InspectReport(
        checkpoint.url,
        checkpoint.format,
        roots.root_text(checkpoint.tree, checkpoint.root),
        checkpoint.nbytes,
        rows,
        list(kinds),
        parameters,
        sum(nbytes for _, nbytes in by_dtype.values()),
        by_dtype,
        dict(Counter(row.device for row in rows if row.device is not None)),
        _beside(checkpoint),
        names.wrapper_of(keys),
        names.common_prefix(keys),
        [path_text(path) for path in found.ema if path != checkpoint.root],
        [
            roots.root_text(checkpoint.tree, path) or "/"
            for path in (*found.others, found.path)
            if path != checkpoint.root and found.others
        ],
        tied,
        stored,
        used,
        [row.key for row in rows if row.shape is not None and 0 in row.shape],
        _counters(keys),
        modules.loose(node) if modules.is_module(node) else [],
        inside,
        checkpoint.metadata,
        list(checkpoint.problems),
        [*checkpoint.notes, *roots.said_of(checkpoint.tree, checkpoint.root), *_notes(checkpoint, node)],
        kinds=kinds,
        device_tags=tags if devices else [],
        files=list(checkpoint.files),
    )


def volume(checkpoint: Checkpoint, choose: Callable[[str], bool], *, check: bool) -> int:
    """Returns roughly how many bytes statistics and hashes of the chosen keys read, or a ``check`` of the file."""
    if check:
        return max(_stored_and_used(checkpoint)[0], checkpoint.nbytes)
    tensors = checkpoint.state_dict() | checkpoint.inside()
    return sum({one.view: one.nbytes for key, one in tensors.items() if choose(key)}.values())


def _stored_and_used(checkpoint: Checkpoint) -> tuple[int, int, list[str]]:
    """Returns (bytes of all storages in the tree, an upper bound of how many of them tensors use, device tags)."""
    storages: dict[int, Storage] = {}
    views: dict[int, dict[object, int]] = {}
    full: set[int] = set()
    whole = 0
    for node in nodes(checkpoint.tree):
        if isinstance(node, TensorInfo) and isinstance(source := node.source, Storage):
            identity = id(source)
            if identity not in storages and node.is_whole:  # the usual case
                storages[identity] = source
                whole += source.span.nbytes
                full.add(identity)
            elif identity not in full:
                storages[identity] = source
                views.setdefault(identity, {})[node.view] = node.nbytes
        elif isinstance(node, Storage):
            storages[id(node)] = node
            if id(node) not in full:
                views.setdefault(id(node), {})[None] = node.nbytes
    used = whole + sum(min(storages[key].nbytes, sum(sizes.values())) for key, sizes in views.items())
    tags = list(dict.fromkeys(storage.location for storage in storages.values()))
    return sum(storage.nbytes for storage in storages.values()), used, tags


def _counters(keys: list[str]) -> dict[str, int]:
    """Returns how many BatchNorm layers have num_batches_tracked, and how many have only a running_mean."""
    present = {key.rpartition(".")[0] for key in keys if names.is_counter(key)}
    layers = {key.rpartition(".")[0] for key in keys if key.rpartition(".")[2] == "running_mean"}
    return {"present": len(present), "absent": len(layers - present)}


def _notes(checkpoint: Checkpoint, node: Any) -> list[str]:
    found = [checkpoint.trailing] if checkpoint.trailing else []
    found += [f"{checkpoint.split}"] if checkpoint.ranks else []
    if any(name.startswith(("_rebuild_device_", "_rebuild_xla_")) for _, name in checkpoint.names):
        found.append("tensors saved from a device without storages (xla, ort, ...) are read as tensors of the CPU")
    if isinstance(node, TensorInfo):
        found.append("a bare tensor: its key is empty")
    if modules.is_module(node):
        found.append(f"a whole model, pickled, a {node.module}.{node.qualname}: torch.load needs its classes")
    hooks = modules.state_dict_hooks(node) if modules.is_module(node) else []
    if hooks:
        found.append(f"state_dict hooks were not run, a live state_dict may differ: {', '.join(hooks)}")
    return found


def _beside(checkpoint: Checkpoint) -> list[Beside]:
    """Returns the entries beside the path to the weights, and the entries at root that are not tensors.

    Where the tree is an object, or no container, that is first.
    """
    found = [_described(path, value, key) for path, key, value in checkpoint.beside()]
    tree = checkpoint.tree
    if as_mapping(tree) is None and not isinstance(tree, (list, tuple, TensorInfo)) and not modules.is_module(tree):
        found.insert(0, _described((), tree))
    return found


def _described(path: Path, value: Any, key: str | None = None) -> Beside:
    """Returns the description of a value: an optimizer's kind, the tensors in a container, or a value as text."""
    tensors = [node for _, node in walk(value) if isinstance(node, TensorInfo)]
    states = value if isinstance(value, list) else [value]
    nbytes: int | None = sum(tensor.nbytes for tensor in tensors)
    if states and all(map(optimizers.is_optimizer, states)):
        kinds = [optimizers.describe(as_mapping(state) or {}) for state in states]
        text = ", ".join(f"{kind} of {count} parameters" for kind, count in kinds)
    elif modules.is_module(value):
        text = f"a {modules.class_name(value)} model of {len(modules.state_dict(value))} tensors"
    elif tensors and not isinstance(value, TensorInfo):
        kind = value.qualname if isinstance(value, PyObject) else type(value).__name__
        text = f"{kind} with {len(tensors)} tensor{'s' * (len(tensors) > 1)}"
    elif isinstance(value, Storage):
        text, nbytes = f"a storage of {value.dtype or 'bytes'}, no tensor", value.nbytes
    else:
        text, nbytes = _preview(value), nbytes if tensors else None
    return Beside(path_text(path), text, nbytes, key)


def _preview(value: Any) -> str:
    """Returns the repr of a value, cut to `SHOWN` characters; objects as their class and attributes."""
    text = "".join(_pieces(value, [SHOWN * 2], 0))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _pieces(value: Any, left: list[int], depth: int) -> list[str]:
    """Returns the text of a value in pieces; subtracts their length from ``left[0]``, and stops at 0."""
    if left[0] <= 0 or depth > 6:
        return ["..."]
    made: list[str]
    if isinstance(value, TensorInfo):
        made = [f"tensor {'x'.join(map(str, value.shape or ())) or 'scalar'} {value.dtype}"]
    elif isinstance(value, (str, bytes, bytearray)):
        made = [repr(value[: left[0]])]
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1000:
        made = [f"<int of {value.bit_length()} bits>"]
    elif isinstance(value, (bool, int, float, type(None))):
        made = [repr(value)]
    elif isinstance(value, Global):
        made = [f"{value.module}.{value.qualname}"]
    elif isinstance(value, (dict, list, tuple, set, frozenset)):
        brackets = {dict: "{}", list: "[]", tuple: "()"}.get(type(value), "{}")
        made = [brackets[0], *_joined(value, left, depth), brackets[1]]
    elif isinstance(value, PyObject):
        content: Any = as_mapping(value)
        named = attributes(value)
        inner = named or content or value.items or list(value.args)
        made = [f"{value.module}.{value.qualname}(", *_joined(inner, left, depth, "=" if named else ": "), ")"]
    else:
        made = [type(value).__name__]
    left[0] -= sum(map(len, made))
    return made


def _joined(value: Any, left: list[int], depth: int, colon: str = ": ") -> list[str]:
    made: list[str] = []
    for item in value:
        if made:
            made.append(", ")
        if left[0] <= 0:
            made.append("...")
            break
        if isinstance(value, dict):
            named = item if isinstance(item, str) and colon == "=" else "".join(_pieces(item, left, depth + 1))
            made += [named, colon]
            made += _pieces(value[item], left, depth + 1)
        else:
            made += _pieces(item, left, depth + 1)
    return made
