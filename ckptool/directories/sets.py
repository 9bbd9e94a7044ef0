"""Which set of weights a directory holds, by the names that Hugging Face's loaders look for (see `names`). Sources:

- transformers 5.24, ``modeling_utils._get_resolved_checkpoint_files``: whole file, index, then both as .bin; before all
  what ``transformers_weights`` of config.json names. ``integrations.peft.maybe_load_adapters``: the adapter.
- diffusers 0.42, ``models.modeling_utils.from_pretrained``: index, whole file, whole .bin; an index of .bin on request.
- peft 0.21, ``utils.save_and_load.load_peft_weights``: whole file, then .bin; no index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from ckptool.directories.names import (
    CONSOLIDATED,
    INDEX,
    LOADERS,
    MERGED,
    METADATA,
    SHARD,
    SHARDED,
    WEIGHTS,
    Distributed,
    Names,
    Set,
    parse,
    sets_in,
)  # fmt: skip
from ckptool.errors import FormatError, IncompleteError, UnreadableError, UnsupportedError, listed
from ckptool.io import paths
from ckptool.io.files import exists, is_directory, is_file, names_in, opened, size_of
from ckptool.io.leftovers import held, leftovers
from ckptool.io.paths import basename, dirname, join, split
from ckptool.io.source import Source
from ckptool.limits import MAX_INDEX

STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states|custom_checkpoint|dl_state_dict|"
    r"zero_pp_rank_).*(\.(safetensors|bin|pth?|ckpt|pkl)|_\d+)"
)
"""Names of a trainer's files, and directories (``optimizer_0``), beside the weights."""

INSIDE = {
    r"pytorch_model_fsdp_\d+": "accelerate",
    r"iter_\d{7,9}|release": "Megatron-LM",
    r"checkpoint-\d+": "transformers' Trainer",
    "sharded": "torch's HuggingFaceStorageReader",
    "weights": "NeMo",
}
"""Patterns of the names of directories in another one that hold its weights, and who looks for them."""

_INSIDE = re.compile("|".join(f"({mark})" for mark in INSIDE))

DISTRIBUTED = re.compile(r"(__\d{1,9})?\.metadata|.*\.distcp|shard-\d+-model-\d+-of-\d+\.safetensors", re.DOTALL)
"""Names of files of distributed checkpoints."""

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron-LM's file with the number of the iteration that is read, or ``release``."""


def shards_of(path: str) -> set[str]:
    """Returns the files that the index at a path names. Raises: FormatError, LimitError, UnreadableError."""
    with opened(path) as file:
        return set(weight_map_of(index_of(file)).values())


def weight_map_of(index: dict[str, Any]) -> dict[str, str]:
    """Returns {tensor: shard}; accelerate's index is this map itself."""
    weight_map: dict[str, str] = index.get("weight_map", index)
    return weight_map


def index_of(file: Source) -> dict[str, Any]:
    """Returns the content of an index. Raises: FormatError, LimitError."""
    if file.size > MAX_INDEX.now():
        raise MAX_INDEX.passed(f"an index of {file.size:,} bytes", file.size, file.path)
    try:
        index = json.loads(file.read(0, file.size))
    except RecursionError as error:
        raise FormatError("an index that is nested too deep", file.path) from error
    except ValueError as error:
        raise FormatError(f"an index that is no JSON: {error}", file.path) from error
    weight_map = weight_map_of(index) if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError("an index without a weight_map of tensor to file", file.path)
    if not isinstance(index.get("metadata") or {}, dict):
        raise FormatError("an index whose metadata is no object", file.path)
    for shard in sorted(set(weight_map.values())):
        if basename(shard) != shard or shard in ("", ".", "..") or "\0" in shard or "\\" in shard:
            raise FormatError(f"its index names a file outside its directory: {shard!r}", file.path)
        if INDEX.fullmatch(shard) or is_directory(join(dirname(file.path), shard)):
            raise FormatError(f"its index names something that is no shard: {shard!r}", file.path)
    return dict(index)


