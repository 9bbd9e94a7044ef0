"""What may stand where a checkpoint is asked for, and is none: a model in code; for `diff`, a schema of patterns.

And the planned changes of `diff`."""

from __future__ import annotations

import os
import re

from ckptool.io.paths import is_url

CODE = re.compile(r"((?:[^\W\d]\w*\.)*[^\W\d]\w*|.+\.py):((?:[^\W\d]\w*\.)*[^\W\d]\w*)", re.DOTALL)
"""``pkg.mod:factory`` or ``path/train.py:factory``."""


def is_code(text: str) -> bool:
    """Returns whether a text names a model in code: it has the form, and there is no file of that name."""
    return not is_url(text) and CODE.fullmatch(text) is not None and not os.path.lexists(text)


def is_schema(text: str) -> bool:
    """Returns whether a text names a schema of patterns: a file whose name ends in ``.toml``."""
    return text.lower().endswith(".toml") and (is_url(text) or os.path.isfile(text))
