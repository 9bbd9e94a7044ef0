"""Compares two tensors: by recorded checksums, by their bytes, else by the distance of their values.

numpy is imported only where bytes differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ckptool.core import keys as names
from ckptool.core.findings import Distance, PrefixDistance
from ckptool.core.tensor import Opaque, TensorInfo, whole_storage
from ckptool.core.tree import Global, PyObject
from ckptool.io.files import Files
from ckptool.values.blocks import same_bytes

if TYPE_CHECKING:
    from ckptool.values.distance import Sums

DIFFER = Distance("differ", None, None, None, None)
"""Of tensors that differ by an unknown distance."""
UNKNOWN = Distance("unknown", None, None, None, None)


def compare_bytes(a: TensorInfo, b: TensorInfo, files: Files) -> Distance:
    """Returns whether two tensors of one shape have the same bytes: by their recorded CRC-32, else by reading both.

    Different checksums prove different bytes. Equal ones are wrong by accident once in 2^32, and can be forged.
    """
    sums = _recorded(a), _recorded(b)
    if None not in sums and a.dtype == b.dtype:
        return Distance("equal") if sums[0] == sums[1] else DIFFER
    if isinstance(a.source, Opaque) or isinstance(b.source, Opaque):
        return _compare_parts(a, b, files, 0.0, 0.0)
    return Distance("equal") if same_bytes(a, b, files) else DIFFER


def compare_hashes(a: TensorInfo, b: TensorInfo, files: Files) -> Distance:
    """Returns whether two tensors have one hash; what has values is read for it, what is only described may have none.

    ``unknown`` where it has none, and of a tensor on meta against values. Zeros of another sign are another hash.
    """
    from ckptool.values.contents import digest

    if any(one.described_in and not one.described_in.hash for one in (a, b)):
        return UNKNOWN
    first, second = (one.described_in.hash if one.described_in else digest(one, files) for one in (a, b))
    if first == second:
        return Distance("equal")
    empty = any(one.kind == "meta" and not one.described_in for one in (a, b))
    return UNKNOWN if empty else DIFFER


def _recorded(tensor: TensorInfo) -> int | None:
    """Returns the CRC-32 that the file records for a tensor's bytes, if the tensor is all of its storage."""
    storage = whole_storage(tensor)
    return None if storage is None else storage.crc32


def compare(a: TensorInfo, b: TensorInfo, files: Files, rtol: float, atol: float) -> Distance:
    """Returns how far two tensors of one shape are apart; reads both, a block at a time.

    Floating-point values are close where |a - b| <= atol + rtol * |b|, as `torch.allclose` has it; integers and
    booleans are exact. Different dtypes are compared as float64, quantised tensors by their dequantised values. Dtypes
    without values are equal or differ.
    """
    if isinstance(a.source, Opaque) or isinstance(b.source, Opaque):
        return _compare_opaque(a, b, files, rtol, atol)
    if _are_equal(a, b, files):
        return Distance("equal")
    from ckptool.values.distance import distance, has_numbers

    if not (has_numbers(a) and has_numbers(b)):
        return DIFFER
    return distance(a, b, files, rtol, atol)


def _are_equal(a: TensorInfo, b: TensorInfo, files: Files) -> bool:
    recorded = _recorded(a), _recorded(b)
    known_to_differ = None not in recorded and recorded[0] != recorded[1]  # then they need not be read to find that out
    return not known_to_differ and same_bytes(a, b, files)


def _compare_opaque(a: TensorInfo, b: TensorInfo, files: Files, rtol: float, atol: float) -> Distance:
    found = _compare_parts(a, b, files, rtol, atol)
    if found.status == "equal" or "quantized" not in (a.kind, b.kind) or a.shape != b.shape:
        return found
    from ckptool.values.distance import distance, has_numbers

    return distance(a, b, files, rtol, atol) if has_numbers(a) and has_numbers(b) else found


