"""How two checkpoints' weights differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ckptool.core import keys as names
from ckptool.core import modules
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Described, TensorInfo, quantization
from ckptool.core.tree import as_mapping
from ckptool.core.versions import versions_of
from ckptool.errors import UnsupportedError, one_of
from ckptool.ops.notes import Common, diff_hint, hinted, pattern_notes, require_tensors, root_notes, wrapper_notes

if TYPE_CHECKING:
    from ckptool.core.findings import Distance, PrefixDistance

KINDS = (
    "only-in-a",
    "only-in-b",
    "renamed",
    "shape",
    "dtype",
    "values",
    "devices",
    "bookkeeping",
    "ties",
    "uncompared",
    "loadability",
)
"""The kinds of differences; all but `HARMLESS` make two checkpoints differ by default."""

HARMLESS = ("bookkeeping", "ties", "uncompared", "loadability")
"""The kinds that make no difference unless --fail-on names them."""


ORDERS: dict[str, Callable[[Any], float | None]] = {
    "rel-l2": lambda row: None if row.rel_l2 is None else -row.rel_l2,
    "max-abs": lambda row: None if row.max_abs is None else -row.max_abs,
    "cosine": lambda row: row.cosine,
    "mean-abs": lambda row: None if row.mean_abs is None else -row.mean_abs,
    "key": lambda row: 0,
}
"""What rows of values, or of prefixes, may be sorted by, ascending."""


def failing(fail_on: Sequence[str] | None) -> list[str]:
    """Returns the kinds that fail, by default those that make two checkpoints differ. Raises: UsageError."""
    if fail_on is None:
        return [kind for kind in KINDS if kind not in HARMLESS]
    return [one_of(KINDS, kind, "--fail-on") for kind in fail_on]


Compare = Callable[[TensorInfo, TensorInfo], "Distance"]
Tensors = Mapping[str, TensorInfo]
Renames = Callable[[Tensors, Tensors, Mapping[str, str]], tuple[Sequence["Renamed"], Sequence[str]]]
"""Returns (renames, notes) for the tensors that only A and only B have, and {key of A: key of B} of what both have."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A key whose shape, dtype or device differs."""

    key: str
    """The key, as in A."""
    a: Any
    """What A has."""
    b: Any
    """What B has."""


@dataclass(frozen=True, slots=True)
class ValuesChanged:
    """A key whose values differ, or are close."""

    key: str
    """The key, as in A."""
    status: str
    """``differ``, or ``close``: within the tolerances."""
    max_abs: float | None
    """The largest abs(a - b); null where not finite."""
    rel_l2: float | None
    """The L2 norm of a - b, divided by that of a; null where not finite, or where a is all zeros."""
    mean_abs: float | None
    """The mean of abs(a - b) over all elements; null where not finite."""
    cosine: float | None
    """The cosine of the angle between a and b, -1 to 1; null where not finite, or where either is all zeros."""
    by: str | None = None
    """``hash`` or ``bytes`` where only these were compared."""


@dataclass(frozen=True, slots=True)
class Renamed:
    """A tensor that B has under another name."""

    key: str
    """The key, as in A."""
    a: str
    """The key in A."""
    b: str
    """The key in B."""
    by: str
    """How that is known. ``values``: the elements are equal. ``structure``: shape, dtype, and the place in the model by
    names and order are equal; values may differ."""
    confidence: float = 1.0
    """From 0 to 1."""
    witnesses: list[str] = field(default_factory=list)
    """What speaks for it, as of the pairs of `ckptool.infer`."""


@dataclass(frozen=True, slots=True)
class TiedAway:
    """A key that only one side has, tied there to one that both have: no value is lost."""

    key: str
    """The key, as in the side that has it."""
    only_in: str
    """That side: ``a`` or ``b``."""
    tied_to: str
    """The key of the same elements, that both have."""


