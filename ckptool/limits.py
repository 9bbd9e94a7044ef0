"""The limits on the memory and time that one file may cost, each with its figure and its reason.

A `Limit` that protects memory or time can be raised with ``--limit NAME=FIGURE`` or `limited`; one that a format,
Python or another library sets cannot, as raising it here would change nothing. Readers call `Limit.now` once per
file, not per tensor; another thread sees the figures of `limited` only in a copy of the context. SECURITY.md has the
table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from ckptool.errors import LimitError, UsageError, near

_given: ContextVar[Mapping[str, int]] = ContextVar("limits", default=MappingProxyType({}))


class Limit:
    """A limit with its name and its default figure."""

    __slots__ = ("figure", "name", "raisable")

    def __init__(self, name: str, figure: int, *, raisable: bool = True) -> None:
        self.name, self.figure, self.raisable = name, figure, raisable
        ALL[name] = self

    def now(self) -> int:
        """Returns the figure in force: the one given to `limited`, else the default. Costs 0.1 us."""
        return _given.get().get(self.name, self.figure)

    def passed(self, what: str, enough: int | None = None, path: str | None = None) -> LimitError:
        """Returns the error, one line: ``what`` was found, the limit, its figure, and the option that raises it.

        The option suggests ``enough``, or twice the figure where it is not known what would be enough.
        """
        figure = self.now()
        offer = f" (--limit {self.name}={2 * figure if enough is None else enough} raises it)" if self.raisable else ""
        return LimitError(f"{what}: over {self.name}, {figure:,}{offer}", path)


ALL: dict[str, Limit] = {}
"""The limits by their names."""


@contextmanager
def limited(**figures: int) -> Iterator[None]:
    """Sets limits, as in ``limited(MAX_PICKLE=2 << 30)``, for all reading inside the block; the innermost block counts.

    They apply in this thread (and asyncio task) only. Keys and data are read lazily: a checkpoint opened inside the
    block and used outside it is under the limits outside. Raises: UsageError.
    """
    for name, figure in figures.items():
        if name not in ALL or not ALL[name].raisable:
            fixed = f"the limit {name} is fixed" if name in ALL else f"there is no limit {name}{near(name, ALL)}"
            known = ", ".join(limit.name for limit in ALL.values() if limit.raisable)
            raise UsageError(f"{fixed}; those that can be set are {known}")
        if type(figure) is not int or not 0 < figure < 1 << 63:
            raise UsageError(f"the limit {name} is a number from 1 to {(1 << 63) - 1:,}, not {figure!r}")
    token = _given.set({**_given.get(), **figures})
    try:
        yield
    finally:
        _given.reset(token)


# --- pickles ---------------------------------------------------------------------------------------------------------

MAX_PICKLE = Limit("MAX_PICKLE", 1 << 30)
"""Bytes of one pickle. 100,000 tensors take 11 MB; a million, with Adam, under 600 MB."""

MAX_GLOBALS = Limit("MAX_GLOBALS", 100_000)
"""Distinct classes and functions one pickle may name. A whole-model pickle names some hundred."""

MAX_NAME = Limit("MAX_NAME", 1_000)
"""Characters of the name of one class or function, its module included. Real ones have under 200."""

MAX_MEMO = Limit("MAX_MEMO", 1 << 16)
"""How far a memo index may exceed the pickle's length; the C unpickler allocates a slot per index up to the highest."""

MAX_DIGITS = Limit("MAX_DIGITS", 4300, raisable=False)
"""Digits of an integer: Python itself refuses to print longer ones."""

MAX_TUPLES = Limit("MAX_TUPLES", 500, raisable=False)
"""Depth of nested tuples, which C hashes recursively, up to a crash. Even repr() fails at 1,000."""

MAX_TUPLE_ITEMS = Limit("MAX_TUPLE_ITEMS", 10_000_000)
"""Items of one tuple, and of all keys together, shared ones counted each time: a second of hashing."""

MAX_WIDE = Limit("MAX_WIDE", 5_000)
"""Integers of eight bytes and more in one pickle: thousands can share a hash, and a dict compares them all."""

MAX_TUPLE_KEYS = Limit("MAX_TUPLE_KEYS", 5_000)
"""Tuples as keys in a pickle whose numbers may share a hash, as -1 and -2 do: 20 of these make a million tuples."""

# --- trees and keys --------------------------------------------------------------------------------------------------

MAX_DEPTH = Limit("MAX_DEPTH", 2_000)
"""Depth of nested containers. torch.load itself fails near there, and the cost of paths is quadratic in it."""

