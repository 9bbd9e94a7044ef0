"""The library: what `import ckptool` offers. The one place where formats, operations and data meet."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ckptool import formats, modules, roots
from ckptool.checkpoint import Checkpoint, Derived, Storage, TensorInfo, detached
from ckptool.errors import CkptoolError, IncompleteError, OutputError, UsageError
from ckptool.files import EXISTS, Files, Output, same_file
from ckptool.ops.diff import DiffReport
from ckptool.ops.filter import FilterReport
from ckptool.ops.inspect import InspectReport
from ckptool.ops.inspect import inspect as op_inspect
from ckptool.tree import Path, children, ordered_dict, walk

MapLocation = str | Mapping[str, str] | Callable[[str], str] | None


def open(path: str | os.PathLike[str], root: str | Path | None = None) -> Checkpoint:
    """Returns the checkpoint at a path: a torch or safetensors file, a sharded directory or its index.

    Reads headers only; runs no code of the file and imports none of its classes. ``root`` names where the
    weights are (``"model_state_dict"``, steps separated by "/"); None means the usual places, see `find_root`.

    Raises: UnreadableError, FormatError, UnsupportedError; UsageError if there is nothing at ``root``.
    """
    url = os.fspath(path)
    opened = formats.read(url)
    try:
        if root is not None:
            return replace(opened, root=_path(opened.tree, root))
        return replace(opened, root=roots.find_root(opened.tree).path)
    except CkptoolError as error:
        error.path = error.path or url
        raise


def _path(tree: Any, root: str | Path) -> Path:
    """Returns the path that a user's ``a/0/b`` means: at every step the name itself, else the number it reads as."""
    if not isinstance(root, str):
        return tuple(root)
    path: Path = ()
    node = tree
    left = [] if root in ("", "/") else root.strip("/").split("/")
    while left:
        known = _named_children(node)
        for length in range(len(left), 0, -1):  # a key may hold a "/" itself
            name = "/".join(left[:length])
            if name in known:
                step, node = known[name]
                path = (*path, step)
                left = left[length:]
                break
        else:
            near = ", ".join(list(known)[:20])
            raise UsageError(
                f"no {left[0]!r} at {'/'.join(map(str, path)) or 'the top'}; there is: {near or 'nothing'}"
            )
    return path


def _named_children(node: Any) -> dict[str, tuple[Any, Any]]:

    return {str(step): (step, child) for step, child in children(node)}


def save(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    in_place: bool = False,
    map_location: MapLocation = None,
    fsync: bool = True,
) -> tuple[str, ...]:
    """Writes a checkpoint in the format that the suffix of ``path`` names; returns what was left out.

    Streams: memory does not grow with the file. The file appears whole or not at all. ``map_location`` maps
    device tags: a device for all, a dict, or a callable tag -> tag. ``in_place`` allows ``path`` to be an input.

    Raises: OutputError if it exists (without ``force``) or is an input, LossError for tensors the format
    cannot hold, IncompleteError if shards are missing, UsageError for an unknown suffix.
    """
    url = os.fspath(path)
    check_output(url, force=force, in_place=in_place, inputs=[checkpoint])
    writer = formats.writer(url)
    refuse_broken(checkpoint)
    try:
        with Files() as files, Output(url, force=force or in_place, fsync=fsync) as output:
            left_out: tuple[str, ...] = writer.write(checkpoint, output, files, _tag_map(map_location))
            output.commit()
    except CkptoolError as error:
        error.path = error.path or url
        raise
    return left_out


def _sources(checkpoint: Checkpoint) -> set[str]:
    """Returns the files that a checkpoint's bytes come from."""
    found = {checkpoint.url}
    for _, node in walk(checkpoint.tree, inside=True):
        source = node.source if isinstance(node, TensorInfo) else node
        for tensor in source.inputs if isinstance(source, Derived) else ():
            source = tensor.source
        if isinstance(source, Storage):
            found.add(source.span.url)
    return found - {""}


def check_output(
    path: str | os.PathLike[str], *, force: bool = False, in_place: bool = False, inputs: Sequence[Checkpoint] = ()
) -> None:
    """Raises what `save` would for the name alone: an unknown suffix, a file that exists, an input."""
    url = os.fspath(path)
    formats.writer(url)
    _check_place(url, force or in_place, () if in_place else inputs, "is one of the inputs; --in-place replaces it")


def check_report(path: str | os.PathLike[str], *, force: bool = False, inputs: Sequence[Checkpoint] = ()) -> None:
    """Raises what `write_text` would for the name alone, and OutputError for the name of an input."""
    _check_place(os.fspath(path), force, inputs, "is one of the inputs")


def _check_place(url: str, force: bool, inputs: Sequence[Checkpoint], refusal: str) -> None:
    if os.path.isdir(url):
        raise OutputError("is a directory; name a file", url)
    for checkpoint in inputs:
        if any(same_file(source, url) for source in _sources(checkpoint)):
            raise OutputError(refusal, url)
    if os.path.lexists(url) and not force:
        raise OutputError(EXISTS, url)
    if not os.path.isdir(os.path.dirname(os.path.realpath(url))):
        raise OutputError("cannot be written: no such directory", url)