SMALL = re.compile(r"(?!\.).*\.(json|jsonl|txt|model|jinja|tiktoken|py|md|ya?ml)|LICENSE.*|NOTICE.*", re.DOTALL)
"""Names of what lies beside weights and belongs to the model: its configuration, its tokenizer, its code and card."""

SMALL_BYTES = 100_000_000
"""Larger files are not copied: the largest tokenizer.json have some 35 MB."""


def small_files(directory: str) -> list[str]:
    """Returns the names of the small files in a directory that are no weights and not a trainer's."""
    found = []
    for name in names_in(directory):
        if (
            SMALL.fullmatch(name)
            and not INDEX.fullmatch(name)
            and name not in ("trainer_state.json", "zero_to_fp32.py")
        ):
            path = join(directory, name)
            if is_file(path) and size_of(path) <= SMALL_BYTES:
                found.append(name)
    return sorted(found)


LAYOUTS = {
    r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin": "parts of an FSDP model (LOCAL_STATE_DICT, or sharded without DCP)",
}
"""Patterns of file names in other tools' directories, which often hold weights too; the first match decides."""


def layout(names: Sequence[str]) -> str | None:
    """Returns which other tool's directory has these names; None if none that is known."""
    kinds = (kind for mark, kind in LAYOUTS.items() if any(re.fullmatch(mark, name, re.DOTALL) for name in names))
    return next(kinds, None)


class Choice(NamedTuple):
    """What is read of a directory: ``name``, a file or directory in it, which ``loader`` would take ("" if unknown)."""

    name: str
    loader: str = ""


def choose(directory: str, names: Sequence[str]) -> Choice | None:
    """Returns what to read of a directory, as the loader does that it was written for; None if there are no weights.

    Raises: UnsupportedError if no rule decides among several, or another tool wrote the directory; IncompleteError for
    a lone shard, and for a link to nowhere that would be taken.
    """
    _refuse_unfinished(directory, names)
    dangling, config = _dangling(directory, _weights(names)), _json(directory, "config.json")
    known = [found for found in sets_in(names) if found.name in dangling or _is_file(directory, found.name)]
    there = [found for found in known if found.name not in dangling]
    if isinstance(named := config.get("transformers_weights"), str):
        if named not in names or named in dangling:
            raise IncompleteError(f"config.json says that the weights are in {named!r}, which is not there", directory)
        return Choice(named, "transformers")
    if first := _first(directory, known, config):
        if first.name in dangling:
            links = listed([first.name, *(name for name in dangling if name != first.name)])
            what = f"links to nowhere: {links}; {first.loader} takes {first.name} first"
            raise IncompleteError(f"{what}: fetch it, or name the file to read", directory)
        if not first.is_index:  # it may be a shard itself, beside one that was added to it
            indexes = (found for found in sorted(there, key=lambda found: found.rank) if found.is_index)
            for index in indexes:
                shards = shards_of(join(directory, index.name))
                if first.name in shards and len(shards) > 1:
                    return Choice(index.name, index.loader)
        return Choice(first.name, first.loader)
    if choice := _inside(directory, names):
        return choice
    if other := layout(names):
        raise UnsupportedError(f"{other}, which is not supported yet", directory)
    _refuse_backend(directory, names)
    if len({(found.stem, found.variant) for found in there}) > 1:
        raise UnsupportedError(f"holds {listed(sorted(found.name for found in there))}: name one of them", directory)
    if there:  # a stem that no loader is known for
        return Choice(min(there, key=lambda found: found.rank).name)
    if known:
        raise IncompleteError(f"links to nowhere: {listed(dangling)}", directory)
    if parts := components(directory, names):
        return Choice(parts[0])
    return _loose(directory, [name for name in names if name.endswith(WEIGHTS)])