MAX_SHARED = Limit("MAX_SHARED", 500_000)
"""Nodes one walk may see again, beyond four times those it saw once: shared subtrees can repeat 2^n times."""

MAX_STEPS = Limit("MAX_STEPS", 50_000_000)
"""Steps in all paths of one walk: its memory, if they are kept. A million keys with Adam have 32 million."""

MAX_KEY = Limit("MAX_KEY", 1 << 16)
"""Characters of a key: one memoised name can be each of the 2,000 steps that are joined into a key."""

MAX_KEYS = Limit("MAX_KEYS", 1 << 28)
"""Characters of all keys that are joined from the names above them: a million keys have 100 million."""

MAX_LEVELS = Limit("MAX_LEVELS", 200)
"""Levels (dots) of a key. Work per prefix is quadratic in them; real keys have under 20."""

MAX_MATCH = Limit("MAX_MATCH", 2)
"""Seconds of matching one regular expression (``re:``, ``sub``), of all its slow matches; others take microseconds."""

# --- pickled models --------------------------------------------------------------------------------------------------

MAX_MODULES = Limit("MAX_MODULES", 1_000_000)
"""Modules of one model, shared ones counted each time."""

MAX_SHARED_PARTS = Limit("MAX_SHARED_PARTS", 20_000)
"""Modules, parameters and buffers seen again because their module is shared: submodules can repeat 2^n times."""

MAX_MODULE_DEPTH = Limit("MAX_MODULE_DEPTH", 500)
"""Levels of submodules. Real models have under 20."""

# --- files -----------------------------------------------------------------------------------------------------------

MAX_DIRECTORY = Limit("MAX_DIRECTORY", 1 << 30)
"""Bytes of a zip's central directory. A million tensors take 70 MB."""

MAX_RECORDS = Limit("MAX_RECORDS", 10_000_000)
"""Members of one archive, each some 500 bytes of memory. A million tensors with Adam have 4 million."""

MAX_RATIO = Limit("MAX_RATIO", 32)
"""Compression ratio of a member that is read into memory. Torch's pickles have 4 to 10."""

MAX_BYTEORDER = Limit("MAX_BYTEORDER", 16, raisable=False)
"""Bytes of the record that says "little" or "big"."""

MAX_TAR_ITEMS = Limit("MAX_TAR_ITEMS", 10_000_000)
"""Storages or tensors one tar of 2016 may count: as many as a zip may have records."""

MAX_HEADER = Limit("MAX_HEADER", 100_000_000, raisable=False)
"""Bytes of a safetensors header: the reference library's own limit."""

MAX_GGUF = Limit("MAX_GGUF", 1 << 27)
"""Bytes of a GGUF header. A vocabulary of 256,000 tokens takes 10 MB."""

MAX_INDEX = Limit("MAX_INDEX", 200_000_000)
"""Bytes of an index of shards, a lock file, a schema, rules, or of JSON that lists tensors: 100 MB for a million."""

MAX_LIST = Limit("MAX_LIST", 1 << 28)
"""Bytes of a file that lists rows or tokens. The largest tokenizer.json are below 40 MB."""

# --- remote files ----------------------------------------------------------------------------------------------------

MAX_DOWNLOAD = Limit("MAX_DOWNLOAD", 1 << 26)
"""Bytes of a file of which no part can be read alone: from a server without ranges, or deflated in an archive."""

MAX_WAIT = Limit("MAX_WAIT", 30)
"""Seconds in which a server connects, and sends more of an answer; there are some tries."""

# --- tensors ---------------------------------------------------------------------------------------------------------

MAX_EXPANDED = Limit("MAX_EXPANDED", 1 << 30)
"""Bytes of a view over `MAX_EXPANSION` times its storage: a second's work. Real ones are masks of some megabytes."""

MAX_EXPANSION = Limit("MAX_EXPANSION", 64)
"""How many times the bytes of its storage a view may have, up to any size."""

# A file over one of these is no valid checkpoint (`damaged`). Plain numbers, as they are checked for every tensor.

MAX_NESTING = 127
"""Depth of nested JSON objects and arrays in a safetensors header (its library's limit), and of GGUF's arrays."""

MAX_TAR_MEMBERS = 1_000
"""Members of a tar of 2016, extended headers included. torch wrote four."""

MAX_PAX = 1 << 12
"""Bytes of an extended header of a tar's member: those of Python have a time, a size and a user's name."""

MAX_DIMS = 1_000
"""Dimensions of a tensor. torch computes with 64 at most."""

MAX_NUMEL = (1 << 63) - 1
"""Elements of a tensor, counting a dimension of size 0 as 1: more overflow torch's strides."""
