"""Chooses the init rule of each key: the user's, a preset's, or torch's default; names of one tensor share a draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ckptool.core import keys as names
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, Opaque, TensorInfo, computed_as
from ckptool.errors import UsageError, near
from ckptool.partial.init import Init, check_dtype, parse
from ckptool.partial.layers import NAMES, Role, read
from ckptool.partial.presets import PRESETS

Made = dict[str, tuple[TensorInfo, str]]


def plan(
    rules: Sequence[tuple[str, str]],
    presets: Sequence[str],
    tensors: Mapping[str, TensorInfo],
    wanted: Iterable[str],
    seed: int,
    classes: Mapping[str, str] | None = None,
) -> tuple[Made, list[str], list[str]]:
    """Returns ({key: (tensor with drawn values, rule)}, patterns that fit no wanted key, problems).

    ``rules`` are (key pattern, rule); the last that fits a key wins over earlier ones and over presets, of which the
    last with a row for the key wins. A key without a rule, or with ``keep``, is left out: it keeps the target's values.
    ``tensors`` are all of the target's, since the kind of a layer is inferred from siblings; ``classes`` is {module
    path: class name}. Names of one tensor get the draw of its first name, so they stay tied. Each problem is a line.
    Raises: UsageError for a rule or a preset that does not exist.
    """
    parsed = [(pattern, parse(rule)) for pattern, rule in rules]
    for preset in presets:
        if preset not in PRESETS:
            raise UsageError(f"no init preset {preset!r}{near(preset, PRESETS)}; there are {', '.join(PRESETS)}")
    ordered = dict.fromkeys(wanted)
    planner = _Plan(parsed, presets, tensors, ordered, seed, classes)
    for group in planner.groups():
        planner.decide(group)
    order = {key: planner.made[key] for key in ordered if key in planner.made}
    return order, names.unused_patterns(dict.fromkeys(pattern for pattern, _ in rules), ordered), planner.all_problems()


def is_random(tensor: TensorInfo) -> bool:
    """Returns whether the values that `plan` made depend on the seed."""
    source = tensor.source
    return isinstance(source, Derived) and source.args.kind not in ("constant", "eye", "dirac")


class _Plan:
    """Chooses a rule for every tensor, one group of tied names at a time."""

    def __init__(
        self,
        rules: Sequence[tuple[str, Init]],
        presets: Sequence[str],
        tensors: Mapping[str, TensorInfo],
        wanted: Mapping[str, None],
        seed: int,
        classes: Mapping[str, str] | None,
    ) -> None:
        self.rules, self.presets, self.tensors, self.wanted = rules, presets, tensors, wanted
        self.seed, self.classes = seed, classes
        self.made: Made = {}
        self.problems: list[str] = []
        self.unknown: list[str] = []
        self.refused: dict[str, list[str]] = {}

    def groups(self) -> Iterable[list[str]]:
        """Returns the names of each tensor of which any name is wanted, in the target's order."""
        found: dict[object, list[str]] = {}
        for key, tensor in self.tensors.items():
            found.setdefault(tensor.view if tensor.numel else key, []).append(key)
        return [group for group in found.values() if any(key in self.wanted for key in group)]

    def decide(self, group: list[str]) -> None:
        """Chooses the one rule for a tensor and all its names, and applies it."""
        keys = [key for key in group if key in self.wanted]
        roles = {key: read(key, self.tensors, self.classes) for key in keys}
        # A head that is tied to an embedding is initialised as the embedding, as models of transformers do.
        leader = min(keys, key=lambda key: _rank(roles[key]))
        explicit = [(key, rule) for key in keys if (rule := self._explicit(key))]
        if len({(rule.method, rule.args) for _, rule in explicit}) > 1:
            said = ", ".join(f"{key}={rule.text}" for key, rule in explicit)
            self.problems.append(f"one tensor under several names gets one rule: {said}")
            return
        init: Init | None = explicit[0][1] if explicit else parse("keep")
        text = explicit[0][1].text if explicit else "keep"
        if not explicit and self.presets:
            init, text = self._by_preset(leader, roles[leader])
        elif init and init.method == "default":
            init, text = self._by_default(leader, roles[leader])
        if init is None or init.method == "keep":
            return
        if len(keys) < len(group):
            others = ", ".join(key for key in group if key not in self.wanted)
            self.problems.append(f"{keys[0]} is the same tensor as {others}, which is not to be initialised")
        else:
            self._make(keys, init, text)

    def _explicit(self, key: str) -> Init | None:
        return next((init for pattern, init in reversed(self.rules) if names.fits(pattern, key)), None)

    def _by_preset(self, key: str, role: Role | None) -> tuple[Init | None, str]:
        if DTYPES[self.tensors[key].dtype].kind in ("int", "bool") and not names.is_counter(key):
            return parse("keep"), "keep"  # an index or a mask, not a weight
        for preset in reversed(self.presets):
            for fits, rule, _ in reversed(PRESETS[preset].rows):
                named = role is not None and role.name == fits
                if named or (fits not in NAMES and names.fits(fits, key)):
                    return parse(rule), f"{preset}: {rule}"
        return self._by_default(key, role)

    def _by_default(self, key: str, role: Role | None) -> tuple[Init | None, str]:
        if role is None:
            self.unknown.append(key)
            return None, ""
        return parse(role.rule), f"default: {role.rule}"

    def _make(self, keys: list[str], init: Init, text: str) -> None:
        tensor = self.tensors[keys[0]]
        if tensor.shape is None or (isinstance(tensor.source, Opaque) and tensor.kind != "meta"):
            self._refuse(f"a {tensor.kind} tensor is not initialised: keep", keys[0])
            return
        try:
            draw = init.draw(tensor.shape, self.seed, keys[0])
            check_dtype(draw, init.method, tensor.dtype)
        except UsageError as error:
            self._refuse(error.message, keys[0])
            return
        location = "cpu" if tensor.kind == "meta" else tensor.location
        source = Derived("draw", (), shape=tensor.shape, args=draw, location=location)
        made: dict[int, TensorInfo] = {}  # names of one tensor object stay names of one object
        for key in keys:
            one = self.tensors[key]
            self.made[key] = made.setdefault(id(one), computed_as(one, source)), text

    def _refuse(self, why: str, key: str) -> None:
        self.refused.setdefault(why, []).append(key)

    def all_problems(self) -> list[str]:
        """Returns all problems, a line each, with repeated blocks folded."""
        found = [f"{key}: {why}" for why, keys in self.refused.items() for key in names.ranges(keys)]
        found += self.problems
        if self.unknown:
            found.append(
                f"no default can be read from keys and shapes for {', '.join(names.ranges(self.unknown))}: "
                f"name a rule, such as '{self.unknown[0]}=normal(0,0.02)' or '{self.unknown[0]}=keep'"
            )
        return found


def _rank(role: Role | None) -> int:
    return 2 if role is None else role.name != "embedding weight"
