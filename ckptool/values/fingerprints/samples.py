"""What the numbers of a checkpoint's vectors look like, where there is nothing to compare them with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ckptool.core.dtypes import COMMON_FLOATS
from ckptool.core.tensor import Storage, TensorInfo
from ckptool.io.files import Files
from ckptool.io.paths import is_url
from ckptool.values.blocks import tensor_blocks
from ckptool.values.codec import decode_float

LONGEST = 1 << 16
"""Elements of the longest vector that is read."""

ALL_SAMPLED = 1 << 24
"""Most elements that are read of one side, in the order of its keys."""


def samples(tensors: Mapping[str, TensorInfo], files: Files) -> dict[str, tuple[float, float, float]]:
    """Returns {key: (mean, standard deviation, least) of the elements} of float vectors; reads each once.

    Those of remote files, and those that are computed, are left out. Raises: FormatError, UnreadableError.
    """
    found: dict[str, tuple[float, float, float]] = {}
    left = ALL_SAMPLED
    for key, tensor in tensors.items():
        source, shape = tensor.source, tensor.shape or ()
        if not isinstance(source, Storage) or is_url(source.span.url) or tensor.dtype not in COMMON_FLOATS:
            continue
        if len(shape) == 1 and 1 < tensor.numel <= min(LONGEST, left):
            left -= tensor.numel
            values = decode_float(tensor.dtype, b"".join(map(bytes, tensor_blocks(tensor, files)))).astype("f8")
            with np.errstate(invalid="ignore", over="ignore"):
                found[key] = float(values.mean()), float(values.std()), float(values.min())
    return found
