"""The items of a distributed checkpoint: each is read lazily, and put where it was in the tree that was flattened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Box, Opaque, TensorInfo, chunks
from ckptool.core.tree import brief, walk
from ckptool.directories.dcp_metadata import Part, Saved
from ckptool.errors import CkptoolError, FormatError, IncompleteError, listed
from ckptool.formats.safetensors_file import sharding
from ckptool.io.files import Files, ahead, exists, names_in
from ckptool.io.paths import join
from ckptool.io.probe import Probe
from ckptool.io.source import SMALL_MEMBER, Section
from ckptool.io.zip_read import TAIL
from ckptool.limits import MAX_LEVELS, MAX_PICKLE
from ckptool.pickling.archives import Single, is_saved, unpickled
from ckptool.pickling.load import with_arrays

GAPS = 1000
"""List positions that may be empty: a list of torch has None where an element held nothing to save."""


class Items:
    """Reads items. ``used``: the files that have some of them. ``names``: what their pickles name."""

    def __init__(
        self, directory: str, saved: Saved, open_: Callable[..., Checkpoint], staged: Mapping[str, str]
    ) -> None:
        self.open_ = open_
        self.directory = directory
        self.staged = staged
        self.saved = saved
        self.files = Files()
        self.names: dict[tuple[str, str], None] = {}
        self.used: dict[str, None] = {}
        self.blobs: dict[tuple[str, int], Checkpoint] = {}
        self.single: Single = {}
        self.left = set(saved.items)
        self.raw: list[str] = []
        self.whole: list[str] = []
        there = {*names_in(directory), *staged}
        ahead(join(directory, name) for name in sorted(saved.files) if name not in staged)
        for item in saved.items.values():  # its first bytes, and its last, where a zip's directory is
            begin, end = item.offset, item.offset + item.nbytes
            self.files.will_read(join(directory, item.file), begin, min(begin + SMALL_MEMBER // 8, end))
            self.files.will_read(join(directory, item.file), max(begin, end - TAIL - 22), end)
        gone: dict[str, list[str]] = {}
        for (key, _), item in saved.items.items():
            if item.file not in there and not exists(join(directory, item.file)):
                gone.setdefault(item.file, []).append(key)
        if gone:
            what = "; ".join(f"{name}, which has {listed(dict.fromkeys(keys), 4)}" for name, keys in gone.items())
            raise IncompleteError(f"a file is missing: {what}", directory)

    def value(self, key: str) -> Any:
        """Returns the tensor or the Python value of that key."""
        entry = self.saved.entries[key]
        if entry.dtype is None:
            found = self._read(key, None)
            if self.saved.flat and any(isinstance(node, TensorInfo) for _, node in walk(found)):
                self.whole.append(key)
            return found
        boxes: list[Box] = [(*part, self._tensor(key, part)) for part in entry.parts]
        if len(boxes) == 1 and boxes[0][1] == entry.shape and not any(boxes[0][0]):
            tensor = boxes[0][2]
            if tensor.dtype == entry.dtype and (tensor.shape == entry.shape or isinstance(tensor.source, Opaque)):
                return tensor
        try:
            return chunks(entry.dtype, entry.shape, boxes)
        except FormatError as error:
            raise IncompleteError(f"{key}: {error.message}", self.directory) from error

    def _tensor(self, key: str, part: Part) -> TensorInfo:
        found = self._read(key, part.offsets)
        if not isinstance(found, TensorInfo):
            raise FormatError(f"{key}: the item at {brief(part.offsets)} is no tensor: {brief(found)}", self.directory)
        return found

    def _read(self, key: str, offset: tuple[int, ...] | None) -> Any:
        item = self.saved.items.get((key, offset))
        if item is None:
            where = "" if offset is None else f" the part at {brief(offset)} of"
            raise IncompleteError(f"the metadata say of no file that it has{where} {key}", self.directory)
        self.left.discard((key, offset))
        path = self.staged.get(item.file) or join(self.directory, item.file)
        self.used[path] = None
        file = self.files.open(path)
        if item.offset + item.nbytes > file.size:
            end = item.offset + item.nbytes
            raise IncompleteError(f"{key}: ends at byte {end} of a file of {file.size}: a truncated download?", path)
        try:
            if file.read(item.offset, min(2, item.nbytes)) == b"PK":
                return self._saved_by_torch(path, Section(file, item.offset, item.nbytes))
            if self.saved.entries[key].dtype is not None:
                return self._in_safetensors(key, offset, path, item.offset)
            if item.nbytes > MAX_PICKLE.now():
                raise MAX_PICKLE.passed("is too long", item.nbytes)
            self.raw.append(key)
            return file.read(item.offset, item.nbytes)
        except CkptoolError as error:
            error.message = f"{key}, at byte {item.offset}: {error.message}"
            error.path = error.path or path
            raise

    def _saved_by_torch(self, path: str, section: Section) -> Any:
        with Probe(path, lambda _: section) as probe:
            if not is_saved(probe):
                other = self.open_(path, lambda _: section).format
                raise FormatError(f"is a file of {other}, which torch.save did not write")
            tree, names = unpickled(probe, single=self.single)
        self.names.update(dict.fromkeys(names))
        return with_arrays(tree, names, section.span(0, 0))

    def _in_safetensors(self, key: str, offset: tuple[int, ...] | None, path: str, begin: int) -> TensorInfo:
        """Returns a tensor of the safetensors file that is the rest of a file: all its tensors have that offset.

        Of several parts of one tensor torch writes the last one only, so it must be the one that is looked for.
        """
        found = self.blobs.get((path, begin))
        if found is None:
            file = self.files.open(path)
            found = self.open_(path, lambda _: Section(file, begin, file.size - begin))
            if found.format != "safetensors":
                raise FormatError(f"is a file of {found.format}, neither a torch.save nor a safetensors file")
            self.blobs[path, begin] = found
        if key not in found.tree:
            raise IncompleteError(f"is a safetensors file of {listed(found.tree)}")
        if (held := (sharding(found.metadata) or {}).get(key)) != offset:
            raise IncompleteError(f"holds the part at {brief(held)}, not that at {brief(offset)}, which torch lost")
        tensor: TensorInfo = found.tree[key]
        return tensor

    def notes(self) -> Iterator[str]:
        """Yields what else is to be known of the items."""
        absent = [key for key in self.saved.paths if key not in self.saved.entries]
        for what, keys in {
            "saved whole by one process, not flattened (flatten_state_dict=False): what other processes held of "
            "sharded tensors is not in the checkpoint": self.whole,
            "saved by several processes, the first one's taken": self.saved.twice,
            "stored by Megatron-core in a shape that is not their own (mcore_data), and shown so": self.saved.reshaped,
            "no torch.save inside, kept as bytes": self.raw,
            "in planner_data only": absent,
            "items that belong to no key, not read": dict.fromkeys(key for key, _ in sorted(self.left, key=str)),
        }.items():
            if keys:
                yield f"{what}: {listed(keys)}"


# --- the tree --------------------------------------------------------------------------------------------------------


class _Branch(dict[Any, Any]):
    """A container that was flattened, unlike a dict that is a value."""


def nested(values: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> Any:
    """Returns the tree of which the values are leaves; without a path, the key is the only step."""
    top = _Branch()
    for key, value in values.items():
        *steps, last = paths.get(key, (key,))
        if len(steps) > MAX_LEVELS.now():
            raise MAX_LEVELS.passed(f"{brief(key)} is nested too deep", len(steps))
        node = top
        for step in steps:
            node = node.setdefault(step, _Branch())
            if type(node) is not _Branch:
                raise FormatError(f"{brief(key)} lies below another value: {brief(paths[key])}")
        if last in node:
            raise FormatError(f"two values have the path of {brief(key)}: {brief(paths.get(key))}")
        node[last] = value
    return _container(top)


def _container(branch: _Branch) -> Any:
    """Returns the dict or list that a branch stands for."""
    found = {step: _container(node) if type(node) is _Branch else node for step, node in branch.items()}
    if found and all(type(step) is int for step in found):
        size = max(found) + 1
        if min(found) < 0 or size > len(found) + GAPS:
            raise FormatError(f"a list has {len(found)} elements, one of them at {brief(max(found, key=abs))}")
        return [found.get(index) for index in range(size)]
    if "param_groups" in found and type(branch.get("state")) is _Branch and all(map(_is_number, branch["state"])):
        found["state"] = {int(step): value for step, value in found["state"].items()}
    return found


def _is_number(step: Any) -> bool:
    return type(step) is str and step.isascii() and step.isdecimal() and len(step) < 19 and str(int(step)) == step