@dataclass(frozen=True, slots=True)
class Unloadable:
    """A key for which A's model would refuse B."""

    key: str
    """The key that the model looks for, or does not know."""
    why: str
    """What is wrong with it."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """A difference that was planned (--allow)."""

    kind: str
    """The kind of difference, as --fail-on takes it."""
    key: str
    """The key, as in the list of that kind."""
    reason: str
    """The reason in the file; may be empty."""
    entry: int
    """The number of the entry in the file, from 1."""


@dataclass(frozen=True, slots=True)
class DiffReport:
    """How the weights of A and B differ. Keys are spelled as in A, those only in B as in B."""

    same: bool
    """Nothing differs, but for what is harmless: bookkeeping, ties, and keys that could not be compared."""
    equal: int
    """Keys without any difference that was looked for."""
    only_in_a: list[str]
    """Keys that B lacks."""
    only_in_b: list[str]
    """Keys that A lacks."""
    shape: list[Changed]
    """Keys whose shapes differ; their dtypes may differ too."""
    dtype: list[Changed]
    """Keys whose dtypes differ."""
    values: list[ValuesChanged]
    """Keys whose values are close or differ."""
    devices: list[Changed]
    """With --devices: keys whose device tags differ."""
    bookkeeping: list[str]
    """The num_batches_tracked that one side lacks."""
    renamed: list[Renamed] = field(default_factory=list)
    """Keys that B has under another name; not in ``equal``, ``only_in_a`` or ``only_in_b``. Where values are compared,
    those of what was found by structure are compared too, and may be in ``values``."""
    counters: dict[str, int] = field(default_factory=dict)
    """How many num_batches_tracked only A has (``a``), and only B (``b``)."""
    compared: bool = False
    """Whether values were compared."""
    shapes: dict[str, list[int] | None] = field(default_factory=dict)
    """The shapes of the keys that one side lacks."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """The dtypes of the keys that one side lacks."""
    uncompared: list[str] = field(default_factory=list)
    """Keys whose values were to be compared, of which a side has neither values nor a hash; they are among the equal
    ones, or the renamed ones."""
    tied: list[TiedAway] = field(default_factory=list)
    """Keys that one side leaves out as they are tied in the other; not in ``only_in_a`` or ``only_in_b``."""
    loadability: list[Unloadable] = field(default_factory=list)
    """With --fail-on loadability: the keys for which ``load_state_dict(strict=True)`` of A's model would refuse B."""
    notes: list[str] = field(default_factory=list)
    """What else was noticed."""
    a: str = ""
    """The path of A."""
    b: str = ""
    """The path of B."""
    fails: list[str] = field(default_factory=list)
    """The kinds of differences found that were to fail, and were not all allowed."""
    allowed: list[Allowed] = field(default_factory=list)
    """The differences that --allow names. They stand in the lists of their kinds too."""
    rules: list[dict[str, Any]] | None = None
    """With --save-rules: the rules of `remap` that give A's keys B's names; what only A has keeps its name."""
    prefixes: list[PrefixDistance] | None = None
    """With --depth: how far what is below each prefix is apart; keys that one side lacks do not count."""

    def found(self) -> dict[str, int]:
        """Returns {kind: number of differences} for each of `KINDS`."""
        differing = [row for row in self.values if row.status == "differ"]
        keys: list[Sized] = [
            self.only_in_a,
            self.only_in_b,
            self.renamed,
            self.shape,
            self.dtype,
            differing,
            self.devices,
        ]
        rest: list[Sized] = [self.bookkeeping, self.tied, self.uncompared, self.loadability]
        return {kind: len(rows) for kind, rows in zip(KINDS, [*keys, *rest], strict=True)}


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    ignore: Sequence[str] = (),
    strip_prefix_a: Sequence[str] = (),
    strip_prefix_b: Sequence[str] = (),
    devices: bool = False,
    compare: Compare | None = None,
    by: str | None = None,
    begin: Callable[[str], None] | None = None,
    renames: Renames | None = None,
    fail_on: Sequence[str] | None = None,
    judge: Callable[[DiffReport, Callable[[str], set[str]]], DiffReport] | None = None,
) -> DiffReport:
    """Returns how the weights of two checkpoints differ; ``compare`` compares the values of two tensors of one shape.

    ``by``: of what ``compare`` compares, if not the numbers (see `ValuesChanged`). ``begin`` gets each key of both,
    as in A, before ``compare`` gets its tensors. ``renames``: see `Renames`. ``fail_on``: see `failing`.
    ``judge(report, spelled)`` returns it with what is allowed; ``spelled(key)``: its names for patterns.
    Raises: NoTensorsError if a side has none, CollisionError if two keys are equal without their prefixes.
    """
    wanted = failing(fail_on)
    (first, second), (plain_a, plain_b), owners, unwrapped, chosen = _sides(
        a, b, strip_prefix_a, strip_prefix_b, ignore
    )
    notes = [*root_notes([a, b]), *wrapper_notes(unwrapped, (a.url, first), (b.url, second))]
    notes += pattern_notes(ignore, [*plain_a, *plain_b, *first, *second, *owners.values()], "--ignore ")
    report = DiffReport(
        False, 0, [], [], [], [], [], [], [], compared=compare is not None, notes=notes, a=a.url, b=b.url
    )
    equal = ignored = 0
    counted: dict[str, list[str]] = {"a": [], "b": []}
    for side, plain_keys, others, tensors, lone in (
        ("a", plain_a, plain_b, first, report.only_in_a),
        ("b", plain_b, plain_a, second, report.only_in_b),
    ):
        for plain, key in plain_keys.items():
            if plain in others and side == "b":
                continue
            if not chosen(plain, key):
                ignored += 1
            elif plain in others:
                if begin is not None:
                    begin(key)
                equal += _same(report, key, first[key], second[plain_b[plain]], devices, compare, by)
            else:
                (counted[side] if names.is_counter(key) else lone).append(key)
                report.shapes[key], report.dtypes[key] = _shape(tensors[key]), tensors[key].dtype
        tied = _tied(tensors, lone, (key for plain, key in plain_keys.items() if plain in others))
        report.tied.extend(TiedAway(key, side, other) for key, other in tied.items())
        lone[:] = [key for key in lone if key not in tied]
    if report.uncompared and equal == len(report.uncompared) and not report.values:
        sides = (first[report.uncompared[0]], *second.values())
        raise _no_values(report.uncompared[0], next((one.described_in for one in sides if one.described_in), None))
    differ = bool(report.only_in_a and report.only_in_b)
    if renames is not None and differ:
        both = {key: plain_b[plain] for plain, key in plain_a.items() if plain in plain_b}
        alone = {key: first[key] for key in report.only_in_a + counted["a"]}
        rows, more = renames(alone, {key: second[key] for key in report.only_in_b + counted["b"]}, both)
        report.renamed.extend(rows)
        notes += more
        for side, lone in (("a", report.only_in_a), ("b", report.only_in_b)):
            gone = {getattr(row, side) for row in rows}
            for some in (lone, counted[side]):
                some[:] = [key for key in some if key not in gone]
        for row in rows:
            is_open = row.by != "values"
            if is_open and begin is not None:
                begin(row.a)
            _same(report, row.a, first[row.a], second[row.b], devices, compare if is_open else None, by)
    report.bookkeeping.extend(counted["a"] + counted["b"])
    if "loadability" in wanted:
        strict = partial(_unloadable, a, b, strip_prefix_a, strip_prefix_b)
        report.loadability.extend(strict(lambda name, key: chosen(unwrapped(name), key)))
    if ignored:
        notes.append(f"ignored: {ignored} keys")
    if differ:

        def common(
            one: Checkpoint, other: Checkpoint, strip_a: str = "", strip_b: str = "", rename: str = ""
        ) -> Common:
            before: Mapping[str, str] = {}
            if rename:
                from ckptool.ops.remap import remap_all
                from ckptool.ops.rules import parse_option

                [one], origins = remap_all([one], parse_option("rename", rename))
                before = origins[None]
            sides = _sides(one, other, [*strip_prefix_a, strip_a], [*strip_prefix_b, strip_b], ignore)
            return _common(sides, compare is not None, before)

        hint, renamed = diff_hint(a, b, common), len(report.renamed)
        if hint and (not renamed or hinted(hint) >= common(a, b).matched + renamed):  # it explains all of them
            notes.append(hint)
    counts, counters = report.found(), {side: len(some) for side, some in counted.items()}
    same = not any(counts[kind] for kind in failing(None))
    fails = [kind for kind in wanted if counts[kind]]
    report = replace(report, same=same, equal=equal, counters=counters, fails=fails)
    if judge is None:
        return report
    compared_as = {key: name for side in (plain_b, plain_a) for name, key in side.items()}
    return judge(report, lambda key: {key, compared_as.get(key, key), owners.get(key, key)})


