"""A model in code, named ``pkg.mod:factory`` or ``path/train.py:factory``: the user's code is imported and run."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import os
import site
import sys
import sysconfig
import tomllib
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import CkptoolError, UsageError, listed
from ckptool.partial import live
from ckptool.references import CODE
from ckptool.values.codec import import_torch

LONGEST = 1000
"""Most characters that are shown of the message of an exception of the user's code."""


def opened(text: str, arguments: Sequence[str] = (), *, values: bool) -> Checkpoint:
    """Returns the state_dict of the model that a factory of the user's builds, as a checkpoint.

    It is built on ``meta``, or on the CPU if ``values`` are needed or building on meta fails; a note says so. Raises:
    what `built` raises.
    """
    note, why = f"imported and ran {text}, your own code, to build the model", "for its values"
    with _users_code(text):
        factory, given = _factory(text, arguments)
    if not values:
        try:
            with _users_code(text), import_torch("a model in code").device("meta"):
                return replace(_checkpoint(text, factory, given), notes=(note,))
        except UsageError as error:
            if error.__cause__ is None:  # of ours, not of the user's code
                raise
            why = f"on meta it raised {error.message}"
    with _users_code(text):
        return replace(_checkpoint(text, factory, given), notes=(note, f"built on the CPU: {why}"))


def _checkpoint(text: str, factory: Any, given: dict[str, Any]) -> Checkpoint:
    """Returns the model's state_dict. Raises: UsageError for parameters that have no shape yet."""
    model = _model(text, factory, given)
    is_lazy = import_torch("a model in code").nn.parameter.is_lazy
    if lazy := [key for key, value in model.state_dict(keep_vars=True).items() if is_lazy(value)]:
        what = "no shapes yet (lazy layers): have the factory run the model once"
        raise UsageError(f"{listed(lazy)}: {what}", text)
    return live.checkpoint_of(model, url=text)


def built(text: str, arguments: Sequence[str]) -> Any:
    """Returns the torch.nn.Module that a class or factory of the user's builds, which is imported and called.

    A module as the first of a tuple is taken too, and one that is there already. ``arguments``: see `parsed`. What
    the code prints goes to stderr. Raises: UsageError if it is not found, raises, or gives something else.
    """
    with _users_code(text):
        model = _model(text, *_factory(text, arguments))
        model.state_dict(keep_vars=True)  # hooks of the user's code may fail
        return model


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns {name: value} of texts ``name=value``: a Python literal, true or false, else the text itself.

    >>> parsed(["depth=2", "sizes=[6, 2]", "arch=vit_small", "pretrained=false"])
    {'depth': 2, 'sizes': [6, 2], 'arch': 'vit_small', 'pretrained': False}
    """
    found: dict[str, Any] = {}
    for text in arguments:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise UsageError(f"--arg takes NAME=VALUE, not {text!r}")
        if name in found:
            raise UsageError(f"--arg {name} is given twice")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # of an invalid escape in a text
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    try:  # TOML's lists may hold true and false, and it has inf and nan
        value = tomllib.loads(f"value = {text}")
        return value["value"] if len(value) == 1 and isinstance(value["value"], (bool, float, list)) else text
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _factory(text: str, arguments: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Returns what the text names, imported, and the arguments to call it with."""
    match = CODE.fullmatch(text)
    if match is None:
        raise UsageError("a model in code is named PKG.MOD:NAME or FILE.py:NAME")
    given = parsed(arguments)
    import_torch("a model in code")  # before the user's directories are searched
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    where, name = match.groups()
    try:
        found: Any = _of_file(where) if where.endswith(".py") else importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{where}.".startswith(f"{error.name}."):
            raise UsageError(f"there is no such file, and ModuleNotFoundError: {error}", text) from error
        raise
    for step in name.split("."):
        found = getattr(found, step)
    if where.partition(".")[0] == "transformers":
        return _configured(found, given)
    return found, given