def _compare_parts(a: TensorInfo, b: TensorInfo, files: Files, rtol: float, atol: float) -> Distance:
    """Compares sparse, quantised and nested tensors part by part; all other arguments of their rebuild call exactly."""
    if not (isinstance(a.source, Opaque) and isinstance(b.source, Opaque)) or a.form != b.form:
        return DIFFER
    if len(a.parts) != len(b.parts) or _plain(a.source.node.args) != _plain(b.source.node.args):
        return DIFFER
    found = [compare(one, other, files, rtol, atol) for one, other in zip(a.parts, b.parts, strict=True)]
    return max(found, key=lambda part: ("equal", "close", "differ").index(part.status), default=Distance("equal"))


def _plain(node: Any) -> Any:
    """Returns the arguments of a rebuild call that are neither tensor nor storage, in a form that compares by value."""
    if isinstance(node, (list, tuple)):
        return [_plain(item) for item in node]
    if isinstance(node, dict):
        return [(_plain(key), _plain(value)) for key, value in node.items()]
    if isinstance(node, (str, int, float, bool, type(None), Global)):
        return repr(node)
    return _plain(node.args) if isinstance(node, PyObject) else None


class Prefixes:
    """Compares pairs of tensors as `compare` does, and adds their sums up below prefixes of ``depth`` names.

    The prefixes follow what all ``keys`` of A begin with. ``tied`` are those whose tensors may share memory: a pair of
    tensors counts once below a prefix. Memory grows with the number of prefixes.
    """

    def __init__(self, keys: Collection[str], tied: Iterable[str], depth: int) -> None:
        self.behind, self.depth, self.tied = names.common_prefix([*keys]), depth, {*tied}
        self.rows: dict[str, _Row] = {}
        self.key, self.counters = "", False

    def _cut(self, key: str) -> str:
        return names.cut(key, self.depth, self.behind if key.startswith(self.behind) else "")

    def begin(self, key: str) -> None:
        """Notes a key that both sides have: tensors that are compared before the next are of this key."""
        self.key, prefix = key, self._cut(key)
        self.now = self.rows.get(prefix) or self.rows.setdefault(prefix, _Row())
        self.now.tensors += 1

    def compare(self, a: TensorInfo, b: TensorInfo, files: Files, rtol: float, atol: float) -> Distance:
        """Returns what `compare` does, of the tensors of the key that began; equal ones are read for their norms."""
        from ckptool.values.distance import has_numbers, is_fast, measured

        if not (has_numbers(a) and has_numbers(b)):
            return compare(a, b, files, rtol, atol)
        equal = a.kind == b.kind == "dense" and not is_fast(a, b) and _are_equal(a, b, files)
        sums, row = measured(a, b, files, rtol, atol, equal), self.now
        row.measured += 1
        self.counters |= names.is_counter(self.key) and bool(sums.a.scale or sums.b.scale)
        if self.key in self.tied:
            if (a.view, b.view) in row.seen:
                return sums.distance()
            row.seen.add((a.view, b.view))
        if row.sums:
            row.sums.merge(sums)
        else:
            row.sums = sums
        return sums.distance()

    def distances(self, found: Iterable[tuple[str, str]]) -> Iterator[PrefixDistance]:
        """Yields the row of each prefix, in the order of A. ``found``: (key, what is to be counted of it)."""
        counts = Counter((self._cut(key), what) for key, what in found)
        for prefix, row in self.rows.items():
            sums = row.sums.distance() if row.sums else DIFFER
            yield PrefixDistance(
                prefix, row.tensors, counts[prefix, "differ"], counts[prefix, "close"], row.tensors - row.measured,
                sums.max_abs, sums.rel_l2, sums.mean_abs, sums.cosine, counts[prefix, "allowed"] or None,
            )  # fmt: skip


class _Row:
    """The sums below a prefix, how many keys both sides have there and how many were measured, and tied pairs."""

    __slots__ = ("measured", "seen", "sums", "tensors")

    def __init__(self) -> None:
        self.tensors = self.measured = 0
        self.sums: Sums | None = None
        self.seen: set[tuple[object, object]] = set()