def _inside(directory: str, names: Sequence[str]) -> Choice | None:
    """Returns the directory in it that holds the weights; None if there is none. Raises: as `choose`.

    No iteration is looked for in one, and no `checkpoint-N` in either: that could go on for a thousand levels.
    """
    there = inside(directory, names)
    within = _looked_for_by(basename(paths.absolute(directory)))
    if TRACKER in names and within != "Megatron-LM":
        with opened(join(directory, TRACKER)) as file:
            said = file.read(0, min(file.size, 32)).decode("utf-8", "replace").strip()
        name = f"iter_{int(said):07d}" if said.isascii() and said.isdecimal() else said
        if name not in there:
            what = f"{TRACKER} of Megatron-LM says {said!r}: there is no {name!r}"
            raise IncompleteError(f"{what}, but {listed(there)}: name one" if there else what, directory)
        return Choice(name, "Megatron-LM")
    if any(name.endswith(WEIGHTS) and not STATE.fullmatch(name) for name in names):
        return None
    saves = [name for name in there if name.startswith("checkpoint-")]
    if saves and within not in ("Megatron-LM", "transformers' Trainer"):
        last = max(saves, key=lambda name: int(name.partition("-")[2]))
        return Choice(last, there[last])
    held = [name for name in there if any(map(DISTRIBUTED.fullmatch, names_in(join(directory, name))))]
    if len(held) > 1:
        raise UnsupportedError(f"holds weights in several directories: name one of {listed(held)}", directory)
    return Choice(held[0], there[held[0]]) if held else None


def inside(directory: str, names: Iterable[str]) -> dict[str, str]:
    """Returns {directory in it whose name says that weights are in it: whose layout that is}."""
    found = {name: loader for name in names if (loader := _looked_for_by(name))}
    return {name: loader for name, loader in found.items() if is_directory(join(directory, name))}


def _looked_for_by(name: str) -> str:
    """Returns who looks for weights in a directory of that name; "" for any other."""
    mark = _INSIDE.fullmatch(name)
    return list(INSIDE.values())[mark.lastindex - 1] if mark and mark.lastindex else ""


def _refuse_backend(directory: str, names: Sequence[str]) -> None:
    """Raises for a checkpoint of Megatron-core that is in no files of torch, as it says, or whose files are missing."""
    backend = _json(directory, "metadata.json").get("sharded_backend")
    if isinstance(backend, str) and backend != "torch_dist":
        how = "load it with Megatron-LM of its time, and save it with --ckpt-format torch_dist"
        raise UnsupportedError(f"a Megatron-core checkpoint with the {backend!r} backend: {how}", directory)
    if backend or [name for name in names if name.endswith(WEIGHTS)] == ["common.pt"]:
        what = "a Megatron-core checkpoint without .metadata and .distcp files: was its save cut off?"
        raise IncompleteError(f"{what} Name common.pt to see what that holds", directory)


def _is_file(directory: str, name: str) -> bool:
    return is_file(join(directory, name))


def _dangling(directory: str, names: Iterable[str]) -> list[str]:
    """Returns those of a directory's names that are links to nowhere."""
    return [name for name in names if not exists(join(directory, name))]


def _weights(names: Iterable[str]) -> list[str]:
    """Returns the names of sets and of files of weights, without those of a trainer's state."""
    return [name for name in names if parse(name) or (name.endswith(WEIGHTS) and not STATE.fullmatch(name))]


CONFIGS = {
    "_diffusers_version": "diffusers", "_class_name": "diffusers", "model_type": "transformers",
    "architectures": "transformers", "transformers_version": "transformers",
}  # fmt: skip
"""The library that writes a field into its config.json; the first one that is there decides."""


def _first(directory: str, there: list[Set], config: Mapping[str, Any]) -> Set | None:
    """Returns the set that a known loader takes. Raises: UnsupportedError if it takes none of several."""
    known = sorted((found for found in there if found.loader), key=lambda found: found.rank)
    if not known:
        return None
    plain = [found for found in known if not found.variant] or known
    if len({found.variant for found in plain}) > 1:
        raise UnsupportedError(f"holds variants only: name one of {listed(found.name for found in plain)}", directory)
    loaders = [loader for loader in dict.fromkeys(LOADERS.values()) if any(found.loader == loader for found in plain)]
    if loaders[:2] == ["transformers", "diffusers"]:
        if (mark := next((mark for mark in CONFIGS if mark in config), None)) is None:
            names = listed(found.name for found in plain)
            raise UnsupportedError(f"holds {names}, and no config.json says whose: name one of them", directory)
        loaders = [CONFIGS[mark]]
    return next(found for found in plain if found.loader == loaders[0])


