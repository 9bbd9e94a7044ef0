"""Pairs of checkpoints whose mapping is known: names, shapes and dtypes, no weights."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

PACKED = Path(__file__).parent / "pairs.json.gz"

PARTS = ("given", "dev", "held")
"""given: the pairs that the mapping was made on. dev: of other families; they may be looked at. held: of other families
again; only their sums are looked at, so that they measure what was not tuned on them."""


class Entry(NamedTuple):
    """One tensor of a listing."""

    key: str
    shape: tuple[int, ...]
    dtype: str


class Made(NamedTuple):
    """How a target tensor is made: the source keys in their order, and the op (docs/reference/op.md)."""

    sources: tuple[str, ...]
    op: str


@dataclass(frozen=True)
class Pair:
    """Two listings, in the order of their files, and the true mapping between them."""

    name: str
    family: str
    source: list[Entry]
    target: list[Entry]
    mapping: dict[str, Made]
    # Keys that hold the same tensor: any of them is right.
    source_ties: list[list[str]] = field(default_factory=list)
    target_ties: list[list[str]] = field(default_factory=list)
    # Target keys that are not scored.
    doubtful: frozenset[str] = frozenset()
    # Target and source keys that belong together and have other shapes, such as a head of another number of classes.
    mismatched: list[tuple[str, str]] = field(default_factory=list)
    provenance: str = ""
    # Which part of the benchmark it is of: see PARTS.
    part: str = "given"
    # Other mappings that are as right as `mapping`: nothing in the listings tells them apart.
    alternatives: list[dict[str, Made]] = field(default_factory=list)


def of_json(given: dict[str, Any]) -> Pair:
    """A pair in the long form: a JSON object a pair, every key written out."""
    return Pair(
        given["name"],
        given["family"],
        [Entry(row["key"], tuple(row["shape"]), row["dtype"]) for row in given["source"]],
        [Entry(row["key"], tuple(row["shape"]), row["dtype"]) for row in given["target"]],
        {row["target"]: Made(tuple(row["source"]), row["op"]) for row in given["mapping"]},
        given.get("source_ties") or [],
        given.get("target_ties") or [],
        frozenset(given.get("doubtful") or ()),
        [(row["target"], row["source"][0]) for row in given.get("shape_mismatch") or () if len(row["source"]) == 1],
        given.get("provenance", ""),
    )


def to_json(pair: Pair) -> dict[str, Any]:
    """The long form, which a scorer of another house reads too."""
    used = {key for made in pair.mapping.values() for key in made.sources}
    return {
        "name": pair.name,
        "family": pair.family,
        "source": [{"key": e.key, "shape": list(e.shape), "dtype": e.dtype} for e in pair.source],
        "target": [{"key": e.key, "shape": list(e.shape), "dtype": e.dtype} for e in pair.target],
        "mapping": [{"target": t, "source": list(made.sources), "op": made.op} for t, made in pair.mapping.items()],
        "unmatched_source": [e.key for e in pair.source if e.key not in used],
        "unmatched_target": [e.key for e in pair.target if e.key not in pair.mapping],
        "shape_mismatch": [{"target": t, "source": [s]} for t, s in pair.mismatched],
        "source_ties": pair.source_ties,
        "target_ties": pair.target_ties,
        "doubtful": sorted(pair.doubtful),
        "provenance": pair.provenance,
        "notes": "",
    }


def of_folder(folder: Path) -> Iterator[Pair]:
    """Every pair of a folder of long forms. The folder's name is the part, if it is one."""
    for path in sorted(folder.glob("*.json")):
        yield replace(of_json(json.loads(path.read_text())), part=folder.name if folder.name in PARTS else "given")


# The packed form: every listing and every op once, and positions instead of keys.


def packed(pairs: list[Pair]) -> bytes:
    """All pairs in one gzip file, the same bytes for the same pairs."""
    listings: dict[tuple[Entry, ...], int] = {}
    ops: dict[str, int] = {}
    rows = []
    for pair in pairs:
        source, target = ({entry.key: at for at, entry in enumerate(side)} for side in (pair.source, pair.target))
        row: dict[str, Any] = {
            "name": pair.name,
            "family": pair.family,
            "part": pair.part,
            "provenance": pair.provenance,
        }
        row["source"], row["target"] = (
            listings.setdefault(tuple(side), len(listings)) for side in (pair.source, pair.target)
        )
        # A target's sources by their distance from it: the same number for a whole run of keys.
        row["mapping"] = [
            [
                at,
                ops.setdefault(pair.mapping[entry.key].op, len(ops)),
                *(source[key] - at for key in pair.mapping[entry.key].sources),
            ]
            for at, entry in enumerate(pair.target)
            if entry.key in pair.mapping
        ]
        row["source_ties"] = [[source[key] for key in group] for group in pair.source_ties]
        row["target_ties"] = [[target[key] for key in group] for group in pair.target_ties]
        row["doubtful"] = sorted(target[key] for key in pair.doubtful)
        row["mismatched"] = [[target[one], source[other]] for one, other in pair.mismatched]
        rows.append(row)
    kinds: dict[tuple[tuple[int, ...], str], int] = {}
    sides = []
    for side in listings:
        # A key is as many segments of the key before it, and the rest.
        before: list[str] = []
        keys: list[Any] = []
        for entry in side:
            segments = entry.key.split(".")
            alike = next(
                at for at, one in enumerate(segments) if segments[at:] == [one] or before[at : at + 1] != [one]
            )
            keys += [alike, ".".join(segments[alike:])]
            before = segments
        sides.append([keys, [kinds.setdefault((entry.shape, entry.dtype), len(kinds)) for entry in side]])
    text = json.dumps({"ops": list(ops), "kinds": list(kinds), "listings": sides, "pairs": rows}, separators=(",", ":"))
    return gzip.compress(text.encode(), 9, mtime=0)


def unpacked(data: bytes) -> list[Pair]:
    """The pairs of the packed form."""
    given = json.loads(gzip.decompress(data))
    kinds = [(tuple(shape), dtype) for shape, dtype in given["kinds"]]
    sides: list[list[Entry]] = []
    for keys, numbers in given["listings"]:
        entries: list[Entry] = []
        segments: list[str] = []
        for alike, rest, number in zip(keys[::2], keys[1::2], numbers, strict=True):
            segments = [*segments[:alike], *rest.split(".")]
            entries.append(Entry(".".join(segments), *kinds[number]))
        sides.append(entries)
    pairs = []
    for row in given["pairs"]:
        source, target = sides[row["source"]], sides[row["target"]]
        mapping = {
            target[at].key: Made(tuple(source[at + step].key for step in steps), given["ops"][op])
            for at, op, *steps in row["mapping"]
        }
        pairs.append(
            Pair(
                row["name"],
                row["family"],
                list(source),
                list(target),
                mapping,
                [[source[at].key for at in group] for group in row["source_ties"]],
                [[target[at].key for at in group] for group in row["target_ties"]],
                frozenset(target[at].key for at in row["doubtful"]),
                [(target[one].key, source[other].key) for one, other in row["mismatched"]],
                row["provenance"],
                row["part"],
            )
        )
    return pairs


def committed() -> list[Pair]:
    """The pairs of the benchmark."""
    return unpacked(PACKED.read_bytes())


if __name__ == "__main__":  # python -m bench.remap.pairs FOLDER ...: packs folders of long forms
    import sys

    everything = [pair for folder in sys.argv[1:] for pair in of_folder(Path(folder))]
    PACKED.write_bytes(packed(everything))
    print(f"{len(everything)} pairs, {PACKED.stat().st_size:,} bytes")
