"""The syntax of adapters for shapes that differ: ``name[:option=value,...]``. What they do is in `partial.adapt`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptool.errors import UsageError, near
from ckptool.io.paths import given

Shape = tuple[int, ...]


class Unclear(ValueError):
    """Shapes or a file do not say, or say twice, what goes where; the message names what to add."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A parsed adapter: ``text`` is what the user wrote."""

    name: str
    text: str
    options: tuple[tuple[str, Any], ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        """Returns an option's value."""
        return dict(self.options).get(name, default)

    @property
    def rearranges(self) -> bool:
        """Returns whether it changes tensors whose shapes agree: chosen rows, a new grid, a channel map."""
        return bool({"select", "tokens", "to", "map"} & {name for name, _ in self.options})


def _one_of(*names: str) -> tuple[str, Callable[[str], Any]]:
    def check(text: str) -> str:
        if text not in names:
            raise ValueError
        return text

    return "|".join(names), check


def _size(text: str) -> Shape:
    found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
    if not found:
        raise ValueError
    return int(found[1]), int(found[2])


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text):
        raise ValueError
    return int(text)


def _channels(text: str) -> tuple[int, ...]:
    return tuple(-1 if part == "-" else _count(part) for part in text.split(","))


def _path(text: str) -> str:
    if not text or "," in text:
        raise ValueError
    return given(text)


def _two_paths(text: str) -> tuple[str, str]:
    old, new = map(_path, text.split(","))
    return old, new


_FILL = {"fill": _one_of("keep", "zero", "mean")}
_BOOL = ("true|false", {"true": True, "false": False}.__getitem__)
_RESAMPLING: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "to": ("HxW", _size),
    "mode": _one_of("bicubic", "bilinear", "linear"),
    "antialias": _BOOL,
}

ADAPTERS: Mapping[str, Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    "rows": {**_FILL, "select": ("FILE", _path), "tokens": ("OLD.json,NEW.json", _two_paths)},
    "crop": {"fill": _one_of("keep", "zero")},
    "pos-embed": {
        "prefix": ("N", _count), "grid": ("HxW", _size), **_RESAMPLING, "align_corners": _BOOL,
        "layout": _one_of("nhwc", "nchw"),
    },
    "rel-pos": {
        "extra": ("N", _count), "window": ("HxW", _size), **_RESAMPLING, "spacing": _one_of("even", "geometric"),
    },
    "patch-embed": {"mode": _one_of("bicubic", "bilinear"), "antialias": _BOOL},
    "in-chans": {"": _one_of("mean", "repeat", "sum"), "map": ("0,1,-", _channels), **_FILL},
    "inflate": {"": _one_of("mean", "center")},
}  # fmt: skip
"""{adapter: {option: (what it takes, parser)}}; the option "" is written without a name."""


def usage() -> str:
    """Returns the syntax of all adapters in one line."""
    return ", ".join(map(_usage, ADAPTERS))


def _usage(name: str) -> str:
    options = [f"{option}={takes}" if option else takes for option, (takes, _) in ADAPTERS[name].items()]
    return f"{name}[:{','.join(options)}]"


def parse(text: str) -> Adapter:
    """Returns the adapter that ``name[:option=value,...]`` describes. Raises: UsageError naming what is accepted.

    >>> parse("pos-embed:prefix=1,mode=bilinear").options, parse("in-chans:map=2,1,-,fill=zero").options
    ((('prefix', 1), ('mode', 'bilinear')), (('map', (2, 1, -1)), ('fill', 'zero')))
    """
    name, colon, rest = text.partition(":")
    if name not in ADAPTERS:
        raise UsageError(f"no adapter {text!r}{near(name, ADAPTERS)}; there are {usage()}")
    known = ADAPTERS[name]
    written: dict[str, str] = {}
    last = ""
    for item in rest.split(",") if colon else ():
        option, equals, value = item.partition("=")
        if not (equals and option):
            if last in ("map", "tokens"):  # the values of these two contain commas
                written[last] += f",{item}"
                continue
            option, value = "", item
        if option not in known or option in written:
            raise UsageError(f"{text!r}: {item!r} is not understood; it takes {_usage(name)}")
        written[option], last = value, option
    options = {}
    for option, value in written.items():
        takes, convert = known[option]
        try:
            options[option] = convert(value)
        except (ValueError, KeyError):
            raise UsageError(f"{text!r}: {option or 'it'} takes {takes}, not {value!r}") from None
    if len({"select", "tokens"} & options.keys()) > 1 or len({"", "map"} & options.keys()) > 1:
        raise UsageError(f"{text!r}: {' and '.join(option or 'a method' for option in options)} exclude each other")
    if name == "in-chans" and "fill" in options and "map" not in options:
        raise UsageError(f"{text!r}: fill needs map: it fills the channels marked -")
    if options.get("mode") == "linear" and {"grid", "window", "to", "antialias", "layout"} & options.keys():
        raise UsageError(f"{text!r}: mode=linear is along one line, without a grid and without antialias")
    if options.get("spacing") == "geometric" and {"mode", "antialias"} & options.keys():
        raise UsageError(f"{text!r}: spacing=geometric is linear between its points, without mode and antialias")
    return Adapter(name, text, tuple(options.items()))


def parse_option(text: str) -> tuple[str, Adapter]:
    """Returns (pattern, adapter) of ``KEYGLOB=ADAPTER``; a pattern may have a "=" in it. Raises: UsageError."""
    names = "|".join(map(re.escape, ADAPTERS))
    found = re.fullmatch(rf"(.+?)=((?:{names})(?::.*)?)", text, re.DOTALL)
    if not found:
        like = next(filter(None, (near(word, ADAPTERS) for word in re.findall(r"(?<=.)=([\w-]+)", text))), "")
        raise UsageError(f"{text!r} is not KEYGLOB=ADAPTER{like}; adapters are {usage()}")
    return found[1], parse(found[2])
