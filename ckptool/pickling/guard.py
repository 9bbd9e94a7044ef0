"""Bounds how deep and how often the tuples of a pickle nest, as hashing them can crash or hang CPython's C unpickler.

A tuple that is a key is hashed in C: recursively, without a depth limit and without a cache. So 200,000 nested
tuples overflow the C stack, and 64 of which each contains the one before twice take years. torch.load crashes or
hangs on both. Frozensets count as tuples: comparing two compares their items.

Nearly all tuples of an ordinary pickle are of a kind that cannot nest (`ckptool.pickling.load` recognises them by a
regular expression), so it counts the others: a few cannot nest deep, and without a GET of a tuple no tuple
is in two others. Only where that proves nothing does `check` simulate every opcode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptool.limits import MAX_TUPLE_ITEMS, MAX_TUPLE_KEYS, MAX_TUPLES

Size = tuple[int, int]
"""Of a value: (number of items, shared ones counted each time; depth of nested tuples)."""

_ATOM: Size = (1, 0)


def _tuple_of(items: list[Size], deepest: int, most: int) -> Size:
    size, depth = 1 + sum(size for size, _ in items), 1 + max((depth for _, depth in items), default=0)
    if depth > deepest:
        raise MAX_TUPLES.passed("tuples are nested too deep")
    if size > most:
        raise MAX_TUPLE_ITEMS.passed("a tuple has too many items, shared ones counted each time")
    return size, depth


_POPS = {**dict.fromkeys(b"ab", (1, 0)), **dict.fromkeys(b"RQ\x81\x93", (2, 1)), ord("Q"): (1, 1), 0x92: (3, 1)}
"""Opcodes that pop values -> (how many they pop, how many they push)."""

_NOTHING = frozenset(b"\x80\x95.")


def check(opcodes: Iterable[tuple[int, int]], alike: bool = False) -> None:
    """Raises LimitError if tuples are nested or shared too much to be hashed; ``opcodes`` are (opcode, memo index).

    ``alike``: the pickle may have different numbers of one hash, and so many tuples of one hash: fewer may be keys.

    Simulates the unpickler's stack, marks and memo with only the size of each value. Returns where the stack
    underflows, as the unpickler will fail there. Cost: about 0.5 us per opcode.
    """
    stack: list[Size] = []
    marked: list[list[Size]] = []
    memo: dict[int, Size] = {}
    hashed = tuples = 0
    fewest = MAX_TUPLE_KEYS.now()
    deepest, most = MAX_TUPLES.now(), MAX_TUPLE_ITEMS.now()
    try:
        for opcode, index in opcodes:
            keys: Sequence[Size] = ()
            if opcode in b"qrp":
                memo[index] = stack[-1]
            elif opcode in b"hjg":
                stack.append(memo.get(index, _ATOM))
            elif opcode == 0x94:
                memo[len(memo)] = stack[-1]
            elif opcode in b"\x85\x86\x87":
                count = opcode - 0x84
                items = [stack.pop() for _ in range(count)]
                stack.append(_tuple_of(items, deepest, most))
            elif opcode == ord("("):
                marked.append(stack)
                stack = []
            elif opcode in b"tlod1eu\x90\x91":
                items, stack = stack, marked.pop()
                if opcode in b"tlod\x91":
                    stack.append(_tuple_of(items, deepest, most) if opcode in b"t\x91" else _ATOM)
                keys = items[::2] if opcode in b"du" else items if opcode in b"\x90\x91" else ()
            elif opcode == ord("i"):
                stack = [*marked.pop(), _ATOM]
            elif opcode == ord("s"):
                stack.pop()
                keys = [stack.pop()]
            elif opcode == ord("0"):
                if stack:
                    stack.pop()
                else:
                    stack = marked.pop()
            elif opcode == ord("2"):
                stack.append(stack[-1])
            elif opcode in _POPS:
                pops, pushes = _POPS[opcode]
                for _ in range(pops):
                    stack.pop()
                stack += [_ATOM] * pushes
            elif opcode not in _NOTHING:
                stack.append(_ATOM)
            if not keys:
                continue
            hashed += sum(size for size, _ in keys)
            tuples += sum(depth > 0 for _, depth in keys)
            if alike and tuples > fewest:
                raise MAX_TUPLE_KEYS.passed("too many tuples are keys, of numbers that may have one hash")
            if hashed > most:
                raise MAX_TUPLE_ITEMS.passed("its keys have too many items, shared ones counted each time")
    except IndexError:
        return
