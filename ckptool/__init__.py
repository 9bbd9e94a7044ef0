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
    from ckptool.core.tensor import TensorInfo
    from ckptool.errors import CkptoolError
    from ckptool.ops.rules import Rules

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CkptoolError",
    "Rules",
    "TensorInfo",
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
    from ckptool.core import checkpoint

    places = (api, checkpoint, errors)  # api first: it gives Checkpoint its to_torch
    found = next(getattr(place, name) for place in places if hasattr(place, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
