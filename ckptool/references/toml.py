"""TOML files that say what is wanted of a checkpoint: read within a limit, with errors that say where."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ckptool.core.tree import brief
from ckptool.errors import CkptoolError, FormatError, UnreadableError, explain, near
from ckptool.io.files import read_given
from ckptool.io.paths import given

T = TypeVar("T")


def read(path: str | os.PathLike[str], what: str, parse: Callable[[dict[str, Any]], T]) -> T:
    """Returns what ``parse`` makes of a file, which is ``what``. Raises: UnreadableError, FormatError."""
    url = given(os.fspath(path))
    try:
        return parse(tomllib.loads(read_given(url, what).decode()))
    except OSError as error:
        raise UnreadableError(explain(error), url) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError(f"is no {what.partition(' ')[2]}: not TOML: {error}", url) from error
    except CkptoolError as error:
        error.path = error.path or url
        raise


def field(data: Mapping[str, Any], name: str, kind: type, default: Any, wanted: str, where: str = "") -> Any:
    """Returns a value of a table; ``where``: the names before it, with the dot. Raises: FormatError."""
    value = data.get(name, default)
    if not isinstance(value, kind):
        raise FormatError(f"{where}{name}: expected {wanted}, found {brief(value) if name in data else 'none'}")
    return value


def known(data: Mapping[str, Any], names: Iterable[str], where: str = "the top") -> None:
    """Raises FormatError for the first name that is not known."""
    names = list(names)
    for name in data:
        if name not in names:
            raise FormatError(f"{where}: expected {', '.join(names)}, found {name!r}{near(name, names)}")