def _of_file(path: str) -> ModuleType:
    """Returns the module that a file is, run anew; of a package (there is an ``__init__.py``), by its dotted name."""
    file = Path(path).resolve()
    if not file.is_file():
        raise UsageError(f"there is no file {path}")
    parts, base = [file.stem], file.parent
    while (base / "__init__.py").exists():
        parts.insert(0, base.name)
        base = base.parent
    if str(base) not in sys.path:
        sys.path.insert(0, str(base))
    name = ".".join(parts)
    if len(parts) > 1:
        importlib.import_module(".".join(parts[:-1]))  # for its relative imports
    there = getattr(sys.modules.get(name), "__file__", None) or ""
    if name in sys.modules and (Path(there).name != file.name or _is_installed(there) or name == "__main__"):
        name = f"_{name}_"  # torch.py, types.py: others use that module
    loader = _Uncached(name, str(file))
    spec = importlib.machinery.ModuleSpec(name, loader, origin=str(file))
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes of the file look for it there
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _Uncached(importlib.machinery.SourceFileLoader):
    """Writes no bytecode: that of a file which changes within a second would be stale."""

    def set_data(self, path: str, data: object, *, _mode: int = 0) -> None:
        """Does nothing."""


def _configured(found: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns a class of transformers and its arguments, ``config`` read from a directory, if one is named.

    Their classes take an object of a configuration; AutoModel and its like are built by ``from_config`` only.
    """
    config = given.get("config")
    if isinstance(config, str):
        if not os.path.exists(config):
            raise UsageError(f"there is no directory {config} with a config.json")
        trusted = {name: given[name] for name in ("trust_remote_code",) if name in given}
        given = {**given, "config": sys.modules["transformers"].AutoConfig.from_pretrained(config, **trusted)}
    if isinstance(found, type) and not hasattr(found, "forward") and hasattr(found, "from_config"):
        found = found.from_config
    return found, given


def _model(text: str, factory: Any, given: dict[str, Any]) -> Any:
    """Returns the torch.nn.Module that a factory gives, in a tuple or alone. Raises: UsageError."""
    import_torch("a model in code")
    if live.is_module(factory):
        if given:
            raise UsageError("is a model already: --arg has nothing to be given to", text)
        return factory
    try:
        made = factory(**given)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:  # of the call itself
            raise UsageError(f"TypeError: {error}{_defined(factory)}", text) from error
        raise
    first = made[0] if isinstance(made, tuple) and made else made
    if not live.is_module(first):
        what = f"a tuple that begins with {_kind(first)}" if first is not made else _kind(made)
        raise UsageError(f"not a torch.nn.Module but {what}; of a tuple the first is taken", text)
    return first


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@contextmanager
def _users_code(text: str) -> Iterator[None]:
    """Sends to stderr what the code inside prints, and makes an exception of it one line with its file and line.

    The current directory is the same afterwards: the other paths of the command line are relative to it.
    """
    here = os.getcwd()
    try:
        with _stdout_to_stderr():
            yield
    except CkptoolError as error:
        error.path = error.path or text
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
        said = f"{type(error).__name__}: {message}" if message else type(error).__name__
        raise UsageError(f"{said}{_where(error)}", text) from error
    finally:
        os.chdir(here)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keeps stdout for the report, of processes that the code starts and of libraries in C too."""
    with suppress(ValueError):  # closed
        sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _where(error: BaseException) -> str:
    """Returns `` (file:line)`` of the last line of the user's own code that led to an exception, "" if none did."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({_short(error.filename)}:{error.lineno})"
    frames = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((str(Path(__file__).parents[1]), "<frozen"))
    ]
    own = [frame for frame in frames if not _is_installed(frame[0])] or frames
    return f" ({_short(own[-1][0])}:{own[-1][1]})" if own else ""


def _defined(factory: Any) -> str:
    """Returns `` (file:line)`` of the definition of a class or function, "" if it is not in Python."""
    code = getattr(getattr(factory, "__init__", None) if isinstance(factory, type) else factory, "__code__", None)
    return f" (defined at {_short(code.co_filename)}:{code.co_firstlineno})" if code else ""


def _is_installed(file: str) -> bool:
    """Returns whether a file is one of Python's own or of an installed package."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return file.startswith(tuple(f"{path}{os.sep}" for path in [*paths, site.getusersitepackages()]))


def _short(file: str) -> str:
    """Returns the path of a file, relative to the current directory if it is below it."""
    here = os.path.join(os.path.realpath(os.getcwd()), "")
    return os.path.realpath(file).removeprefix(here)
