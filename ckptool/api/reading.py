"""The functions of `import ckptool` that only read: inspect, diff, check_schema."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from ckptool import formats
from ckptool.api.sources import Patterns, Source, open, open_whole
from ckptool.core import keys
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import Path

# Operations are imported by the functions that use them: a command needs one or two of them.
if TYPE_CHECKING:
    from ckptool.ops.diff import DiffReport
    from ckptool.ops.inspect import InspectReport
    from ckptool.references.allowed import Planned
    from ckptool.references.schema import SchemaReport
    from ckptool.saving import Progress
    from ckptool.values.compare import Prefixes


def inspect(
    source: Source,
    *,
    root: str | Path | None = None,
    stats: bool = False,
    hashes: bool = False,
    check: bool = False,
    include: Patterns = (),
    exclude: Patterns = (),
    fail_on: Patterns | None = None,
    allow: Patterns = (),
    progress: Progress | None = None,
) -> InspectReport:
    """Returns what a checkpoint holds: its weights, the rest of its tree, metadata, notes.

    Reads headers only, unless one of these options is set. Then it reads every tensor once, in constant memory, on up
    to four threads: ``stats`` (mean, standard deviation, extremes, zeros, NaN and infinities, of every tensor and of
    every prefix; see `Stats`), ``hashes`` (sha256 of each tensor and of all; `ckptool.values.contents` defines what
    is hashed), ``check`` (damage; see `Finding`). ``include`` and ``exclude`` choose the keys to read; the report
    lists all. ``fail_on`` are the kinds of finding that fail the check (None: all but unknown and ordinary names), and
    names of the pickle that fit ``allow`` pass. ``progress`` is called with the number of bytes as they are read.

    Raises: what `open` raises; FormatError for unreadable data, which ``check`` reports instead; NoTensorsError if all
    tensors are elsewhere than at a ``root`` that was given; IncompleteError for ``hashes`` if shards are missing.
    """
    from ckptool.ops.inspect import inspect as op
    from ckptool.ops.notes import require_tensors

    opened = open(source, root)
    if root is not None and next(opened.tensors(), None):
        require_tensors(opened)
    include, exclude, allow = keys.all_texts(include=include, exclude=exclude, allow=allow)
    report = op(opened, devices=formats.has_devices(opened.format))
    if not (stats or hashes or check):
        return report
    from ckptool.core.findings import check as judge
    from ckptool.values.contents import look_into

    choose = keys.chooser(include, exclude) if include or exclude else None
    found = look_into(opened, choose, stats=stats, hashes=hashes, check=check, progress=progress)
    judged = judge(report.problems, opened.trailing, report.kinds, found.findings, found.unchecked, fail_on, allow)
    rows, inside = (
        [replace(row, stats=found.stats.get(row.key), hash=found.hashes.get(row.key)) for row in some]
        if stats or hashes else some
        for some in (report.tensors, report.inside)
    )  # fmt: skip
    return replace(
        report, tensors=rows, inside=inside, notes=[*report.notes, *found.missed], hash=found.whole,
        prefixes=found.prefixes if stats else None, check=judged if check else None,
    )  # fmt: skip


def diff(
    a: Source,
    b: Source,
    *,
    ignore: Patterns = (),
    strip_prefix_a: Patterns | None = None,
    strip_prefix_b: Patterns | None = None,
    devices: bool = False,
    values: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    quick: bool = False,
    depth: int | None = None,
    renames: str | None = None,
    rules: bool = False,
    fail_on: Patterns | None = None,
    allow: Planned | None = None,
    progress: Progress | None = None,
) -> DiffReport:
    """Returns how two checkpoints' weights differ: keys, shapes and dtypes, from headers alone.

    ``values`` also compares the data, block by block, with `torch.allclose`'s tolerances; NaN equals NaN,
    integers are exact. ``quick`` only finds whether the bytes are equal, and trusts the CRC-32 that torch's archives
    record where both sides have one. A lock file's tensors are compared by their hashes, as far as it has them
    (``uncompared``). ``depth`` goes with ``values``: distances are summed below that many names of keys (``prefixes``).
    ``renames``: how tensors that have another name in B (``renamed``) are found: by ``structure``, which is by equal
    values first, where values are compared; by ``values`` alone; or not (``off``). None: by structure, but not among so
    many names that it would take long, which a note says. ``rules``: the report has rules that give A's keys B's names.
    ``fail_on``: the kinds of differences that ``fails`` names (None: those that are not `HARMLESS`).
    ``allow``: planned changes, which do not fail: a TOML file, or its table (see `ckptool.references.allowed`).
    ``progress`` is called with the bytes of both sides of each compared pair.
    Raises: what `open` raises, NoTensorsError; FormatError for what is no list of planned changes.
    """
    from ckptool.api import matching
    from ckptool.ops import diff as op

    keys.expect_numbers(0, rtol=rtol, atol=atol)
    ignore, one, other = keys.all_texts(ignore=ignore, strip_prefix_a=strip_prefix_a, strip_prefix_b=strip_prefix_b)
    both: dict[str, Any] = {"ignore": ignore, "strip_prefix_a": one, "strip_prefix_b": other, "devices": devices}
    both["fail_on"] = None if fail_on is None else keys.texts(fail_on, "fail_on")
    if allow is not None:
        from ckptool.references import allowed

        entries = allowed.entries_of(allow)
        both["judge"] = lambda report, spelled: allowed.judged(report, entries, spelled)
    fits = depth is None or (type(depth) is int and depth >= 1 and values)
    keys.expect(fits, "depth", "a whole number from 1 on, with values=True", depth)
    first, second = open_whole(a), open_whole(b)
    find = matching.renames(first, second, renames, values or quick)

    def done(report: DiffReport) -> DiffReport:
        return replace(report, rules=matching.renaming(first, second, report, one, other)) if rules else report

    differences = partial(op.diff, first, second, **both, renames=find)
    if not (values or quick):
        return done(differences())
    from ckptool import saving
    from ckptool.core.findings import Distance
    from ckptool.io.files import Files
    from ckptool.values.compare import Prefixes, compare, compare_bytes, compare_hashes

    below = None
    if depth is not None:
        chosen = filter(keys.chooser((), ignore), first.state_dict())
        below = Prefixes([*chosen], chain.from_iterable(first.shared()), depth)
    with Files(progress) as files:
        files.expect(tensor for one in (first, second) for tensor in one.state_dict().values())

        def compared(one: TensorInfo, other: TensorInfo) -> Distance:
            with saving.share(files, one.nbytes + other.nbytes):
                if one.described_in or other.described_in:
                    return compare_hashes(one, other, files)
                if quick:
                    return compare_bytes(one, other, files)
                return (below.compare if below else compare)(one, other, files, rtol, atol)

        begin = below.begin if below else None
        report = differences(compare=compared, by="bytes" if quick else None, begin=begin)
    return done(report if below is None else _with_prefixes(report, below))


def _with_prefixes(report: DiffReport, below: Prefixes) -> DiffReport:
    """Returns a report with the distances below each prefix."""
    found = [(row.key, row.status) for row in report.values]
    found += [(row.key, "allowed") for row in report.allowed if row.kind == "values"]
    counters = "num_batches_tracked counts in the sums of --depth; --ignore '*num_batches_tracked' leaves it out"
    notes = [*report.notes, *[counters] * below.counters]
    return replace(report, prefixes=[*below.distances(found)], notes=notes)


def check_schema(
    source: Source,
    schema: str | os.PathLike[str] | Mapping[str, Any],
    *,
    ignore: Patterns = (),
    strip_prefix: Patterns | None = None,
) -> SchemaReport:
    """Returns which rules of a schema of patterns a checkpoint does not meet, with the keys; reads headers only.

    ``schema``: the path of a TOML file, or its table (see `ckptool.references.schema`).
    Raises: what `open` raises, NoTensorsError; FormatError for what is no schema.
    """
    from ckptool.references import schema as op

    ignore, strip_prefix = keys.all_texts(ignore=ignore, strip_prefix=strip_prefix)
    rules = op.parse(schema) if isinstance(schema, Mapping) else op.read(schema)
    report = op.check(rules, open_whole(source), ignore=ignore, strip_prefix=strip_prefix)
    return report if isinstance(schema, Mapping) else replace(report, rules=os.fspath(schema))
