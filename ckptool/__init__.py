"""ckptool: look into, compare, filter and rewrite checkpoints without loading them.

>>> import ckptool
>>> ckptool.open("fixtures/resnet_new.pth").state_dict()["fc.weight"].shape
(6, 16)
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it; importing typing would take longer than saying the version
if TYPE_CHECKING:
    from typing import Any

    from ckptool.api import (
        convert,
        diff,
        filter,
        inspect,
        invert,
        limited,
        load_partial,
        open,
        plan_partial,
        remap,
        save,
    )
    from ckptool.core.checkpoint import Checkpoint
    from ckptool.core.findings import Check, Finding, PrefixStats, Stats
    from ckptool.core.tensor import TensorInfo
    from ckptool.errors import (
        CkptoolError,
        CollisionError,
        DependencyError,
        FormatError,
        IncompleteError,
        LimitError,
        LossError,
        NoTensorsError,
        OutputError,
        StrictError,
        UnreadableError,
        UnsupportedError,
        UsageError,
    )
    from ckptool.ops.convert import ConvertReport
    from ckptool.ops.diff import Changed, DiffReport, ValuesChanged
    from ckptool.ops.filter import FilterReport, Row
    from ckptool.ops.inspect import Beside, InspectReport, TensorRow
    from ckptool.ops.remap import Mapped, RemapReport
    from ckptool.ops.rules import Rules
    from ckptool.partial.handover import Group
    from ckptool.partial.plan import LoadPartialReport
    from ckptool.saving import Saved

__version__ = "0.1.0"

__all__ = [
    "Beside",
    "Changed",
    "Check",
    "Checkpoint",
    "CkptoolError",
    "CollisionError",
    "ConvertReport",
    "DependencyError",
    "DiffReport",
    "FilterReport",
    "Finding",
    "FormatError",
    "Group",
    "IncompleteError",
    "InspectReport",
    "LimitError",
    "LoadPartialReport",
    "LossError",
    "Mapped",
    "NoTensorsError",
    "OutputError",
    "PrefixStats",
    "RemapReport",
    "Row",
    "Rules",
    "Saved",
    "Stats",
    "StrictError",
    "TensorInfo",
    "TensorRow",
    "UnreadableError",
    "UnsupportedError",
    "UsageError",
    "ValuesChanged",
    "__version__",
    "convert",
    "diff",
    "filter",
    "inspect",
    "invert",
    "limited",
    "load_partial",
    "open",
    "plan_partial",
    "remap",
    "save",
]


def __getattr__(name: str) -> Any:
    """Returns what the library offers when it is first asked for: `ckptool --version` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ckptool import api, errors
    from ckptool.core import tensor

    places = (errors, tensor, api)
    found = next(getattr(place, name) for place in places if hasattr(place, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
