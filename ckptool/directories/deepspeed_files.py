"""The files of DeepSpeed's checkpoints: which directory is meant, and what each file in it is, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tree import as_mapping, brief
from ckptool.directories import sets
from ckptool.errors import FormatError, IncompleteError, UnsupportedError, listed
from ckptool.io.files import is_directory, is_file, names_in, opened
from ckptool.io.paths import join

STATES = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_(model|optim)_states\.pt")
LAYER = re.compile(r"layer_(\d{1,6})-(?:(.*)-)?model_states\.pt")
EXPERT = re.compile(r"(?:layer_(\d{1,6})_)?expert_(\d{1,6})_mp_rank_(\d{1,6})_model_states\.pt")
TAG = re.compile(r"global_step\d+(_universal)?")
LATEST = ("latest", "latest_universal")

Open = Callable[[str], Checkpoint]


def beside(directory: str, names: Sequence[str]) -> list[str]:
    """Returns a note if a directory of other weights has a checkpoint of DeepSpeed too."""
    found = tags_in(directory, names)
    if not found and not is_tag(directory, names) and not latest_in(directory, names):
        return []
    return [f"also here: a DeepSpeed checkpoint{f' (to read it, name {listed(found)})' if found else ''}"]


def is_tag(directory: str, names: Collection[str]) -> bool:
    """Returns whether a directory has the files of one save."""
    if any(STATES.fullmatch(name) or LAYER.fullmatch(name) or EXPERT.fullmatch(name) for name in names):
        return True
    zero = join(directory, "zero")
    return "zero" in names and any(is_file(join(zero, name, "fp32.pt")) for name in names_in(zero))


def tags_in(directory: str, names: Iterable[str]) -> list[str]:
    """Returns the names of the directories in one that are a save each, of those that DeepSpeed itself gives names."""
    found = sorted((name for name in names if TAG.fullmatch(name)), key=lambda name: (len(name), name))
    return [name for name in found if is_tag(path := join(directory, name), names_in(path))]


def latest_in(directory: str, names: Collection[str]) -> str:
    """Returns the name of the file that names a tag, or of a directory of that name which is one; "" without."""
    for name in LATEST:
        if name in names:
            path = join(directory, name)
            if is_file(path) or is_tag(path, names_in(path)):
                return name
    return ""


def choose(directory: str, names: Sequence[str]) -> tuple[str, list[str]]:
    """Returns (directory of one save, notes on the choice). Raises: IncompleteError, UnsupportedError, FormatError."""
    if is_tag(directory, names):
        return directory, []
    tags, latest = tags_in(directory, names), latest_in(directory, names)
    if not latest:
        if len(tags) > 1:
            what = f"holds several DeepSpeed checkpoints and no file latest: name one of {listed(tags)}"
            raise UnsupportedError(what, directory)
        return join(directory, tags[0]), [f"there is no file latest: {tags[0]} was read"]
    path = join(directory, latest)
    if is_directory(path):
        return path, []
    with opened(path) as file:
        tag = file.read(0, min(file.size, 1000)).decode("utf-8", "replace").strip()
    if tag in ("", ".", "..") or any(odd in tag for odd in "/\0\\") or len(tag.encode()) > 255:
        raise FormatError(f"its file {latest} names no directory of a DeepSpeed checkpoint: {brief(tag)}", directory)
    others, named = [name for name in tags if name != tag], join(directory, tag)
    if is_file(named):
        raise UnsupportedError(f"its file {latest} names a file, not a DeepSpeed checkpoint: name {tag}", directory)
    if not is_tag(named, names_in(named)):
        there = f"; there is {listed(others)}" if others else ""
        what = f"its file {latest} names {brief(tag)}, and no DeepSpeed checkpoint is there{there}"
        raise IncompleteError(what, directory)
    notes = [f"its file {latest} names {tag}; also here, and not read: {listed(others)}"] if others else []
    return named, notes


class Saved:
    """The files of one save, and what of them was read: ``nbytes``, ``pickled`` (names in pickles), ``used``.

    ``models`` and ``optims``: {(model-parallel rank, process, or -1 where the name has none): name}. ``layers``:
    {number: name}. ``experts``: {(layer, or -1; expert): name}. ``parallel``: files of
    other tensor-parallel ranks.
    """

    def __init__(self, directory: str, open_: Open) -> None:
        self.directory, self.open_ = directory, open_
        self.names = sorted(names_in(directory), key=lambda name: (len(name), name))
        self.models: dict[tuple[int, int], str] = {}
        self.optims: dict[tuple[int, int], str] = {}
        self.layers: dict[int, str] = {}
        self.experts: dict[tuple[int, int], str] = {}
        self.parallel: list[str] = []
        self.nbytes = 0
        self.pickled: dict[tuple[str, str], None] = {}
        self.used: set[str] = set()
        for name in self.names:
            if found := STATES.fullmatch(name):
                rank = int(found[2]), int(found[1] or -1)
                self._add(self.models if found[3] == "model" else self.optims, rank, name)
            elif found := LAYER.fullmatch(name):
                if found[2] in (None, "model_00"):
                    self._add(self.layers, int(found[1]), name)
                else:
                    self.parallel.append(name)
            elif found := EXPERT.fullmatch(name):
                if int(found[3]):
                    self.parallel.append(name)
                else:
                    self._add(self.experts, (int(found[1] or -1), int(found[2])), name)

    def _add(self, files: dict[Any, str], key: Any, name: str) -> None:
        if key in files:
            what = f"{files[key]} and {name} are of one process: left of another save? move the older one away"
            raise FormatError(what, self.directory)
        files[key] = name

    def tree(self, name: str) -> Any:
        """Returns what torch.save wrote into a file, and counts it. Raises: CkptoolError with its path."""
        path = join(self.directory, name)
        if not is_file(path):
            what = "is a directory" if is_directory(path) else "is a link to nowhere"
            raise IncompleteError(f"{what}: expected a file of DeepSpeed's", path)
        opened = self.open_(path)
        self.nbytes += opened.nbytes
        self.pickled.update(dict.fromkeys(opened.names))
        self.used.add(name)
        return opened.tree

    def mapping(self, name: str) -> dict[Any, Any]:
        """Returns the dict in a file. Raises: FormatError for anything else."""
        if (found := as_mapping(self.tree(name))) is None:
            raise FormatError("holds no dict, as DeepSpeed's files do", join(self.directory, name))
        return found

    def beside(self) -> list[str]:
        """Returns a note on the weights and states that were not read."""
        rest = sets.others(self.directory, self.names, self.used)
        return [f"also here, and not read: {listed(rest)}"] if rest else []

    def processes(self, files: Mapping[tuple[int, int], str], mp: int, count: int) -> list[str]:
        """Returns the names of the files of the processes 0 to ``count`` - 1 of a model-parallel rank.

        Raises: IncompleteError, FormatError.
        """
        there = {rank: name for (other, rank), name in files.items() if other == mp and rank >= 0}
        like = next(iter(there.values()))
        absent = islice((rank for rank in range(count) if rank not in there), 9)
        if gone := [re.sub(r"(?<=_pp_rank_)\d+", str(rank), like) for rank in absent]:
            what = f"of {count} processes, {len(there)} have a file here; missing: {listed(gone)}"
            raise IncompleteError(what, self.directory)
        if more := [name for rank, name in sorted(there.items()) if rank >= count]:
            what = f"{count} processes wrote it, and there are files of others: {listed(more)}: left of another save?"
            raise FormatError(what, self.directory)
        return [there[rank] for rank in range(count)]