def _json(directory: str, name: str) -> dict[str, Any]:
    """Returns the object in a small JSON file of a directory; an empty one if there is none that can be read."""
    try:
        if not _is_file(directory, name):
            return {}
        with opened(join(directory, name)) as file:
            found = json.loads(file.read(0, min(file.size, 1 << 20)))
    except (UnreadableError, ValueError, RecursionError):  # it decides nothing then
        return {}
    return found if isinstance(found, dict) else {}


def components(directory: str, names: Sequence[str]) -> list[str]:
    """Returns the directories of a diffusers pipeline that hold weights; none if it is no pipeline."""
    if "model_index.json" not in names:
        return []
    inner = {name: names_in(path) for name in names if is_directory(path := join(directory, name))}
    return [
        name
        for name, there in inner.items()
        if "model_index.json" not in there  # another pipeline: they could be a thousand levels deep
        and any(INDEX.fullmatch(file) or file.endswith((".safetensors", ".bin")) for file in there)
    ]


def _loose(directory: str, files: list[str]) -> Choice | None:
    """Returns the only file of weights, of a name that no loader looks for. Raises: as `choose`."""
    files = [name for name in files if not STATE.fullmatch(name)] or files
    if not files:
        return None
    shards = [found for name in files if (found := SHARD.fullmatch(name))]
    one_set = len(shards) == len(files) and len({(found[1], int(found[3]), found[4]) for found in shards}) == 1
    if one_set:
        numbers, total = {int(found[2]) for found in shards}, int(shards[0][3])
        absent = list(islice((number for number in range(1, total + 1) if number not in numbers), 6))
        if absent:
            what = f"holds {listed(files)} of {total} shards and no index: number {listed(absent, 5)} is missing"
            raise IncompleteError(what, directory)
    if (links := _dangling(directory, files)) and (one_set or len(files) == 1):
        raise IncompleteError(f"links to nowhere: {listed(links)}", directory)
    if len(files) > 1:
        raise UnsupportedError(
            f"{len(files)} files of weights and no index: name one of {listed(files)}; "
            "`filter A B ... -o OUT` joins several",
            directory,
        )
    return Choice(files[0])


def _refuse_unfinished(directory: str, names: Sequence[str]) -> None:
    """Raises FormatError if shards were renamed but their index not yet: old and new shards may be mixed."""
    left: dict[Names, dict[str, list[str]]] = {}
    for kind in ("old", "partial"):
        for name in leftovers(names, kind):
            meant = name.removeprefix(".").rsplit(".", 2)[0]
            own = Names.of(meant)
            if meant == own.index or (kind == "old" and own.gives(meant)):
                left.setdefault(own, {"old": [], "partial": []})[kind].append(name)
    for own, files in left.items():
        aside, begun = files["old"], files["partial"]
        if own.index in names or own.whole in names:
            continue
        named = any(own.gives(name) for name in names)
        if any(held(join(directory, name)) for name in begun):
            if aside or named:
                raise FormatError("another run is giving its files their names; try again", directory)
        elif aside:
            raise FormatError(
                f"a run that was replacing its files was killed; rename what was there back to its names "
                f"({listed(aside, 3)}), or write there again with --force",
                directory,
            )
        elif begun and named:
            raise FormatError("a run that was writing its files was killed; write there again", directory)


