"""How much one file may ask for: every limit with its figure and its reason, and what raises it.

A `Limit` that guards memory or time is raised with ``--limit NAME=FIGURE`` or `limited`; one that is a fact of a
format, of Python or of another library is not, as nothing would be won. What reads a file asks for `Limit.now` once,
not per tensor; a thread sees what `limited` has set only in a copy of the context. SECURITY.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from ckptool.errors import LimitError, UsageError

_given: ContextVar[Mapping[str, int]] = ContextVar("limits", default=MappingProxyType({}))


class Limit:
    """A limit with its name and its default figure."""

    __slots__ = ("figure", "name", "raisable")

    def __init__(self, name: str, figure: int, *, raisable: bool = True) -> None:
        self.name, self.figure, self.raisable = name, figure, raisable
        ALL[name] = self

    def now(self) -> int:
        """Returns the figure that counts here: the one given to `limited`, else the default. Some 0.1 us."""
        return _given.get().get(self.name, self.figure)

    def passed(self, what: str, enough: int | None = None, path: str | None = None) -> LimitError:
        """Returns the error, one line: what was found, the limit, its figure, and the option that raises it.

        The option names ``enough``, or twice the figure where what would be enough is not known.
        """
        figure = self.now()
        offer = f" (--limit {self.name}={2 * figure if enough is None else enough} raises it)" if self.raisable else ""
        return LimitError(f"{what}: over {self.name}, {figure:,}{offer}", path)


ALL: dict[str, Limit] = {}
"""The limits by their names."""


@contextmanager
def limited(**figures: int) -> Iterator[None]:
    """Sets limits, as in ``limited(MAX_PICKLE=2 << 30)``, for all that is read inside ``with``; the innermost counts.

    They hold in this thread (and task of asyncio) only. Keys and data are read when they are asked for: what is done
    outside with a checkpoint that was opened inside meets the limits outside. Raises: UsageError.
    """
    for name, figure in figures.items():
        if name not in ALL or not ALL[name].raisable:
            fixed = f"the limit {name} is a fact that nothing raises" if name in ALL else f"there is no limit {name}"
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
"""By how much a memo index may pass the pickle's length: a PUT takes bytes, and the machine has room for all below."""

MAX_DIGITS = Limit("MAX_DIGITS", 4300, raisable=False)
"""Digits of an integer: Python itself will not print longer ones."""

MAX_TUPLES = Limit("MAX_TUPLES", 500, raisable=False)
"""Tuples inside tuples, which C hashes by recursion: a crash. Even repr() gives up at 1,000."""

MAX_TUPLE_ITEMS = Limit("MAX_TUPLE_ITEMS", 10_000_000)
"""Items of one tuple, and of all keys together, shared ones counted at each place: a second of hashing."""

MAX_WIDE = Limit("MAX_WIDE", 5_000)
"""Integers of eight bytes and more in one pickle: thousands can have one hash, and a dict compares them all."""

MAX_TUPLE_KEYS = Limit("MAX_TUPLE_KEYS", 5_000)
"""Tuples that are keys, in a pickle whose numbers may have one hash: -1 and -2 have, and 20 of them make a million."""

# --- trees and keys --------------------------------------------------------------------------------------------------

MAX_DEPTH = Limit("MAX_DEPTH", 2_000)
"""Containers inside containers. torch.load itself gives up near there, and paths as long as that cost their square."""

MAX_SHARED = Limit("MAX_SHARED", 500_000)
"""Nodes one walk may see again, beyond four times those it saw once: memoised pickles share subtrees 2^n-fold."""

MAX_STEPS = Limit("MAX_STEPS", 50_000_000)
"""Steps in all paths of one walk: its memory, if they are kept. A million keys with Adam have 32 million."""

MAX_KEY = Limit("MAX_KEY", 1 << 16)
"""Characters of a key: one memoised name can be every one of 2,000 steps that a key is put together from."""

MAX_KEYS = Limit("MAX_KEYS", 1 << 28)
"""Characters of all keys that are put together from names above them: a million keys have 100 million."""

MAX_LEVELS = Limit("MAX_LEVELS", 200)
"""Levels (dots) of a key. What is summed up below every prefix costs their square; real keys have under 20."""

# --- pickled models --------------------------------------------------------------------------------------------------

MAX_MODULES = Limit("MAX_MODULES", 1_000_000)
"""Modules one model may have, counting shared ones at each place."""

MAX_SHARED_PARTS = Limit("MAX_SHARED_PARTS", 20_000)
"""Modules, parameters and buffers met again because their module is shared: submodules can nest 2^n-fold."""

MAX_MODULE_DEPTH = Limit("MAX_MODULE_DEPTH", 500)
"""Levels of submodules. Real models have under 20."""

# --- files -----------------------------------------------------------------------------------------------------------

MAX_DIRECTORY = Limit("MAX_DIRECTORY", 1 << 30)
"""Bytes of a zip's central directory. A million tensors take 70 MB."""

MAX_RECORDS = Limit("MAX_RECORDS", 10_000_000)
"""Members of one archive, each some 500 bytes of memory. A million tensors with Adam have 4 million."""

MAX_RATIO = Limit("MAX_RATIO", 32)
"""How much smaller than itself a member read into memory may be stored. Pickles of torch deflate 4 to 10 fold."""

MAX_BYTEORDER = Limit("MAX_BYTEORDER", 16, raisable=False)
"""Bytes of the record that says "little" or "big"."""

MAX_TAR_ITEMS = Limit("MAX_TAR_ITEMS", 10_000_000)
"""Storages or tensors one tar of 2016 may count: as many as a zip may have records."""

MAX_HEADER = Limit("MAX_HEADER", 100_000_000, raisable=False)
"""Bytes of a safetensors header: the reference library's own limit."""

MAX_INDEX = Limit("MAX_INDEX", 200_000_000)
"""Bytes of an index of shards. A million tensors take 100 MB."""

MAX_LIST = Limit("MAX_LIST", 1 << 28)
"""Bytes of a file that lists rows or tokens. The largest tokenizer.json are below 40 MB."""

# --- tensors ---------------------------------------------------------------------------------------------------------

MAX_EXPANDED = Limit("MAX_EXPANDED", 1 << 30)
"""Bytes of a view over `MAX_EXPANSION` times its storage: a second's work. Real ones are masks of some megabytes."""

MAX_EXPANSION = Limit("MAX_EXPANSION", 64)
"""How many times the bytes of its storage a view may have, whatever they are."""

# What passes one of these is no longer a checkpoint, hence `damaged`: plain numbers, looked at for every tensor.

MAX_NESTING = 127
"""Objects and arrays inside one another in a safetensors header, the outermost counted: the library's parser's own."""

MAX_TAR_MEMBERS = 1_000
"""Members of a tar of 2016, headers of headers counted. torch wrote four."""

MAX_PAX = 1 << 12
"""Bytes of a header that says more of a tar's member: those of Python hold a time, a size and a user's name."""

MAX_DIMS = 1_000
"""Dimensions of a tensor. torch computes with 64 at most."""

MAX_NUMEL = (1 << 63) - 1
"""Elements of a tensor, counting a dimension of size 0 as 1: more overflow torch's strides."""
