"""Writes a pair in the long form."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from .tracing import State, coded, read_off, ties

OUT = Path(os.environ.get("REMAP_OUT", "."))
Convert = Callable[[dict[str, torch.Tensor]], State]


def _rows(state: State) -> list[dict[str, object]]:
    return [{"key": k, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for k, t in state.items()]


def write(name: str, family: str, half: str, source: State, target: State, convert: Convert, provenance: str) -> None:
    """Traces the conversion and writes the pair. A target whose origin no op describes is not scored."""
    codes = coded(source)
    converted = convert(dict(codes))
    found, _, strange = read_off(codes, {key: converted[key] for key in target if key in converted})
    shapes = {key: tuple(target[key].shape) for key in found}
    fits = {key: made for key, made in found.items() if tuple(converted[key].shape) == shapes[key]}
    used = {key for made in fits.values() for key in made[0]}
    for group in ties(source):
        if used.intersection(group):
            used.update(group)
    ops: dict[str, int] = {}
    for _, op in fits.values():
        ops[op] = ops.get(op, 0) + 1
    pair = {
        "name": name,
        "family": family,
        "source": _rows(source),
        "target": _rows(target),
        "mapping": [{"target": key, "source": list(made[0]), "op": made[1]} for key, made in fits.items()],
        "unmatched_source": [key for key in source if key not in used],
        "unmatched_target": [key for key in target if key not in fits],
        "shape_mismatch": [{"target": key, "source": list(made[0])} for key, made in found.items() if key not in fits],
        "source_ties": ties(source),
        "target_ties": ties(target),
        "doubtful": strange,
        "provenance": provenance,
        "notes": "",
    }
    path = OUT / half / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(pair))
    path.with_suffix(".part").rename(path)
    extra = [key for key in converted if key not in target]
    common = dict(sorted(ops.items(), key=lambda one: -one[1])[:5])
    print(
        f"{half} {name}: {len(source)} -> {len(target)}, {len(fits)} mapped, {common}; no partner: {len(pair['unmatched_source'])} "
        f"{pair['unmatched_source'][:2]} / {len(pair['unmatched_target'])} {pair['unmatched_target'][:2]}; other shape "
        f"{len(pair['shape_mismatch'])}; strange {len(strange)} {strange[:2]}; not in the target {len(extra)} {extra[:2]}",
        flush=True,
    )