_Row = TypeVar("_Row", "ValuesChanged", "PrefixDistance")


def by_change(rows: Iterable[_Row], order: str) -> list[_Row]:
    """Returns rows in one of `ORDERS`, the largest change first: what has no number, then by the order, then by key.

    Raises: UsageError for an order that is none.
    """
    number = ORDERS[one_of(ORDERS, order, "--sort")]

    def place(row: _Row) -> Any:
        found = number(row)
        return found is not None, found or 0, names.natural(row.key)

    return sorted(rows, key=place)


def _unloadable(
    a: Checkpoint, b: Checkpoint, strip_a: Sequence[str], strip_b: Sequence[str], chosen: Callable[[str, str], bool]
) -> Iterator[Unloadable]:
    """Yields why a model whose state_dict is A would refuse B: A's keys in order, then those that only B has.

    Wrappers are not looked through: `load_state_dict` does not. Dtypes do not matter: it casts.
    """
    first, second = ({key: value for key, (_, value) in one.entries().items()} for one in (a, b))
    one, other = names.renamed(first, strip_a, None, a.url), names.renamed(second, strip_b, None, b.url)
    versions = _versions(b)
    # what only describes tensors does not list what is no tensor
    bare = any(isinstance(value, TensorInfo) and value.described_in for value in (*first.values(), *second.values()))
    for name, key in one.items():
        wanted = first[key]
        if not chosen(name, key) or (bare and not isinstance(wanted, TensorInfo)):
            continue
        if name in other:
            if isinstance(wanted, TensorInfo) and name.rpartition(".")[2] != "_extra_state":
                why = _refusal(wanted, second[other[name]])
                yield from [Unloadable(name, why)] if why else []
        elif not names.is_counter(name):
            yield Unloadable(name, "missing in B")
        else:  # its module makes one, if B is of a version that had none
            beside = other.get(f"{name.rpartition('.')[0]}.running_mean", name)
            version = (as_mapping(versions.get(beside.rpartition(".")[0])) or {}).get("version")
            if isinstance(version, int) and version >= 2:
                yield Unloadable(name, f"missing in B, whose _metadata says version {version}")
    for name, key in other.items():
        if name not in one and chosen(name, key) and not (bare and not isinstance(second[key], TensorInfo)):
            yield Unloadable(name, "unexpected: A lacks it")


