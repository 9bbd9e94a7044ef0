"""ckptool: look into, compare, filter and rewrite checkpoints without loading them.

>>> import ckptool
>>> ckptool.open("fixtures/resnet_new.pth").state_dict()["fc.weight"].shape
(6, 64)
"""

from ckptool.api import check_output, diff, filter, inspect, open, save, write_text
from ckptool.checkpoint import Checkpoint, TensorInfo
from ckptool.errors import CkptoolError

__version__ = "0.1.0"

__all__ = [
    "Checkpoint", "CkptoolError", "TensorInfo", "__version__", "check_output", "diff", "filter", "inspect", "open",
    "save", "write_text",
]  # fmt: skip
