"""Init rules for tensors that are not loaded, named like the functions of torch.nn.init.

A rule is text (``kaiming_normal(mode=fan_out)``). `parse` makes an `Init` of it, and `Init.draw` makes a `Draw` of that
for a shape, a seed and a key; `ckptool.values.random_init` computes its bytes. `initplan` does so for all keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, isfinite, sqrt
from typing import Any

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Draw, DrawKind
from ckptool.errors import UsageError, near
from ckptool.partial.layers import Shape, fans
from ckptool.text import dims


@dataclass(frozen=True, slots=True)
class Init:
    """A rule as the user wrote it (``text``), and its meaning: a method of torch.nn.init with all its arguments."""

    method: str
    args: tuple[Any, ...]
    text: str

    def draw(self, shape: Shape, seed: int, key: str) -> Draw:
        """Returns the recipe for a tensor. Raises: UsageError for a shape that torch refuses too."""
        kind, numbers = _RESOLVE[self.method](self, shape)
        if 0 in shape:  # torch: "Initializing zero-element tensors is a no-op"
            kind, numbers = "constant", (0.0,)
        return Draw(kind, numbers, shape, seed, key)


# --- syntax of rules ---------------------------------------------------------------------------------------

METHODS: Mapping[str, tuple[tuple[str, str, str | None], ...]] = {
    "keep": (),
    "default": (),
    "uniform": (("a", "number", "0"), ("b", "number", "1")),
    "normal": (("mean", "number", "0"), ("std", "scale", "1")),
    "trunc_normal": (("mean", "number", "0"), ("std", "positive", "1"), ("a", "number", "-2"), ("b", "number", "2")),
    "constant": (("val", "number", None),),
    "ones": (),
    "zeros": (),
    "eye": (),
    "dirac": (("groups", "count", "1"),),
    "xavier_uniform": (("gain", "gain", "1"),),
    "xavier_normal": (("gain", "gain", "1"),),
    "kaiming_uniform": (("a", "number", "0"), ("mode", "mode", "fan_in"), ("nonlinearity", "name", "leaky_relu")),
    "kaiming_normal": (("a", "number", "0"), ("mode", "mode", "fan_in"), ("nonlinearity", "name", "leaky_relu")),
    "orthogonal": (("gain", "any gain", "1"),),
    "sparse": (("sparsity", "fraction", None), ("std", "scale", "0.01")),
}
"""{method: its arguments in order}: name, kind of value, default (None: required)."""

_LINEAR = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_GAINS = {
    **dict.fromkeys((*_LINEAR, "sigmoid"), 1.0), "tanh": 5 / 3, "relu": sqrt(2.0), "leaky_relu": None, "selu": 3 / 4
}  # fmt: skip

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?")
_ROOT = re.compile(r"([+-]?)sqrt\((\d+\.?\d*|\.\d+)\)")


def calculate_gain(nonlinearity: str, slope: float = 0.01) -> float:
    """Returns what `torch.nn.init.calculate_gain` does; ``slope`` is used for leaky_relu only."""
    gain = _GAINS[nonlinearity]
    return sqrt(2.0 / (1 + slope * slope)) if gain is None else gain


def _number(text: str) -> float:
    root = _ROOT.fullmatch(text)
    if root:
        found = sqrt(float(root[2])) * (-1 if root[1] == "-" else 1)
    elif _NUMBER.fullmatch(text):
        found = float(text)
    else:
        raise ValueError
    return _checked(found, isfinite(found))


def _checked(value: float, valid: bool) -> float:
    if not valid:
        raise ValueError
    return value


def _gain(text: str) -> float:
    word, colon, slope = text.partition(":")
    if word not in _GAINS or (colon and word != "leaky_relu"):
        return _number(text)
    return calculate_gain(word, _number(slope) if colon else 0.01)


def _word(text: str, known: Iterable[str]) -> str:
    if text not in known:
        raise ValueError
    return text


_NAMES = "linear, conv1d and kin, sigmoid, tanh, relu, leaky_relu or selu"

_VALUES: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "number": (_number, "a number"),
    "scale": (lambda text: _checked(value := _number(text), value >= 0), "a number, 0 or more"),
    "positive": (lambda text: _checked(value := _number(text), value > 0), "a number over 0"),
    "fraction": (lambda text: _checked(value := _number(text), 0 <= value <= 1), "a number from 0 to 1"),
    "count": (
        lambda text: int(_checked(value := _number(text), text.isdecimal() and value >= 1)),
        "a whole number over 0",
    ),
    "gain": (lambda text: _checked(value := _gain(text), value >= 0), f"a number, 0 or more, or {_NAMES}"),
    "any gain": (_gain, f"a number, or {_NAMES}"),
    "mode": (lambda text: _word(text.lower(), ("fan_in", "fan_out")), "fan_in or fan_out"),
    "name": (lambda text: _word(text, _GAINS), _NAMES),
}


def usage(method: str) -> str:
    """Returns the signature of a rule with its defaults.

    >>> usage("sparse"), usage("ones")
    ('sparse(sparsity,std=0.01)', 'ones')
    """
    args = [name if default is None else f"{name}={default}" for name, _, default in METHODS[method]]
    return f"{method}({','.join(args)})" if args else method


@lru_cache(maxsize=512)
def parse(text: str) -> Init:
    """Returns the rule for a text: ``normal(0,0.01)``, ``kaiming_normal_(mode='fan_out')``, ``zeros``.

    torch's trailing underscore and quotes are accepted, ``sqrt(5)`` is a number.
    Raises: UsageError, whose message says what is accepted.
    """
    found = re.fullmatch(r"\s*([A-Za-z]\w*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    method = found[1].removesuffix("_") if found else ""
    if found is None or method not in METHODS:
        raise UsageError(f"no init rule {text!r}{near(method, METHODS)}; there are {', '.join(map(usage, METHODS))}")
    signature = METHODS[method]
    given: dict[str, str] = {}
    pieces = [piece.strip() for piece in (found[2] or "").split(",")]
    for position, piece in enumerate(pieces if pieces != [""] else []):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not equals and position >= len(signature):
            raise UsageError(f"{text}: {len(signature) or 'no'} arguments at most: {usage(method)}")
        if not equals:
            if any("=" in earlier for earlier in pieces[:position]):
                raise UsageError(f"{text}: arguments without a name come first: {usage(method)}")
            name, value = signature[position][0], name
        if name in given or name not in [one for one, _, _ in signature]:
            wrong = (
                "is given twice" if name in given else f"is no argument{near(name, [one for one, _, _ in signature])}"
            )
            raise UsageError(f"{text}: {name!r} {wrong}: {usage(method)}")
        given[name] = value
    args = []
    for name, kind, default in signature:
        value_text = given.get(name, default)
        convert, expected = _VALUES[kind]
        if value_text is None:
            raise UsageError(f"{text}: {name} is missing ({expected}): {usage(method)}")
        quoted = re.fullmatch(r"(['\"])(.*)\1", value_text)
        try:
            args.append(convert(quoted[2] if quoted else value_text))
        except ValueError:
            raise UsageError(f"{text}: {name} is {expected}, not {value_text!r}: {usage(method)}") from None
    _check_interval(method, args, text)
    return Init(method, tuple(args), text.strip())


def parse_option(text: str) -> tuple[str, str]:
    """Returns (key pattern, rule) of ``KEYGLOB=RULE``; the pattern may contain ``=``.

    >>> parse_option("fc.*=normal(std=0.01)")
    ('fc.*', 'normal(std=0.01)')
    """
    found = re.fullmatch(r"(.+)=\s*([A-Za-z]\w*\s*(?:\((?:[^()]|\([^()]*\))*\))?)\s*", text, re.DOTALL)
    if found is None:
        raise UsageError(f"--init takes KEYGLOB=RULE, such as 'fc.*=normal(0,0.01)', not {text!r}")
    parse(found[2])
    return found[1], found[2]


FAR = 37.0
"""Standard deviations from the mean beyond which a normal's probability underflows a double."""


