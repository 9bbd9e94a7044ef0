"""The conditions under which `filter` and `load-partial` write: --min-loaded, --require, --strict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptool.core import keys
from ckptool.ops.rows import LOADED, FilterReport, Gate, Row
from ckptool.text import percent

if TYPE_CHECKING:
    from ckptool.partial.plan import LoadPartialReport

STRICT = ("missing", "unexpected", "mismatched")
"""The reasons that --strict refuses."""


def failed(
    report: FilterReport | LoadPartialReport, least: float | None, require: Sequence[str], strict: bool
) -> list[Gate]:
    """Returns the conditions that do not hold; nothing is written if there are any."""
    found = []
    if report.target and report.sources and not report.loaded:
        found.append(Gate("loaded", "no key of the source fits"))
    if least is not None and report.loaded_fraction < least:
        share, wanted = percent(report.loaded_fraction), percent(least)
        found.append(Gate("min-loaded", f"{share} of the parameters loaded, --min-loaded wants {wanted}"))
    rows: dict[str, Row] = {}
    for row in report.rows:  # rows of the target come first and take precedence
        if row.reason != "unexpected":
            rows.setdefault(row.key, row)
    for pattern in require:
        fitting = [key for key in rows if keys.fits(pattern, key)]
        lacking = [key for key in fitting if rows[key].reason not in LOADED]
        if not fitting:
            found.append(
                Gate("require", f"--require {pattern} fits no key of the target{keys.near_pattern(pattern, rows)}")
            )
        elif lacking:
            shown = ", ".join(lacking[:8]) + " ..." * (len(lacking) > 8)
            found.append(Gate("require", f"--require {pattern}: not loaded: {shown}", lacking))
    if strict:
        bad = [f"{report.counts[reason]} {reason}" for reason in STRICT if report.counts.get(reason)]
        packed = [row.key for row in report.rows if row.reason == "ignored" and row.tensors]
        if packed:
            bad.append(f"{len(packed)} objects that hold tensors")
        if bad:
            refused = [row.key for row in report.rows if row.reason in STRICT]
            found.append(Gate("strict", f"--strict: {', '.join(bad)}", [*refused, *packed]))
    return found