def _versions(checkpoint: Checkpoint) -> Mapping[Any, Any]:
    """Returns the ``_metadata`` of a checkpoint's state_dict; empty for none."""
    node = checkpoint.at(checkpoint.root)
    return (as_mapping(modules.metadata(node)) if modules.is_module(node) else versions_of(node)) or {}


def _refusal(wanted: TensorInfo, found: Any) -> str:
    """Returns why a parameter or buffer cannot be copied from what a checkpoint has; "" if it can."""
    if not isinstance(found, TensorInfo):
        return "no tensor in B"
    if found.shape != wanted.shape and not (wanted.shape == () and found.shape == (1,)):
        return f"shape {_shape(wanted)}, in B {_shape(found)}"
    if found.foreign:
        return f"{found.foreign} in B, which torch cannot copy"
    casts = (wanted.kind, found.kind) == ("quantized", "dense")
    if found.kind != wanted.kind and not (casts or found.described_in or wanted.kind == "meta"):
        return f"{wanted.kind}, in B {found.kind}"
    return ""


def volume(a: Checkpoint, b: Checkpoint, **options: Any) -> int:
    """Returns how many bytes, of both sides, `diff` with these options compares; reads none of them."""
    from ckptool.core.findings import Distance

    sizes: list[int] = []

    def measure(one: TensorInfo, other: TensorInfo) -> Distance:
        sizes.append(one.nbytes + other.nbytes)
        return Distance("equal")

    diff(a, b, **options, compare=measure)
    return sum(sizes)