def _check_interval(method: str, args: list[Any], text: str) -> None:
    if method == "uniform" and args[0] > args[1]:
        raise UsageError(f"{text}: a is {args[0]:g}, over b: {usage(method)}")
    if method == "trunc_normal":
        mean, std, a, b = args
        if a >= b:
            raise UsageError(f"{text}: a is {a:g}, and b is not over it: {usage(method)}")
        if (a - mean) / std > FAR or (b - mean) / std < -FAR:
            raise UsageError(f"{text}: from {a:g} to {b:g} is over {FAR:g} std from the mean; uniform({a:g},{b:g})?")


# --- rules for a shape ---------------------------------------------------------------------------------

Resolved = tuple[DrawKind, tuple[float, ...]]


def _fans(init: Init, shape: Shape) -> tuple[int, int]:
    found = fans(shape)
    if found is None:
        raise UsageError(f"{init.method} needs two dimensions or more, and it is {dims(shape, 'a scalar')}")
    return found if 0 not in shape else (1, 1)


def _xavier(init: Init, shape: Shape) -> Resolved:
    std = init.args[0] * sqrt(2.0 / sum(_fans(init, shape)))
    if init.method == "xavier_normal":
        return "normal", (0.0, std)
    return "uniform", (-sqrt(3.0) * std, sqrt(3.0) * std)


