"""Results of reading a checkpoint's values: statistics, distances to another's, and findings of damage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from ckptool.core.keys import fits, texts
from ckptool.core.pickled_names import NameKind
from ckptool.errors import one_of

Kind = Literal[
    "index", "offsets", "trailing", "crc", "data", "nan", "inf", "acting", "unknown", "ordinary"
]  # fmt: skip

KINDS: tuple[Kind, ...] = (
    "index", "offsets", "trailing", "crc", "data", "nan", "inf", "acting", "unknown", "ordinary",
)  # fmt: skip
"""All kinds of finding, in the order of a report."""

FAIL_ON = KINDS[: KINDS.index("unknown")]
"""The kinds of finding that fail a check, if nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many of a tensor's finite values are in each of 32 bins or fewer: from ``start`` + i * ``width`` on.

    ``width`` is a power of two and ``start`` a multiple of it, so the histograms of several tensors can be added
    exactly. Of more than 1,048,576 values, one of eight is counted.
    """

    start: int | float
    """Where the first bin begins."""
    width: int | float
    """The width of each bin."""
    counts: list[int]
    """How many values are in each bin; a value on the edge of two is in the upper one."""
    below: int = 0
    """How many are below the first bin: at most one of 1,000, and none where bins of the same width hold all."""
    above: int = 0
    """How many are above the last bin, likewise."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Statistics of a tensor's values. All but ``nan`` and ``inf`` are of the finite values; null where there is none.

    Integers have exact extremes. Complex numbers count as their absolute values, booleans as 0 and 1.
    """

    mean: float | None
    """The mean."""
    std: float | None
    """The standard deviation with n - 1 below, as `torch.std`; null for fewer than two values."""
    min: int | float | None
    """The smallest value."""
    max: int | float | None
    """The largest value."""
    abs_max: int | float | None
    """The largest absolute value."""
    zeros: int
    """How many are zero."""
    nan: int
    """How many are NaN."""
    inf: int
    """How many are infinite."""
    histogram: Histogram | None = None
    """Of the finite values; absent for sums below a prefix, and where no value is finite."""


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """The statistics of all tensors below a prefix."""

    prefix: str
    """Whole names, joined with dots."""
    tensors: int
    """How many are below it, two or more; each tie group counts once."""
    stats: Stats
    """Of all their values together."""


@dataclass(frozen=True, slots=True)
class Distance:
    """The distance between two tensors of one shape.

    ``status``: ``equal`` (every element, NaN equal to NaN), ``close`` (within the tolerance) or ``differ``; ``unknown``
    where one side has neither values nor a hash.
    ``max_abs`` is the largest |a - b|, ``mean_abs`` their mean, ``rel_l2`` is |a - b| / |a| over all elements and
    ``cosine`` a.b / (|a| |b|), of complex numbers the real part. All are None where an element is NaN or infinite on
    one side only (where it is so on both, its gap is 0); ``rel_l2`` is None where a is all zeros and b is not,
    ``cosine`` where either is.
    """

    status: Literal["equal", "close", "differ", "unknown"]
    max_abs: float | None = 0.0
    rel_l2: float | None = 0.0
    mean_abs: float | None = 0.0
    cosine: float | None = 1.0


@dataclass(frozen=True, slots=True)
class PrefixDistance:
    """How far all tensors of A below a prefix are from those of B; a tie group of both sides counts once."""

    prefix: str
    """Whole names, joined with dots: the first of a key of A, or all of a shorter one."""
    tensors: int
    """How many keys below it both sides have."""
    changed: int
    """How many of them have other values; those that are only close do not count."""
    close: int
    """How many of them are close: within the tolerances."""
    unmeasured: int
    """How many of them have no part in the numbers: other shapes, or no values that are numbers."""
    max_abs: float | None
    """The largest abs(a - b); null where not finite, or where nothing is measured."""
    rel_l2: float | None
    """The L2 norm of a - b divided by that of a, over all elements, those of equal tensors too; null as ``max_abs``,
    and where a is all zeros but b is not."""
    mean_abs: float | None
    """The mean of abs(a - b) over all elements, those of equal tensors too; null as ``max_abs``."""
    cosine: float | None
    """The cosine of the angle between all of a and all of b; null as ``max_abs``, and where either is all zeros."""
    allowed: int | None = None
    """How many of the changed are planned (--allow); absent for none."""

    @property
    def status(self) -> str:
        """Returns ``differ``, ``close`` or ``equal``: what is true of the tensors that were compared."""
        return "differ" if self.changed else "close" if self.close else "equal"

    @property
    def key(self) -> str:
        """Returns the prefix: what rows are sorted by."""
        return self.prefix


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a file to know before it is used.

    ``index``: shards and their index contradict each other. ``offsets``: a zip member is not at the directory's
    offset. ``trailing``: more follows the end of the content, and is not read. ``crc``: bytes differ from their
    checksum. ``data``: they cannot be read. ``nan``, ``inf``: ``count`` elements are NaN or infinite. ``acting``,
    ``unknown``, ``ordinary``: a class or function that the pickle names and tensors do not need (see
    `ckptool.core.pickled_names`; ordinary ones only if they are to fail).
    ``key`` is below root, or a whole path. ``passes`` is True for a finding that does not fail the check, else None.
    """

    kind: Kind
    """Its kind, one of those above."""
    text: str
    """What was found, in words."""
    key: str | None = None
    """The key below root, or a whole path."""
    count: int | None = None
    """Of nan and inf: how many elements."""
    passes: bool | None = None
    """True if it does not fail the check; else absent."""


