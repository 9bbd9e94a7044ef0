"""Formats sizes, shapes, counts and names for display."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=4096)
def size(nbytes: float) -> str:
    """Returns bytes in decimal units: ``512 B``, ``37.6 kB``, ``4.32 GB``."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(number: float) -> str:
    """Returns a count in thousands, millions ...: ``512``, ``11.7 M``."""
    return _scaled(number, ("", "k", "M", "B", "T")).rstrip()


def _scaled(value: float, units: Sequence[str]) -> str:
    if value < 1000:
        return f"{value:.0f} {units[0]}"
    for unit in units[1:]:
        value /= 1000
        if value < 999.5 or unit == units[-1]:
            break
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def plural(number: int, noun: str) -> str:
    """Returns ``1 tensor``, ``2 tensors``, ``2 prefixes``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("x") else "s")


def dims(shape: Sequence[int] | None, scalar: str = "scalar", none: str = "nested") -> str:
    """Returns a shape: ``64x3x7x7``; ``scalar`` for no dimensions, ``none`` for no shape."""
    return none if shape is None else "x".join(map(str, shape)) or scalar


def percent(fraction: float) -> str:
    """Returns a fraction as a percentage, rounded, but 100 % only if it is exactly that."""
    text = f"{100 * fraction:.1f}"
    if text == "100.0" and fraction < 1:
        text = "99.9"
    return f"{text.removesuffix('.0') if fraction in (0, 1) else text} %"


def safe(text: str) -> str:
    """Returns text with every character that is not printable escaped.

    >>> print(safe("a\\x1b[31mb\\u202ec"))
    a\\x1b[31mb\\u202ec
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
