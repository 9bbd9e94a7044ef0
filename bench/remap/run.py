"""How well the mapping between two checkpoints is found: recall and harm on real pairs, and on harder versions of them.

From the top of the repository:

    python -m bench.remap.run                              the pairs as they are, by ckptool
    python -m bench.remap.run --set all --method all --speed
    python -m bench.remap.run --set ds,db --verbose        which keys were wrong
    python -m bench.remap.run --set all --page docs/benchmark-mapping.md
"""

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .baselines import METHODS
from .pairs import PARTS, Made, Pair, committed, of_folder
from .score import Score, score
from .speed import CASES, timed
from .stress import SETS, stress

NONE = float("-inf")
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


@dataclass
class Row:
    """A pair of a set, as a method maps it: its score at every confidence asked for."""

    set: str
    method: str
    pair: Pair
    seconds: float
    scores: list[Score]
    found: dict[str, tuple[float, Made]]


def tried(name: str, method: str, pair: Pair, confidences: list[float]) -> Row | None:
    """The pair as the set has it, mapped once and scored at every confidence."""
    harder = stress(name, pair)
    if harder is None:
        return None
    began = time.process_time()
    found = METHODS[method](harder.source, harder.target)
    seconds = time.process_time() - began
    scores = [
        score(harder, {key: made for key, (confidence, made) in found.items() if confidence >= least})
        for least in confidences
    ]
    return Row(name, method, harder, seconds, scores, found)


def all_tried(jobs: list[tuple[str, str, Pair, list[float]]], workers: int) -> list[Row]:
    """Every job that there is a pair for."""
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            rows = list(pool.map(tried, *zip(*jobs, strict=True), chunksize=4))
    else:
        rows = [tried(*job) for job in jobs]
    return [row for row in rows if row]


def summary(rows: list[Row], at: int) -> dict[str, float]:
    """The figures of some rows at the confidence of that number. Means are over pairs."""
    scores = [row.scores[at] for row in rows]
    many = max(1, len(scores))
    return {
        "pairs": len(scores),
        "recall": sum(one.recall for one in scores) / many,
        "harm_keys": sum(len(one.harm) for one in scores),
        "harm_free": sum(not one.harm for one in scores) / many,
        "exact": sum(one.exact for one in scores) / many,
        "layout_harm_keys": sum(len(one.layout_harm) for one in scores),
        "precision": sum(1 - len(one.wrong) / one.predicted if one.predicted else 1.0 for one in scores) / many,
    }


HEAD = ["recall", "harm", "harm-free", "exact", "layout"]


def cells(figures: dict[str, float]) -> list[str]:
    """What the table shows of them, as HEAD says."""
    return [
        f"{figures['recall']:.3f}",
        f"{figures['harm_keys']:.0f}",
        f"{figures['harm_free']:.3f}",
        f"{figures['exact']:.3f}",
        f"{figures['layout_harm_keys']:.0f}",
    ]


def table(rows: list[list[str]], markdown: bool) -> str:
    """Rows, the first of which is the head, as Markdown or in columns."""
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _said(made: Made | None) -> str:
    return f"{', '.join(made.sources)} [{made.op}]" if made else "none"


def told(row: Row, at: int, missed: bool) -> Iterator[str]:
    """The harmful keys of a pair, what was predicted and what is true; the missed ones too."""
    if row.pair.part == "held":
        return
    one = row.scores[at]
    bad = one.harm + one.layout_harm + (one.missed if missed else [])
    if bad:
        counts = f"{len(one.harm)} harmful, {len(one.layout_harm)} of another layout"
        yield f"{row.set} {row.pair.name}: {counts}, {len(one.missed)} missed of {one.wanted}"
    for key in dict.fromkeys(bad):
        confidence, made = row.found.get(key, (0.0, None))
        fate = "harm" if key in one.harm else "layout" if key in one.layout_harm else "missed"
        yield f"  {fate} {key} <- {_said(made)} {confidence:.2f}; true: {_said(row.pair.mapping.get(key))}"


