"""The errors that ckptool raises; each class has a slug and an exit code.

    CkptoolError                 2  error              (never raised itself)
      UsageError                 2  usage              the call contradicts itself
      UnreadableError            2  unreadable         the operating system could not read the file
      FormatError                2  damaged            not a valid file of its format
        LimitError               2  limit              a named limit was exceeded
        IncompleteError          2  incomplete         a sharded checkpoint with a part missing
      UnsupportedError           2  unsupported        known by name, not read or written here
      NoTensorsError             2  no-tensors         no tensors to work on; no empty output is written
      OutputError                2  output             would overwrite, or cannot be written
      CollisionError             2  collision          two things claim one name
      LossError                  2  loss               the target format cannot hold it
      DependencyError            2  dependency         an optional library is absent
      StrictError                2  strict             a plan does not meet ``strict`` (library only)

Exit code 1 is no error but a negative answer: the checkpoints differ, or a required condition does not hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable


class CkptoolError(Exception):
    """One line for the user: ``<file>: <what, where, expected, found, what to do>``."""

    slug = "error"
    exit_code = 2

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class UsageError(CkptoolError):
    """The options contradict each other, or one of them cannot be understood."""

    slug = "usage"


class UnreadableError(CkptoolError):
    """The operating system could not read the file: it is absent, permission is denied, or the disk fails."""

    slug = "unreadable"


class FormatError(CkptoolError):
    """The file is truncated, corrupt, or no checkpoint at all."""

    slug = "damaged"


class LimitError(FormatError):
    """A limit that protects against hostile files was exceeded; `limits.Limit.passed` makes the message."""

    slug = "limit"


class IncompleteError(FormatError):
    """A sharded checkpoint lacks a part that its index lists, or has it twice."""

    slug = "incomplete"


class UnsupportedError(CkptoolError):
    """A format or feature that is recognised but not supported."""

    slug = "unsupported"


class NoTensorsError(CkptoolError):
    """No tensor where the weights should be."""

    slug = "no-tensors"


class OutputError(CkptoolError):
    """The output exists already, is an input, or cannot be written."""

    slug = "output"


class CollisionError(CkptoolError):
    """Two keys, or two values, claim one name."""

    slug = "collision"


class LossError(CkptoolError):
    """The target format cannot represent the data."""

    slug = "loss"


class DependencyError(CkptoolError):
    """An optional library is needed and not installed."""

    slug = "dependency"


class StrictError(CkptoolError):
    """Keys of a plan are missing, unexpected or mismatched under ``strict``."""

    slug = "strict"


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Returns ``a, b, c and 4 more``: a list for a message, cut after ``limit`` items."""
    names = [str(item) for item in items]
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"


def near(name: str, known: Iterable[str]) -> str:
    """Returns `` (did you mean x?)`` for the known name that is most like a wrong one; "" if none is.

    >>> near("CONVRT", ["convert", "diff"]), near("heaven", ["convert"])
    (' (did you mean convert?)', '')
    """
    import difflib

    names = {one.casefold(): one for one in known}
    found = difflib.get_close_matches(name[:200].casefold(), names, 1)
    return f" (did you mean {names[found[0]]}?)" if found else ""


def one_of(known: Collection[str], word: str, what: str) -> str:
    """Returns a word that is known. Raises: UsageError for another; ``what`` is what takes it, such as an option."""
    if word not in known:
        raise UsageError(f"{what} takes {', '.join(known)}; not {word!r}{near(word, known)}")
    return word


def as_options(given: Iterable[tuple[str, str | None]]) -> str:
    """Returns (option, value) pairs as they are typed in a shell, without those that have no option or no value."""
    import shlex

    return " ".join(f"{name} {shlex.quote(value)}" for name, value in given if name and value is not None)


def needs_torch(what: str) -> DependencyError:
    """Returns the error for an operation that needs torch, which is not installed."""
    return DependencyError(f"{what} needs torch, which is not installed: pip install 'ckptool[torch]'")


def explain(error: OSError) -> str:
    """Returns the operating system's message, in lower case, without the path."""
    return (error.strerror or str(error)).lower()


def kind_of(value: object) -> str:
    """Returns the description of a wrong argument for a message: ``'zeros'``, ``an int``."""
    if isinstance(value, str):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