def _tensors(checkpoint: Checkpoint) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns the tensors to compare, and {``key/path``: key} of those inside packed parameters and extra state."""
    tensors = require_tensors(checkpoint)
    owners: dict[str, str] = {}
    for key, inner in checkpoint.hidden().items():
        tensors.update((f"{key}/{path}", tensor) for path, tensor in inner.items())
        owners.update((f"{key}/{path}", key) for path in inner)
    return tensors, owners


def _tied(tensors: Mapping[str, TensorInfo], lone: Sequence[str], both: Iterable[str]) -> dict[str, str]:
    """Returns {key of ``lone``: the first key of ``both`` that is the same elements of the same memory}."""
    views = {tensors[key].view for key in lone if tensors[key].numel}
    first: dict[object, str] = {}
    for key in both if views else ():
        if tensors[key].view in views:
            first.setdefault(tensors[key].view, key)
    return {key: first[tensors[key].view] for key in lone if tensors[key].view in first}


def _same(
    report: DiffReport, key: str, one: TensorInfo, other: TensorInfo, devices: bool, compare: Compare | None,
    by: str | None,
) -> bool:  # fmt: skip
    """Adds the differences between two tensors of one key to the report; returns whether there are none."""
    plain = one.storage and other.storage and one.dtype == other.dtype and one.shape == other.shape
    if plain and not devices and compare is None:
        return True  # nearly always
    same = True
    counters = names.is_counter(key) and {one.shape, other.shape} <= {(), (1,)}
    described = one.described_in or other.described_in
    bare = "meta" in (one.kind, other.kind)
    if compare is not None:
        _refuse_bare(key, one, other)
    if (one.shape != other.shape if described or bare else one.form[1] != other.form[1]) and not counters:
        report.shape.append(Changed(key, _shape(one), _shape(other)))
        same = False
    scheme = compare is None and bool(quantization(one)) == bool(quantization(other))  # a live model does not say
    forms = (one.dtype, other.dtype) if bare else (_dtype(one, scheme), _dtype(other, scheme))
    if forms[0] != forms[1]:
        report.dtype.append(Changed(key, *forms))
        same = False
    if devices and not described and one.location != other.location:
        report.devices.append(Changed(key, one.location, other.location))
        same = False
    if described and compare is not None and same:
        status = compare(one, other).status if one.shape == other.shape else "unknown"
        if status == "unknown":
            report.uncompared.append(key)
        elif status != "equal":
            report.values.append(ValuesChanged(key, status, None, None, None, None, "hash"))
            same = False
        return same
    values = one.form == other.form or (one.shape == other.shape and {one.kind, other.kind} == {"dense", "quantized"})
    if compare is not None and (values or counters):
        distance = compare(one, other)
        if distance.status != "equal":
            found = distance.max_abs, distance.rel_l2, distance.mean_abs, distance.cosine
            report.values.append(ValuesChanged(key, distance.status, *found, by))
            same = False
    return same


def _refuse_bare(key: str, one: TensorInfo, other: TensorInfo) -> None:
    """Raises UnsupportedError if one of two tensors to compare is on meta; one that is described may have a hash."""
    if not (one.described_in or other.described_in) and "meta" in (one.kind, other.kind) and one.kind != other.kind:
        raise _no_values(key, None)


def _no_values(key: str, described: Described | None) -> UnsupportedError:
    why = f"{described.url} is {described.what}" if described else "one side is on meta"
    return UnsupportedError(f"no values of {key} to compare: {why}; leave out --values and --quick")


def _dtype(tensor: TensorInfo, parameters: bool) -> str:
    """Returns a tensor's dtype and kind; with ``parameters`` also how it is quantised, as far as headers have it."""
    if tensor.kind == "dense":
        return tensor.dtype
    scheme = quantization(tensor) if parameters else ""
    return f"{tensor.dtype} {tensor.kind}{' ' * bool(scheme)}{scheme}"


