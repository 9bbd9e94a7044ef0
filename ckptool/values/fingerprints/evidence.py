"""What the values of two state_dicts say of which tensor is which: the fingerprints of both, and tensors compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from ckptool.core.tensor import Derived, TensorInfo, computed_as
from ckptool.io.files import Files
from ckptool.values.blocks import same_bytes
from ckptool.values.fingerprints import search
from ckptool.values.fingerprints.prints import Print, meeting, take


class ValueEvidence:
    """The evidence of `ckptool.mapping.values`. Both sides are read once; what is compared is read again."""

    def __init__(self, source: Mapping[str, TensorInfo], target: Mapping[str, TensorInfo], files: Files) -> None:
        """Takes the fingerprints of both sides. Raises: FormatError, UnreadableError."""
        sources, targets = list(source.values()), list(target.values())
        self.files = files
        self.sources = take(sources, {one.dtype for one in targets if one.kind == "dense"}, files)
        self.targets = take(targets, {one.dtype for one in sources if one.kind == "dense"}, files)
        self.unread = {number: one.error for number, one in enumerate(self.targets) if one.error}
        one, other = (
            {number for number, print_ in enumerate(side) if not print_.telling and not print_.error}
            for side in (self.sources, self.targets)
        )
        self.plain = one, other
        first: dict[object, int] = {}
        self.twins = [first.setdefault(_own(one, number), number) for number, one in enumerate(self.sources)]

    def equal(self) -> dict[int, list[int]]:
        """Returns {target: sources of the same elements in the same order}; of twins the first."""
        return search.alike({first: self.sources[first] for first in self.twins}, dict(enumerate(self.targets)))

    def reordered(self, sources: Iterable[int], targets: Iterable[int]) -> Iterator[search.Guess]:
        """Yields guesses for targets that have the elements of one source in another order."""
        return search.reordered(self._of_sources(sources), {number: self.targets[number] for number in targets})

    def parted(self, sources: Iterable[int], targets: Iterable[int]) -> Iterator[search.Guess]:
        """Yields guesses for targets that are a part of a source, or made of several."""
        return search.parted(self._of_sources(sources), {number: self.targets[number] for number in targets})

    def near(self, sources: Iterable[int], targets: Iterable[int]) -> Iterator[search.Guess]:
        """Yields guesses for targets that lie near one source and far from all others."""
        return search.near(self._of_sources(sources), {number: self.targets[number] for number in targets})

    def _of_sources(self, numbers: Iterable[int]) -> dict[int, Print]:
        return {number: self.sources[number] for number in numbers if self.sources[number].telling}

    def same(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Returns whether two tensors have the same elements, at the lower precision of both; reads them."""
        dtype = meeting(one.dtype, other.dtype)
        return dtype is not None and same_bytes(_as(one, dtype), _as(other, dtype), self.files)

    def apart(self, one: TensorInfo, other: TensorInfo) -> float | None:
        """Returns the L2 norm of the difference, divided by that of the first; None where there is none. Reads both."""
        from ckptool.values.distance import distance

        return distance(one, other, self.files, 0.0, 0.0).rel_l2


def _own(print_: Print, number: int) -> object:
    """Returns what is equal for sources of the same elements; those that were not read are like no other."""
    level = print_.levels.get(print_.dtype) or next(iter(print_.levels.values()), None)
    return (print_.dtype, prod(print_.shape), level.order, level.total) if level else number


def _as(tensor: TensorInfo, dtype: str) -> TensorInfo:
    return tensor if tensor.dtype == dtype else computed_as(tensor, Derived("cast", (tensor,)), dtype)