@dataclass(frozen=True, slots=True)
class Check:
    """The findings of --check."""

    findings: list[Finding] = field(default_factory=list)
    """None if the file is sound."""
    unchecked: list[str] = field(default_factory=list)
    """What could not be checked."""

    @property
    def fails(self) -> bool:
        """Returns whether there is a finding that does not pass."""
        return not all(finding.passes for finding in self.findings)


def failing(fail_on: Sequence[str] | None) -> tuple[Kind, ...]:
    """Returns the kinds of finding that fail a check. Raises: UsageError for what is none."""
    if fail_on is None:
        return FAIL_ON
    kinds = texts(fail_on, "fail_on")
    for wanted in kinds:
        one_of(KINDS, wanted, "--fail-on")
    return cast("tuple[Kind, ...]", tuple(kinds))


def check(
    problems: Sequence[str],
    trailing: str,
    names: Mapping[str, NameKind],
    found: Iterable[Finding],
    unchecked: Sequence[str],
    fail_on: Sequence[str] | None = None,
    allow: Sequence[str] = (),
) -> Check:
    """Returns all findings, by kind: those of the headers, and those ``found`` in the bytes.

    ``names`` are {name: kind} of what the pickle names; ``fail_on`` the kinds that fail (None: `FAIL_ON`); names that
    fit a pattern of ``allow`` pass. Raises: UsageError for a kind that is none.
    """
    fails = failing(fail_on)
    findings = [
        *(Finding("index", text) for text in problems),
        *([Finding("trailing", trailing)] if trailing else []),
        *found,
    ]
    for name, kind in names.items():
        if kind == "tensor" or (kind == "ordinary" and kind not in fails):
            continue
        passes = any(fits(pattern, name) for pattern in allow) or None
        findings.append(Finding(kind, f"{name}: named by the pickle, not needed by tensors, not run", passes=passes))
    findings = [one if one.kind in fails else replace(one, passes=True) for one in findings]
    return Check(sorted(findings, key=lambda finding: KINDS.index(finding.kind)), list(unchecked))


def not_finite(key: str, nan: int, inf: int, numel: int) -> list[Finding]:
    """Returns the findings on a tensor of ``numel`` numbers, some of which are NaN or infinite."""
    counts: tuple[tuple[Kind, str, int], ...] = (("nan", "NaN", nan), ("inf", "infinite", inf))
    return [Finding(kind, f"{count:,} of {numel:,} are {word}", key, count) for kind, word, count in counts if count]
