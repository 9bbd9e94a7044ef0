"""safetensors: a JSON header, then the tensors' bytes without gaps.

    N (u64 little-endian) | N bytes of JSON | data
    {"__metadata__": {str: str}, "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Offsets are relative to the data. Checks are those of the reference library (``safetensors/src/tensor.rs``, 0.8),
and one more: a duplicate name is refused, as the specification says and the library does not.

Two names cannot share bytes, so tied tensors are stored once; the dropped names are recorded in ``__metadata__`` as
``{dropped: kept}``, as huggingface_hub writes it, and are tied again on reading.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from math import isinf, prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptool.core import aliases
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import BY_SAFETENSORS
from ckptool.core.tensor import Span, Storage, TensorInfo, contiguous_stride, is_countable
from ckptool.core.tree import brief
from ckptool.errors import FormatError, IncompleteError, UnsupportedError, listed
from ckptool.formats import safetensors_file
from ckptool.io.files import Files
from ckptool.io.probe import Probe
from ckptool.io.source import Section, Source
from ckptool.limits import MAX_HEADER, MAX_NESTING

if TYPE_CHECKING:
    from ckptool.formats.layout import MapLocation
    from ckptool.io.output import Output

_SPACE = b" \t\r\n"

prove = safetensors_file.prove


def matches(probe: Probe) -> bool:
    """Returns whether it begins with a length and a JSON object."""
    if probe.size < 10 or probe.head[:4].isalpha():  # letters (GGUF) would be a header of a gigabyte
        return False
    text = probe.head[8:].lstrip(_SPACE)
    if not text and (nbytes := min(int.from_bytes(probe.head[:8], "little"), probe.size - 8)) <= MAX_HEADER.now():
        text = probe.file.read(probe.file.begin + 8, nbytes).lstrip(_SPACE)
    return text[:1] == b"{"


def read(probe: Probe) -> Checkpoint:
    """Returns the checkpoint; reads the header only. Raises: FormatError, LimitError, UnsupportedError."""
    file = probe.file
    header_size = int.from_bytes(probe.head[:8], "little")
    if header_size > MAX_HEADER.now():
        raise MAX_HEADER.passed(f"its header claims {header_size:,} bytes, more than safetensors itself would read")
    start = file.begin + 8 + header_size
    if start > file.size:
        raise FormatError(f"its header claims {header_size} bytes of a file of {probe.size}: a truncated download?")
    header = _parse(file.read(file.begin + 8, header_size))
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("its __metadata__ is not a map of strings to strings")
    notes: tuple[str, ...] = ()
    begins = None if isinstance(file, Section) else safetensors_file.sharding(metadata)
    if begins is not None:
        metadata = {name: text for name, text in metadata.items() if name not in safetensors_file.OWN}
        if parts := [name for name, offsets in begins.items() if any(offsets)]:
            raise IncompleteError(
                f"holds parts of a distributed checkpoint, of {listed(parts, 4)}: open the directory of all its "
                "shard-*-model-*.safetensors, under these names",
                file.path,
            )
        if not probe.name.startswith("model-"):
            notes = ("torch.distributed.checkpoint wrote it: the other parts of its tensors, if any, are not in it",)
    tree: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    forms: dict[object, _Form] = {}
    for name, entry in header.items():
        tensor, begin, end = _tensor(name, entry, file, start, forms)
        tree[name] = tensor
        ranges.append((begin, end, name))
    _check_ranges(ranges, file.size - start)
    said = aliases.plain(metadata, tree)
    doubts, whole = aliases.doubts(tree, metadata), aliases.restored(tree, metadata)
    return Checkpoint(whole, url=file.path, nbytes=file.size, metadata=said, notes=(*doubts, *notes))


_DIGITS = bytes(0x30 if byte in b"0123456789" else 0 for byte in range(256))


def _may_have_odd_numbers(raw: bytes) -> bool:
    """Returns whether there may be a number that is an int to Python, and not to the library (see `_int`)."""
    return (b"-0" in raw and bool(re.search(rb"-0\s*[,\]}]", raw))) or b"0" * 309 in raw.translate(_DIGITS)


def _parse(raw: bytes) -> dict[str, Any]:
    parse = partial(
        json.loads,
        parse_int=_int if _may_have_odd_numbers(raw) else None,
        parse_float=_float,
        parse_constant=_constant,
    )
    try:
        text = raw.decode("utf-8")
        header = parse(text)
        if raw.count(b":") != _count_names(header):  # duplicate names or colons in names; the slow parse tells
            header = None  # frees its memory before the second parse
            header = parse(text, object_pairs_hook=_unique)
        if b"\\ud" in raw or b"\\uD" in raw:  # escaped surrogates: a lone one cannot be encoded
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise FormatError("its header is nested too deep") from error
    except ValueError as error:
        raise FormatError(f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise FormatError("its header is no JSON object")
    return header


def _count_names(header: Any) -> int:
    """Returns the number of names in a header and its entries: that of its colons, unless there are duplicates."""
    entries = header.values() if isinstance(header, dict) else ()
    return len(entries) + sum(len(entry) for entry in entries if isinstance(entry, dict))


def _float(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError("a number out of range")
    return value


def _int(text: str) -> int | float:
    """Parses an integer as the library does: -0 is a float, and so is an integer of over 308 digits."""
    return int(text) if text != "-0" and len(text) < 309 else _float(text)


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise FormatError(f"its header has a name twice: {listed(name for name, count in counts.items() if count > 1)}")
    return found


class _Form(NamedTuple):
    """Shared by all tensors of one dtype and shape. ``dims`` is None if torch cannot hold them."""

    dtype: str
    storage: str | None
    bits: int
    dims: tuple[int, ...] | None
    stride: tuple[int, ...]


def _tensor(name: str, entry: Any, file: Source, start: int, forms: dict[object, _Form]) -> tuple[TensorInfo, int, int]:
    """Returns a tensor and its byte range in the data. ``forms`` caches the few forms of many tensors."""
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise FormatError(f"the header's entry {name!r} lacks dtype, shape or data_offsets") from error
    if len(entry) > 3 and _is_deep(entry):
        raise FormatError(f"the header's entry {name!r} is nested over {MAX_NESTING} deep (MAX_NESTING)")
    if type(kind) is not str or kind not in BY_SAFETENSORS:
        raise FormatError(f"{name!r} has dtype {kind!r}, unknown to safetensors")
    if (
        type(begin) is not int
        or type(end) is not int
        or type(shape) is not list
        or not _INT.issuperset(map(type, shape))
    ):
        raise _no_numbers(name, shape, begin, end)
    if (
        not (0 <= begin < 1 << 63 and 0 <= end < 1 << 63)
        or min(shape, default=0) < 0
        or max(shape, default=0) >= 1 << 63
    ):
        raise _no_numbers(name, shape, begin, end)
    key = kind, *shape
    form = forms.get(key)
    if form is None:
        form = forms[key] = _form(name, kind, shape)
    dtype, storage, bits, dims, stride = form
    if 8 * (end - begin) != bits:
        raise FormatError(f"{name!r}, {kind} of shape {brief(shape)}, takes {bits / 8:g} bytes; it has {end - begin}")
    if dims is None:
        raise UnsupportedError(f"{name!r} is F4 with an odd last dimension, which torch cannot hold")
    span = tuple.__new__(Span, (file.path, start + begin, end - begin, None, 0, file.version, None, 0))  # as in `zips`
    return TensorInfo(dtype, dims, stride, 0, Storage(span, storage)), begin, end


_INT = frozenset({int})


def _form(name: str, kind: str, shape: list[int]) -> _Form:
    row = BY_SAFETENSORS[kind]
    dims: tuple[int, ...] | None = tuple(shape)
    if not is_countable(tuple(shape)):
        raise FormatError(f"{name!r} has shape {brief(shape)}: more elements or dimensions than can be counted")
    bits = (4 if kind == "F4" else row.bits) * prod(shape)
    if kind == "F4":
        dims = (*shape[:-1], shape[-1] // 2) if shape and shape[-1] % 2 == 0 else None
    return _Form(row.name, row.name if row.storage else None, bits, dims, contiguous_stride(dims or ()))


def _is_deep(entry: dict[str, Any]) -> bool:
    """Returns whether an entry, unknown fields included, is nested deeper than the library's parser goes."""
    level: list[Any] = [entry]
    for _ in range(MAX_NESTING - 1):
        inside = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in inside if isinstance(child, (dict, list))]
    return bool(level)


