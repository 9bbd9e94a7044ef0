"""Files of rules and maps that a user names."""

from __future__ import annotations

from typing import Any

from ckptool.errors import FormatError, UnreadableError, explain


def read_data(path: str) -> Any:
    """Returns the content of a TOML or JSON file, told apart by trying. Raises: UnreadableError, FormatError."""
    import json
    import tomllib

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = explain(error) if isinstance(error, OSError) else "is no text"
        raise UnreadableError(reason, path) from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if not path.endswith(".toml") and text.lstrip()[:1] in ("{", '"'):
            raise FormatError(f"no JSON: {error}", path) from error
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError(f"neither JSON nor TOML: {error}", path) from error