def _shape(tensor: TensorInfo) -> Any:
    if tensor.shape is None:
        return None
    return list(tensor.shape)


class _Sides(NamedTuple):
    """Both sides' ``tensors`` and ``plain`` names, {key as it is compared: key}; what `_tensors` says of ``owners``.

    ``unwrapped`` takes wrappers off; ``chosen(key as it is compared, key)``: whether it is not ignored.
    """

    tensors: tuple[dict[str, TensorInfo], dict[str, TensorInfo]]
    plain: tuple[dict[str, str], dict[str, str]]
    owners: dict[str, str]
    unwrapped: Callable[[str], str]
    chosen: Callable[[str, str], bool]


def _sides(
    a: Checkpoint, b: Checkpoint, strip_a: Sequence[str], strip_b: Sequence[str], ignore: Sequence[str]
) -> _Sides:
    (first, owners), (second, more) = _tensors(a), _tensors(b)
    owners |= more
    one, other = names.renamed(first, strip_a, None, a.url), names.renamed(second, strip_b, None, b.url)
    plain = names.looking_through(one, other)
    sides = {plain(name): key for name, key in one.items()}, {plain(name): key for name, key in other.items()}
    not_ignored = names.chooser((), ignore)

    def chosen(plain: str, key: str) -> bool:
        return not ignore or (not_ignored(plain) and not_ignored(key) and not_ignored(owners.get(key, key)))

    return _Sides((first, second), sides, owners, plain, chosen)


def in_both(a: Checkpoint, b: Checkpoint, strip_a: Sequence[str], strip_b: Sequence[str]) -> dict[str, str]:
    """Returns {key of A: key of B} of what `diff` with these prefixes takes for one key."""
    one, other = _sides(a, b, strip_a, strip_b, ()).plain
    return {key: other[name] for name, key in one.items() if name in other}


def _common(sides: _Sides, values: bool, before: Mapping[str, str]) -> Common:
    """Returns what hints ask for; ``before``: keys of A before a rename.

    Raises: UnsupportedError if ``values`` cannot be compared.
    """
    (first, second), (plain_a, plain_b), chosen = sides.tensors, sides.plain, sides.chosen
    one = {name: first[key] for name, key in plain_a.items() if chosen(name, key)}
    other = {
        name: second[key] for name, key in plain_b.items() if (name in one if name in plain_a else chosen(name, key))
    }
    both = one.keys() & other.keys()
    for name in both if values else ():
        _refuse_bare(name, one[name], other[name])
    described = [one[name].described_in or other[name].described_in for name in both] if values else []
    if described and all(found and not found.hash for found in described):
        raise _no_values(next(iter(both)), described[0])
    origins = {name: before[plain_a[name]] for name in both if plain_a[name] in before}
    return Common((one, other), len(both), len(other), len(one) + len(other) - 2 * len(both), origins)
