"""What can go wrong, as a tree; one slug and one exit code per kind.

    CkptoolError                 2  error              (never raised itself)
      UsageError                 2  usage              the call contradicts itself
      UnreadableError            2  unreadable         the system would not give the bytes
      FormatError                2  damaged            the bytes are not what they claim to be
        LimitError               2  limit              a named limit was passed
        IncompleteError          2  incomplete         a sharded checkpoint with a part missing
      UnsupportedError           2  unsupported        known by name, not read or written here
      NoTensorsError             2  no-tensors         nothing to work on: never an empty output
      OutputError                2  output             would overwrite, or cannot be written
      CollisionError             2  collision          two things claim one name
      LossError                  2  loss               the target format cannot hold it
      DependencyError            2  dependency         an optional library is absent
      StrictError                2  strict             what `strict` demands of a plan does not hold (library only)

An exit code of 1 is no error: it is an answer ("they differ", "the gate does not hold").
"""

from __future__ import annotations

from collections.abc import Iterable


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
    """The operating system would not give the bytes: absent, forbidden, a failing disk."""

    slug = "unreadable"


class FormatError(CkptoolError):
    """The bytes are not what they claim to be: truncated, corrupt, or no checkpoint at all."""

    slug = "damaged"


class LimitError(FormatError):
    """A limit that guards against hostile files was passed; `limits.Limit.passed` makes the message."""

    slug = "limit"


class IncompleteError(FormatError):
    """A sharded checkpoint lacks a part that its index promises, or holds it twice."""

    slug = "incomplete"


class UnsupportedError(CkptoolError):
    """A format or feature that is recognised, and not supported."""

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
    """The target format cannot hold what it was given."""

    slug = "loss"


class DependencyError(CkptoolError):
    """An optional library is needed and absent."""

    slug = "dependency"


class StrictError(CkptoolError):
    """A plan was made and is not good enough: keys are missing, unexpected or mismatched under ``strict``."""

    slug = "strict"


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Returns ``a, b, c and 4 more``: for messages about many things at once."""
    names = [str(item) for item in items]
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"


def needs_torch(what: str) -> DependencyError:
    """Returns the one line said when a job needs torch and it is not installed."""
    return DependencyError(f"{what} needs torch, which is not installed: pip install 'ckptool[torch]'")


def explain(error: OSError) -> str:
    """Returns what the system said, in lower case, without the path."""
    return (error.strerror or str(error)).lower()


def kind_of(value: object) -> str:
    """Returns what a wrong argument is, for a message: ``'zeros'``, ``an int``."""
    if isinstance(value, str):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