def same_place(first: str, second: str) -> bool:
    """Returns whether two paths name one file, existing or not."""
    return same_file(first, second) or os.path.realpath(first) == os.path.realpath(second)


def write_text(path: str | os.PathLike[str], text: str, *, force: bool = False) -> None:
    """Writes a report's text, whole or not at all. Raises: OutputError."""
    with Output(os.fspath(path), force=force) as output:
        output.write(text.encode())
        output.commit()


_DEVICE = re.compile(r"(cpu|cuda|meta|mps|xpu|xla|hpu|npu|mtia|ipu|maia|privateuseone)(:\d+)?")


def _tag_map(map_location: MapLocation) -> Callable[[str], str] | None:
    """Returns the mapping of device tags. Raises: UsageError for a tag that torch.load would not know."""
    if map_location is None or callable(map_location):
        return map_location
    tags = {"*": map_location} if isinstance(map_location, str) else dict(map_location)
    for tag in tags.values():
        if not _DEVICE.fullmatch(tag):
            raise UsageError(f"{tag!r} is no device tag such as cpu or cuda:1")
    if isinstance(map_location, str):
        return lambda tag: map_location if tag != "meta" else tag
    return lambda tag: tags.get(tag, tag)


def refuse_broken(checkpoint: Checkpoint) -> None:
    """Raises IncompleteError if tensors are missing from a sharded checkpoint: nothing may be built on it."""
    if checkpoint.broken:
        raise IncompleteError("; ".join(checkpoint.problems), checkpoint.url)


def _opened(source: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else open(source)


Source = Checkpoint | str | os.PathLike[str]


def inspect(source: Source, *, root: str | Path | None = None) -> InspectReport:
    """Returns what a checkpoint holds: its weights, what stands beside them, what is worth a word.

    Reads headers only. Raises: what `open` raises, NoTensorsError.
    """
    return op_inspect(source if isinstance(source, Checkpoint) else open(source, root=root))


def diff(
    a: Source,
    b: Source,
    *,
    ignore: Sequence[str] = (),
    strip_prefix_a: str | None = None,
    strip_prefix_b: str | None = None,
    devices: bool = False,
    values: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-8,
) -> DiffReport:
    """Returns how two checkpoints' weights differ: keys, shapes and dtypes, from headers alone.

    ``values`` also compares the data, block by block, with `torch.allclose`'s tolerances; NaN equals NaN,
    integers are exact. Raises: what `open` raises, NoTensorsError.
    """
    from ckptool.ops import diff as op
    from ckptool.values import compare

    first, second = _opened(a), _opened(b)
    refuse_broken(first)
    refuse_broken(second)
    with Files() as files:
        compared = partial(compare, files=files, rtol=rtol, atol=atol) if values else None
        return op.diff(
            first, second, ignore=ignore, strip_prefix_a=strip_prefix_a, strip_prefix_b=strip_prefix_b,
            devices=devices, compare=compared,
        )  # fmt: skip


def filter(
    *sources: Source,
    match: Source | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strip_prefix: str | None = None,
    add_prefix: str | None = None,
    only_matched: bool = False,
    cast: bool = False,
) -> tuple[Checkpoint, FilterReport]:
    """Returns (checkpoint, report): the target with every tensor that fits taken from the sources.

    A tensor fits when its key (through wrapper prefixes such as ``module.``) and its shape agree. Without
    ``match`` it is the selection of the first source's keys by ``include`` and ``exclude``. Nothing is
    written: hand the checkpoint to `save`. Reads headers only, except where tied names must be compared.

    Raises: what `open` raises, NoTensorsError, CollisionError for tied names with different values.
    """
    from ckptool.data import same_bytes
    from ckptool.ops import filter as op

    opened = [_opened(source) for source in sources]
    target = None if match is None else _opened(match)
    for checkpoint in [*opened, *([target] if target else [])]:
        refuse_broken(checkpoint)
    with Files() as files:
        return op.filter(
            opened, target, include=include, exclude=exclude, strip_prefix=strip_prefix, add_prefix=add_prefix,
            only_matched=only_matched, cast=cast, same=partial(same_bytes, files=files),
        )  # fmt: skip


def _to_torch(self: Checkpoint, map_location: Any = None, *, only_root: bool = False) -> Any:
    """Returns the tree with real tensors, as torch.load would; with ``only_root``, {key: tensor} of the weights.

    ``map_location`` is what `torch.load` takes: a string, a torch.device, a dict or a callable. Tied tensors
    and views share memory. An nn.Module whose class was not imported becomes its state_dict.
    Raises: DependencyError without torch; UnsupportedError for a tensor only its own class can rebuild.
    """
    from ckptool import real

    refuse_broken(self)
    tree = self.tree
    if only_root:
        entries = {key: value for key, (_, value) in self.entries().items()}
        tree = detached(entries) if modules.is_module(self.at(self.root)) else entries
    with Files() as files:
        return real.to_torch(tree, files, map_location, _module_state_dict)


def _module_state_dict(node: Any) -> Any:
    if not modules.is_module(node):
        return None
    return ordered_dict(detached(modules.state_dict(node)), modules.metadata(node))


Checkpoint.to_torch = _to_torch

__all__ = ["Checkpoint", "diff", "filter", "inspect", "open", "save"]
