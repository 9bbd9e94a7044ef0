"""What the functions of `import ckptool` take: checkpoints, opened from wherever they are, and patterns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptool import formats
from ckptool.core.checkpoint import Checkpoint, Module, set_realise
from ckptool.core.keys import ROOTS
from ckptool.core.tree import Path, path_text
from ckptool.errors import UnreadableError, UsageError, kind_of
from ckptool.io import files, paths, tally
from ckptool.references import is_code

if TYPE_CHECKING:
    from ckptool.saving import MapLocation

Source = Checkpoint | str | os.PathLike[str] | Mapping[str, Any] | Module
"""A checkpoint, the path of one, a state_dict (a dict of torch tensors or numpy arrays, nested as in a file), or a
torch.nn.Module, whose state_dict it is."""

Patterns = str | Sequence[str]
"""Key patterns, or a single one."""

Pairs = Mapping[str, str] | Sequence[tuple[str, str]]
"""{key pattern: adapter or rule for the keys that match}, or such pairs."""


def open(source: Source, root: str | Path | None = None, *, tp_rules: Any = None) -> Checkpoint:
    """Returns the checkpoint at a path (a file, a sharded directory or its index), of a state_dict or of a live model.

    Reads headers only; runs no code of the file and imports none of its classes. ``root`` is the path of the weights
    in the tree (``"model_state_dict"``, steps separated by "/"), or a directory in it; None looks for them, see
    `find_root`. ``tp_rules`` joins the ranks of tensor parallelism: a TOML file, its content as a dict, or ``"gpt"``
    or ``"llama"``, see `JoinRules`; tensors that are replicated on the ranks are read and compared.

    Raises: UnreadableError, FormatError, UnsupportedError; UsageError if there is nothing at ``root``, or for rules
    that do not fit.
    """
    if isinstance(source, Checkpoint):
        opened = source
    elif isinstance(source, (str, os.PathLike)):
        path = paths.given(os.fspath(source))
        files.look_again(path)
        if is_code(path):
            what = "there is no such file, and a model in code is a reference: for `inspect`, a side of `diff`"
            raise UnreadableError(f"{what}, `filter --match`, `load-partial --into`", path)
        opened, root = formats.read_at(path, root)
    else:
        from ckptool.partial import live

        opened = live.opened(source)
        root = () if root is None and not isinstance(source, Mapping) else root
    if tp_rules is not None:
        from ckptool.directories.parallel.joining import joined

        opened = joined(opened, tp_rules)
    if root is None and isinstance(source, Checkpoint) and not source.ranks:
        return opened
    opened = opened.rooted(root)
    if tally.current is not None:
        tally.current.say(_choice(opened, root))
    return opened


def _choice(opened: Checkpoint, root: object) -> str:
    """Returns as what a checkpoint was read, where its weights were taken, and why there."""
    why = "as was asked for" if root is not None else "the only ones" if opened.root else "which are all of it"
    if root is None and opened.root and opened.root[-1] in ROOTS:
        why = "a name that weights have"
    where = path_text(opened.root) or "the top"
    return f"{opened.url}: read as {opened.format}, for what it begins with; weights at {where}, {why}"


def open_whole(source: Source, why: str = "") -> Checkpoint:
    """Opens a checkpoint; ``why`` it must have values. Raises: what `open` and its own ``require`` methods raise."""
    opened = open(source)
    if why:
        opened.require_values(why)
    opened.require_whole()
    opened.require_joined()
    return opened


def tags_of(map_location: MapLocation) -> MapLocation:
    """Returns ``map_location``. Raises: UsageError if it is none of what maps device tags."""
    map_location = str(map_location) if type(map_location).__module__ == "torch" else map_location  # a torch.device
    known = map_location is None or isinstance(map_location, (str, Mapping)) or callable(map_location)
    if not known or (isinstance(map_location, Mapping) and any(type(tag) is not str for tag in map_location.values())):
        raise UsageError(f"map_location is a device tag, a dict of tags or a callable, not {kind_of(map_location)}")
    return map_location


def _realise(tree: Any, map_location: Any, module_state_dict: Callable[[Any], Any], arrays: bool) -> Any:
    from ckptool.io.files import Files
    from ckptool.values import torch_bridge

    with Files() as files:
        return torch_bridge.to_torch(tree, files, map_location, module_state_dict, arrays)


set_realise(_realise)