def figures(rows: list[Row], by: tuple[str, ...], confidences: list[float]) -> list[dict[str, Any]]:
    """The sums of rows that agree in all of ``by``, in the order in which they come."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        what = {"set": row.set, "method": row.method, "part": row.pair.part, "pair": row.pair.name}
        groups.setdefault(tuple(what[one] for one in by), []).append(row)
    return [
        {
            **dict(zip(by, names, strict=True)),
            "seconds": sum(row.seconds for row in group),
            "at": [summary(group, at) for at in range(len(confidences))],
        }
        for names, group in groups.items()
    ]


def listed(given: list[dict[str, Any]], by: tuple[str, ...], confidences: list[float], markdown: bool) -> str:
    """Figures as a table."""
    names = ["none" if least == NONE else f"{least:g}" for least in confidences]
    rows = [[*by, "pairs", *(f"{head} {name}".strip() for name in names for head in HEAD), "s"]]
    for one in given:
        shown = [cell for summed in one["at"] for cell in cells(summed)]
        rows.append([*(one[name] for name in by), str(one["at"][0]["pairs"]), *shown, f"{one['seconds']:.1f}"])
    return table(rows, markdown)


def speeds(method: str) -> list[list[str]]:
    """A row for each model of many keys."""
    rows = [["model", "keys", "mapped", "s"]]
    for name in CASES:
        keys, mapped, seconds = timed(name, METHODS[method])
        rows.append([name, f"{keys:,}", f"{mapped:,}", f"{seconds:.2f}"])
    return rows


def page(path: Path, pairs: list[Pair], names: list[str], confidences: list[float], workers: int) -> None:
    """Writes the tables of the page between its marks, of these sets."""
    methods = [name for name in METHODS if name != "nowords"]
    plain = all_tried([("plain", method, pair, confidences) for method in methods for pair in pairs], workers)
    harder = [name for name in names if name != "plain"]
    sets = all_tried([(name, "core", pair, confidences) for name in harder for pair in pairs], workers)
    bare = [name for name in ("plain", "ds", "mix1") if name in names]
    nowords = all_tried([(name, "nowords", pair, confidences) for name in bare for pair in pairs], workers)
    sections = [
        ("Beside simpler methods, the pairs as they are", plain, ("method", "part")),
        ("Harder versions of the pairs, by ckptool", sets, ("set", "part")),
        ("Without the table of field words", nowords, ("set", "part")),
    ]
    text = [BEGIN]
    for title, rows, by in sections:
        text += ["", f"## {title}", "", listed(figures(rows, by, confidences), by, confidences, markdown=True)]
    text += ["", "## Many keys, by ckptool", "", table(speeds("core"), markdown=True)]
    for title, known in (("The methods", METHODS), ("The sets", SETS)):
        text += ["", f"## {title}", "", *(f"- `{name}`: {_line(given)}" for name, given in known.items())]
    old = path.read_text()
    path.write_text(old[: old.index(BEGIN)] + "\n".join([*text, "", END]) + old[old.index(END) + len(END) :])


def _line(given: Any) -> str:
    return " ".join((given.__doc__ or "").split())


def main(folders: list[Path] | None = None) -> int:
    """Reads the command line, and prints a table or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="plain", help=f"of {', '.join(SETS)}, separated by commas; or all")
    parser.add_argument("--method", default="core", help=f"of {', '.join(METHODS)}; or all")
    parser.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--pairs", default="*", help="a pattern for the names of pairs")
    parser.add_argument("--from", dest="folders", action="append", type=Path, help="other pairs: folders of long forms")
    parser.add_argument("--min-confidence", action="append", type=float, help="instead of 0.8; may be given again")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--verbose", action="store_true", help="the harmful keys at the last confidence, but of held pairs"
    )
    parser.add_argument("--missed", action="store_true", help="with --verbose: the missed keys too")
    parser.add_argument("--per-pair", action="store_true", help="a row for every pair")
    parser.add_argument("--by-part", action="store_true", help="a row for every part")
    parser.add_argument("--speed", action="store_true", help="models of many keys too")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, help="the figures as JSON")
    parser.add_argument("--page", type=Path, help="writes the tables between the marks of this page")
    args = parser.parse_args()
    confidences = [NONE, *(args.min_confidence or [0.8])]
    from_folders = args.folders or folders
    pairs = [pair for folder in from_folders for pair in of_folder(folder)] if from_folders else committed()
    if not args.folders:
        pairs = [pair for pair in pairs if pair.part in args.part.split(",")]
    pairs = [pair for pair in pairs if fnmatch.fnmatch(pair.name, args.pairs)]
    sets = list(SETS) if args.set == "all" else args.set.split(",")
    if args.page:
        page(args.page, pairs, sets, confidences, args.jobs)
        return 0
    methods = list(METHODS) if args.method == "all" else args.method.split(",")
    jobs = [(name, method, pair, confidences) for method in methods for name in sets for pair in pairs]
    rows = all_tried(jobs, args.jobs)
    if args.verbose:
        for row in rows:
            for line in told(row, len(confidences) - 1, args.missed):
                print(line)
    by = ("method", "set", *(("part",) if args.by_part else ()), *(("pair",) if args.per_pair else ()))
    found = figures(rows, by, confidences)
    print(listed(found, by, confidences, args.markdown))
    fast = [row for method in methods for row in speeds(method)] if args.speed else []
    if fast:
        print(table(fast, args.markdown))
    if args.json:
        shown = [None if least == NONE else least for least in confidences]
        args.json.write_text(json.dumps({"confidences": shown, "rows": found, "speed": fast}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