def _no_numbers(name: str, shape: Any, begin: Any, end: Any) -> FormatError:
    return FormatError(
        f"{name!r} has shape {brief(shape)} and data_offsets {brief([begin, end])}: not all whole numbers"
    )


def _check_ranges(ranges: list[tuple[int, int, str]], size: int) -> None:
    """Raises FormatError unless the ranges cover the data exactly, without holes or overlaps."""
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            what = "overlaps another tensor" if begin < position else f"leaves a hole of {begin - position} bytes"
            raise FormatError(f"{name!r} begins at byte {begin} of the data and {what}")
        position = end
    if position != size:
        what = "a truncated download?" if position > size else "trailing bytes"
        raise FormatError(f"its header describes {position} bytes of data, the file has {size}: {what}")


def write(
    checkpoint: Checkpoint, output: Output, files: Files, map_location: MapLocation | None = None
) -> tuple[str, ...]:
    """Writes the state_dict at root, streaming; returns what else the checkpoint holds, which is left out.

    Raises: LossError naming every tensor the format cannot hold.
    """
    safetensors_file.write(*_stored(checkpoint), output, files)
    return checkpoint.left_out()


def check(checkpoint: Checkpoint, map_location: MapLocation | None = None) -> tuple[tuple[str, ...], int]:
    """Returns what `write` would leave out, and how many bytes it would write. Raises: as `write`."""
    header, nbytes = safetensors_file.begin(*_stored(checkpoint))
    return checkpoint.left_out(), len(header) + nbytes


def _stored(checkpoint: Checkpoint) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns the tensors to store, and the metadata, with the names tied to them. Raises: LossError."""
    tensors = checkpoint.state_dict()
    safetensors_file.refuse(tensors)
    dropped = aliases.record(tensors)
    safetensors_file.refuse_clashes(checkpoint.metadata, dropped)
    stored = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    return stored, {**aliases.carried(checkpoint.metadata, stored), **aliases.described(tensors, dropped)}
