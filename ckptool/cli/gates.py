"""What a plan must hold to be good enough: the conditions under which `filter` and `load-partial` say 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptool import keys
from ckptool.cli import render
from ckptool.errors import UsageError
from ckptool.ops.filter import LOADED, FilterReport, Row

if TYPE_CHECKING:
    from ckptool.ops.load_partial import LoadPartialReport


def fraction(text: str | None) -> float | None:
    """Returns the share that ``90%`` or ``0.9`` means. Raises: UsageError."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"--min-loaded takes a share such as 90% or 0.9, not {text!r}")
    return value


def failed(
    report: FilterReport | LoadPartialReport, least: float | None, require: Sequence[str], strict: bool
) -> list[str]:
    """Returns why the result is not good enough, a line each; empty if it is."""
    found = []
    if report.target and report.sources and not report.loaded:
        found.append("no key of the source fits")
    if least is not None and report.loaded_fraction < least:
        share, wanted = render.percent(report.loaded_fraction), render.percent(least)
        found.append(f"{share} of the parameters loaded, --min-loaded wants {wanted}")
    rows: dict[str, Row] = {}
    for row in report.rows:  # the target's come first, and count
        if row.reason != "unexpected":
            rows.setdefault(row.key, row)
    for pattern in require:
        fitting = [key for key in rows if keys.fits(pattern, key)]
        lacking = [key for key in fitting if rows[key].reason not in LOADED]
        if not fitting:
            found.append(f"--require {pattern} fits no key of the target")
        elif lacking:
            found.append(f"--require {pattern}: not loaded: {', '.join(lacking[:8])}" + (" ..." * (len(lacking) > 8)))
    if strict:
        bad = [f"{report.counts[reason]} {reason}" for reason in ("missing", "unexpected", "mismatched")
               if report.counts.get(reason)]  # fmt: skip
        packed = sum(row.reason == "ignored" and bool(row.tensors) for row in report.rows)
        if packed:
            bad.append(f"{packed} objects that hold tensors")
        if bad:
            found.append(f"--strict: {', '.join(bad)}")
    return found
