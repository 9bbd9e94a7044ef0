"""ckptool: look into, compare, filter and rewrite checkpoints without loading them.

>>> import ckptool
>>> ckptool.open("fixtures/resnet_new.pth").state_dict()["fc.weight"].shape
(6, 16)
"""

from ckptool.api import (
    Rules,
    convert,
    diff,
    filter,
    inspect,
    invert,
    load_partial,
    open,
    plan_partial,
    remap,
    save,
)
from ckptool.checkpoint import Checkpoint, TensorInfo
from ckptool.errors import CkptoolError

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
    "load_partial",
    "open",
    "plan_partial",
    "remap",
    "save",
]