def _kaiming(init: Init, shape: Shape) -> Resolved:
    slope, mode, nonlinearity = init.args
    fan = _fans(init, shape)[mode == "fan_out"]
    std = calculate_gain(nonlinearity, slope) / sqrt(fan)
    if init.method == "kaiming_normal":
        return "normal", (0.0, std)
    return "uniform", (-sqrt(3.0) * std, sqrt(3.0) * std)


def _orthogonal(init: Init, shape: Shape) -> Resolved:
    _fans(init, shape)
    return "orthogonal", init.args


def _two(init: Init, shape: Shape) -> Resolved:
    if len(shape) != 2:
        raise UsageError(f"{init.method} needs two dimensions, and it is {dims(shape, 'a scalar')}")
    if init.method == "eye":
        return "eye", ()
    sparsity, std = init.args
    return "sparse", (ceil(sparsity * shape[0]), std)


def _dirac(init: Init, shape: Shape) -> Resolved:
    groups = init.args[0]
    if len(shape) not in (3, 4, 5):
        raise UsageError(f"dirac needs three to five dimensions, and it is {dims(shape, 'a scalar')}")
    if shape[0] % groups:
        raise UsageError(
            f"dirac needs a first size that is a multiple of groups={groups}, and it is {dims(shape, 'a scalar')}"
        )
    return "dirac", init.args


_RESOLVE: Mapping[str, Callable[[Init, Shape], Resolved]] = {
    "uniform": lambda init, shape: ("uniform", init.args),
    "normal": lambda init, shape: ("normal", init.args),
    "trunc_normal": lambda init, shape: ("trunc_normal", init.args),
    "constant": lambda init, shape: ("constant", init.args),
    "ones": lambda init, shape: ("constant", (1.0,)),
    "zeros": lambda init, shape: ("constant", (0.0,)),
    "eye": _two, "sparse": _two, "dirac": _dirac, "orthogonal": _orthogonal,
    "xavier_uniform": _xavier, "xavier_normal": _xavier, "kaiming_uniform": _kaiming, "kaiming_normal": _kaiming,
}  # fmt: skip

_MAX = {"float16": 65504.0, "bfloat16": (2 - 2**-7) * 2.0**127, "float32": (2 - 2**-23) * 2.0**127,
        "float64": (2 - 2**-52) * 2.0**1023}  # fmt: skip

_REACH = 9.0
"""Standard deviations that a normal exceeds once in 10^18 numbers."""


def check_dtype(draw: Draw, method: str, dtype: str) -> None:
    """Raises UsageError if the dtype cannot represent the values of a draw."""
    row, value = DTYPES[dtype], draw.numbers[0] if draw.numbers else 0.0
    if row.kind in ("int", "bool"):
        if draw.kind != "constant":
            raise UsageError(f"{method} makes fractions, and it is {dtype}: zeros, ones, constant(N) or keep")
        signed = row.kind == "int" and not dtype.startswith("u")
        top = 1 if row.kind == "bool" else min((1 << (row.bits - signed)) - 1, 1 << 53)
        if value != int(value) or not (-top - 1 if signed else 0) <= value <= top:
            raise UsageError(f"{dtype} has no value {value:g}")
        return
    if dtype not in _MAX:
        raise UsageError(f"{dtype} values are not made here, only {', '.join(_MAX)}, integers and bool")
    if _reach(draw) > _MAX[dtype]:
        raise UsageError(f"{method} makes values that {dtype} cannot hold")


def _reach(draw: Draw) -> float:
    """Returns an upper bound of the values' magnitude."""
    numbers = draw.numbers
    if draw.kind == "normal":
        return abs(numbers[0]) + _REACH * numbers[1]
    if draw.kind == "sparse":
        return _REACH * numbers[1]
    if draw.kind == "uniform":  # torch requires the width to be finite in the dtype too
        return max(abs(numbers[0]), abs(numbers[1]), numbers[1] - numbers[0])
    if draw.kind == "trunc_normal":
        return max(abs(numbers[2]), abs(numbers[3]))
    return 1.0 if draw.kind in ("dirac", "eye") else abs(numbers[0])