def beside(directory: str, names: Sequence[str], choice: Choice, used: Collection[str]) -> list[str]:
    """Returns notes: which weights lie in the directory too, where only the files ``used`` were read."""
    dangling = [name for name in _dangling(directory, _weights(names)) if name not in used]
    notes = [f"links to nowhere: {listed(dangling)}"] if dangling else []
    rest = [
        *others(directory, names, {*used, *dangling}),
        *(name for name in inside(directory, names) if name not in used),
    ]
    if rest or is_directory(join(directory, choice.name)):
        rule = f", as {choice.loader} does" if choice.loader else ""
        notes.append(f"{choice.name} was read{rule}" + f"; also here, and not read: {listed(rest)}" * bool(rest))
    notes += trainers_state(names, used)
    if ".metadata" in names:
        notes.append("also here: a torch.distributed checkpoint (DCP); name its .metadata to read it")
    if any(name.startswith("mp_rank_") for name in names):
        notes.append("also here: ranks of Megatron-LM or DeepSpeed; name the file of one to read it")
    if other := layout(names):
        notes.append(f"also here: {other}, which is not supported yet")
    return notes


def trainers_state(names: Iterable[str], used: Collection[str]) -> list[str]:
    """Returns a note on the files of a trainer in a directory."""
    state = [name for name in names if STATE.fullmatch(name) and name not in used]
    return [f"a trainer's state, not read with the weights: {listed(state)}"] if state else []


def others(directory: str, names: Sequence[str], used: Collection[str]) -> list[str]:
    """Returns the names of weights in a directory beside the files ``used``; shards of one set are one pattern.

    Shards of an index that is named too are left out; those of a set that is ``used`` in part have their own names.
    """
    rest = [name for name in _weights(names) if name not in used and not is_directory(join(directory, name))]
    covered = {base for found in sets_in(rest) if found.is_index for base in (found.stem, Names(*found[1:3]).base)}
    in_part = {_pattern(name) for name in used}
    rest = [name for name in rest if not ((shard := SHARD.fullmatch(name)) and shard[1] in covered)]
    return list(dict.fromkeys(name if _pattern(name) in in_part else _pattern(name) for name in rest))


def rivals(names: Names | Distributed, there: Collection[str]) -> list[str]:
    """Returns those of a directory's files that a loader would take instead of a set of these names, or no longer find.

    transformers takes the adapter alone where its config lies and none of a model. Of a distributed checkpoint and a
    set beside it ckptool reads one.
    """
    if isinstance(names, Distributed):
        known = [found.name for found in sets_in(there) if found.loader]
        return [*known, *(name for name in there if SHARDED.fullmatch(name) or name in MERGED)]
    known = [found.name for found in sets_in(there) if found.competes(names)]
    if names.stem == "consolidated":
        known += [name for name in there if name.endswith(WEIGHTS) and CONSOLIDATED.match(name)]
    if names.loader == "transformers" and "adapter_config.json" in there and "config.json" not in there:
        known.append("adapter_config.json without a config.json")
    known += [name for name in there if METADATA.fullmatch(name) or SHARDED.fullmatch(name)]
    return [name for name in known if not names.gives(name)]


def beside_file(path: str) -> list[str]:
    """Returns a note on the sets beside a file of weights of which its loader takes one only."""
    directory, name = split(path)
    own = parse(name)
    if own is None or not own.loader:
        return []
    names = names_in(directory or ".")
    there = [found for found in sets_in(names) if found.name != name]
    same = [found for found in there if found.loader == own.loader and found.variant == own.variant]
    first = min([own, *same], key=lambda found: found.rank)
    notes = [f"beside {listed(found.name for found in same)}: {own.loader} reads {first.name} only"] if same else []
    if parts := sorted(filter(METADATA.fullmatch, names)):
        notes.append(
            f"beside a distributed checkpoint: of the directory, {first.name} is read; name {parts[0]} for that"
        )
    return notes


def _pattern(name: str) -> str:
    """Returns ``model-*-of-00002.safetensors`` for a shard, and another name as it is."""
    shard = SHARD.fullmatch(name)
    return f"{shard[1]}-*-of-{shard[3]}{shard[4]}" if shard else name
