"""torch.package archives (`torch.package.PackageExporter`): the pickled resources; the code beside them is not run.

    ROOT/PACKAGE/RESOURCE         a pickle, whose tensors refer to storages by number; or bytes or text of the user
    ROOT/.data/0.storage, ...     raw storages, which all pickles share
    ROOT/.data/extern_modules     the names of modules that are imported from elsewhere
    ROOT/.data/ts_code/           TorchScript modules inside of the pickles
    ROOT/PACKAGE/**.py            source text

torch 1.8 has the storages at ROOT/data/NUMBER, and ROOT/extern_modules.
Source: ``torch/package/package_exporter.py`` and ``package_importer.py`` of torch 1.8 and 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tree import Global, brief
from ckptool.errors import CkptoolError, FormatError, listed
from ckptool.io.probe import Probe
from ckptool.io.source import read_span
from ckptool.limits import MAX_LEVELS, MAX_PICKLE
from ckptool.pickling import load as pickles
from ckptool.pickling import torch_calls as rebuild
from ckptool.pickling.archives import refuse_ambiguous, storages


def matches(probe: Probe) -> bool:
    """Returns whether torch.package wrote it."""
    old = {f"{probe.root}/extern_modules", f"{probe.root}/version"}
    return f"{probe.root}/.data/extern_modules" in probe.members or old <= probe.members.keys()


def read(probe: Probe) -> Checkpoint:
    """Returns {package: {resource: tree}}, with a dict for each step of a package's name.

    Reads all pickles. Raises: FormatError, LimitError.
    """
    is_new = f"{probe.root}/.data/extern_modules" in probe.members
    data, end = (f"{probe.root}/.data/", ".storage") if is_new else (f"{probe.root}/data/", "")
    refuse_ambiguous(probe, data)
    leaf = _Leaf(storages(probe, "a pickle", data, end, numbers=True))
    tree: dict[str, Any] = {}
    packages: dict[str, dict[str, Any]] = {}
    names: dict[tuple[str, str], None] = {}
    met: dict[str, dict[str, None]] = {what: {} for what in (RESOURCE, SOURCE, SCRIPT, FILE)}
    for member in probe.members:
        name = member.removeprefix(f"{probe.root}/")
        try:
            if (kind := _kind(name, is_new)) == RESOURCE:
                pickled = _pickled(probe, name)
                if pickled is None:
                    kind = FILE
                else:
                    made, found = pickles.load(
                        pickled, builders=rebuild.builders, persistent_load=leaf, closed=rebuild.makes_closed_leaves
                    )
                    names.update(dict.fromkeys(found))
                    _place(tree, packages, name, pickles.with_arrays(made, found, probe.file.span(0, 0)))
        except CkptoolError as error:
            error.message = f"{name}: {error.message}"
            raise
        if kind:
            met[kind][name] = None
    if len(met[RESOURCE]) == 1:
        met[RESOURCE] = {}
    notes = tuple(f"{what}: {listed(found)}" for what, found in met.items() if found)
    return Checkpoint(tree, url=probe.path, nbytes=probe.size, names=tuple(names), notes=notes)


RESOURCE = "several resources, --root PACKAGE/RESOURCE chooses one"
SOURCE = "source text, which is not run"
SCRIPT = "TorchScript modules, which are not read"
FILE = "files of the user, which are not read"


def _kind(name: str, is_new: bool) -> str:
    """Returns what a record is by its name; "" for one that needs no note."""
    if name.startswith(".data/ts_code/"):
        return SCRIPT
    if re.fullmatch(
        r"\.data/.*|byteorder|version|.*/" if is_new else r"data/\d+|extern_modules|version", name, re.DOTALL
    ):
        return ""
    return SOURCE if name.endswith(".py") else RESOURCE


def _pickled(probe: Probe, name: str) -> bytes | None:
    """Returns a resource that is one pickle of protocol 2 or later, as torch.package writes; None for any other."""
    head = read_span(probe.file, probe.members[f"{probe.root}/{name}"].span, 2)
    if head[:1] != b"\x80" or head[1:] not in (b"\2", b"\3", b"\4", b"\5"):
        return None
    pickled = probe.record(name, MAX_PICKLE) or b""
    return pickled if pickles.scan(pickled) == len(pickled) else None


def _place(tree: dict[str, Any], packages: dict[str, dict[str, Any]], name: str, value: Any) -> None:
    """Puts a resource into the tree. Raises: FormatError if its name is a package's too, LimitError."""
    *steps, resource = name.split("/")
    if len(steps) > MAX_LEVELS.now():
        raise MAX_LEVELS.passed("its package is nested too deep", len(steps))
    node, path = tree, ""
    for step in steps:
        path += f"{step}/"
        if path not in packages:
            if step in node:
                raise FormatError(f"{path[:-1]} is a resource and a package")
            packages[path] = node[step] = {}
        node = packages[path]
    if resource in node:
        raise FormatError(f"{name} is a resource and a package")
    node[resource] = value


class _Leaf:
    """What stands for a persistent id: a storage, or an object that a function would make of the package.

    ``made``: these objects by their numbers; another reference to one is the same object.
    """

    def __init__(self, storage: Callable[[Any], Any]) -> None:
        self.storage = storage
        self.made: dict[int, Any] = {}

    def __call__(self, pid: Any) -> Any:
        if type(pid) is not tuple or len(pid) < 3 or pid[0] != "reduce_package":
            return self.storage(pid)
        number, function, args = pid[1:] if len(pid) == 4 else (None, *pid[1:])  # without a number before torch 1.11
        if not isinstance(function, Global) or type(args) is not tuple or type(number) not in (int, type(None)):
            raise FormatError(f"it refers to something that is no storage: {brief(pid)}")
        if number is None:
            return function(*args)
        if number not in self.made:
            self.made[number] = function(*args)
        return self.made[number]
