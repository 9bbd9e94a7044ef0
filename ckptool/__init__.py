"""ckptool: look into, compare, filter and rewrite checkpoints without loading them.

>>> import ckptool
>>> ckptool.open("fixtures/resnet_new.pth").state_dict()["fc.weight"].shape
(6, 16)
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers know this name; importing typing would double the time of `--version`
if TYPE_CHECKING:
    from typing import Any

    from ckptool.api.inferring import infer
    from ckptool.api.loading import load_partial, plan_partial
    from ckptool.api.reading import check_schema, diff, inspect
    from ckptool.api.sources import open
    from ckptool.api.writing import convert, filter, invert, remap, save
    from ckptool.core.checkpoint import Checkpoint
    from ckptool.core.findings import Check, Finding, Histogram, PrefixStats, Stats
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
    from ckptool.limits import limited
    from ckptool.mapping.like import InferReport
    from ckptool.mapping.pairs import Doubt, Pair
    from ckptool.ops.convert import ConvertReport
    from ckptool.ops.diff import Changed, DiffReport, TiedAway, ValuesChanged
    from ckptool.ops.inspect import Beside, InspectReport, TensorRow
    from ckptool.ops.remap import Mapped, RemapReport
    from ckptool.ops.rows import FilterReport, Row
    from ckptool.ops.rules import Rules
    from ckptool.partial.handover import Group
    from ckptool.partial.plan import LoadPartialReport
    from ckptool.references.schema import SchemaReport
    from ckptool.reports import render
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
    "Doubt",
    "FilterReport",
    "Finding",
    "FormatError",
    "Group",
    "Histogram",
    "IncompleteError",
    "InferReport",
    "InspectReport",
    "LimitError",
    "LoadPartialReport",
    "LossError",
    "Mapped",
    "NoTensorsError",
    "OutputError",
    "Pair",
    "PrefixStats",
    "RemapReport",
    "Row",
    "Rules",
    "Saved",
    "SchemaReport",
    "Stats",
    "StrictError",
    "TensorInfo",
    "TensorRow",
    "TiedAway",
    "UnreadableError",
    "UnsupportedError",
    "UsageError",
    "ValuesChanged",
    "__version__",
    "check_schema",
    "convert",
    "diff",
    "filter",
    "infer",
    "inspect",
    "invert",
    "limited",
    "load_partial",
    "open",
    "plan_partial",
    "remap",
    "render",
    "save",
]


_MODULES = (
    "errors", "core.tensor", "api.sources", "api.reading", "api.writing", "api.loading", "limits", "ops.rules",
    "api.inferring", "ops.inspect", "core.findings", "ops.diff", "ops.rows", "ops.remap", "ops.convert", "partial.plan",
    "partial.handover", "saving", "references.schema",
    "reports", "mapping.pairs", "mapping.like",
)  # fmt: skip
"""Where the public names are defined, those first that are used most."""


def __getattr__(name: str) -> Any:
    """Returns a public name; its module is imported when the name is first used, for a fast `ckptool --version`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    modules = (import_module(f"ckptool.{module}") for module in _MODULES)
    value = next(getattr(module, name) for module in modules if hasattr(module, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
