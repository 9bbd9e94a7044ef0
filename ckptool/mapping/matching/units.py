"""What is matched: layers and single tensors of both sides, fused ones cut, repeated blocks folded into one."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import chain
from itertools import count as counting
from math import prod

from ckptool.core.keys import is_counter
from ckptool.mapping.matching import names
from ckptool.mapping.matching.layouts import solid
from ckptool.mapping.matching.names import Segment
from ckptool.mapping.pairs import Entry

_NEARLY = 0.8
"""The share of what siblings hold that must be the same for them to be one block, repeated."""

_MANY = 32
"""Groups of one size from which on they are folded at once: what is folded may show more that is alike."""

_ENOUGH = 0.6
"""The share of what is needed that the other side must have."""

Class = tuple[str, tuple[int, ...]]
"""What may become what: "i" or "f", and the sizes without ones, sorted."""


@dataclass(slots=True)
class Item:
    """A tensor, or a piece of one that is cut."""

    key: str
    shape: tuple[int, ...]
    kind: Class
    path: tuple[str, ...]
    leaf: str
    piece: str = ""
    """How it is cut from the tensor of the key: "split:0:1/3"; "" for a whole one."""
    position: int = 0
    dim: int = 0
    """Of a piece, the dimension along which it is cut."""
    number: int = 0
    """Of a piece, which one it is."""
    count: int = 1
    """Of a piece, how many there are."""


@dataclass
class Unit:
    """A module with its tensors, or a single tensor, that stands for its copies in repeated blocks too."""

    path: tuple[str, ...]
    segments: tuple[Segment, ...]
    items: dict[str, Item]
    """The tensors by their role, or by their leaf where that is none."""
    main: Item
    """The largest of them, the first of equal ones."""
    position: int
    content: Hashable
    """What the unit holds, to find repeated blocks: units of one content have the same object."""
    copies: list[dict[str, Item]] = field(default_factory=list)
    """The items of each copy, its own first."""

    @property
    def kind(self) -> Hashable:
        """Units of one kind may become each other."""
        return self.main.kind, len(self.copies)


@lru_cache(maxsize=1 << 12)
def _content(*held: tuple[str, Class]) -> Hashable:
    return frozenset(held)


@lru_cache(maxsize=1 << 12)
def class_of(shape: tuple[int, ...], dtype: str) -> Class:
    """Returns the class of a tensor."""
    whole = dtype.startswith(("int", "uint", "bool"))
    return ("i" if whole else "f"), tuple(sorted(solid(shape)))


def is_counting(entry: Entry) -> bool:
    """Returns whether a tensor is a counter: a whole number, or BatchNorm's."""
    return entry.shape == () and (entry.dtype.startswith("int") or is_counter(entry.key))


def items_of(entries: Sequence[Entry]) -> list[Item]:
    """Returns the tensors of one side, without scalar counters, which follow their module."""
    marks = names.separators([entry.key for entry in entries])
    paths: dict[tuple[str, ...], tuple[str, ...]] = {}
    found = []
    for entry in entries:
        if is_counting(entry):
            continue
        *above, leaf = names.split(entry.key, marks)
        path, shape = tuple(above), tuple(entry.shape)
        found.append(Item(entry.key, shape, class_of(shape, entry.dtype), paths.setdefault(path, path), leaf))
    _place(found)
    return found


def _place(items: list[Item]) -> None:
    """Sets the positions: children of a module as first listed, numbered ones by number if their listing is not."""
    children: dict[int, dict[str, int]] = defaultdict(dict)  # of each module, by the last segment, and of each key
    here: dict[int, list[Item]] = defaultdict(list)
    modules: dict[tuple[str, ...], int] = {(): 0}
    numbers = counting(1)

    def below(node: int, text: str) -> int:
        inside = children[node]
        found = inside.get(text)
        if found is None:
            found = inside[text] = next(numbers)
        return found

    for item in items:
        path = item.path
        node = modules.get(path)
        if node is None:
            known = next(depth for depth in range(len(path) - 1, -1, -1) if path[:depth] in modules)
            node = modules[path[:known]]
            for depth in range(known, len(path)):
                node = modules[path[: depth + 1]] = below(node, path[depth])
        here[below(node, item.leaf)].append(item)
    place = counting()
    stack = [0]
    while stack:
        node = stack.pop()
        for item in here.get(node, ()):
            item.position = next(place)
        if node in children:
            stack += [children[node][text] for text in reversed(_ordered(list(children[node])))]


def _ordered(texts: list[str]) -> list[str]:
    """Returns the children's texts with numbered siblings in the order of their numbers."""
    if len(texts) < 2:
        return texts
    families: dict[str, list[int]] = defaultdict(list)
    numbers = {}
    for at, text in enumerate(texts):
        if (part := names.segment(text)).number >= 0:
            families[part.stem].append(at)
            numbers[at] = part.number
    ordered = list(texts)
    for places in families.values():
        for at, origin in zip(places, sorted(places, key=numbers.__getitem__), strict=True):
            ordered[at] = texts[origin]
    return ordered


# --- classes and pieces --------------------------------------------------------------------------------------------


def join_classes(source: list[Item], target: list[Item]) -> None:
    """Gives a class that one side lacks that of as many elements which lacks partners: [768, 12, 64], [768, 768]."""
    for one, other in ((source, target), (target, source)):
        counts, others = Counter(item.kind for item in one), Counter(item.kind for item in other)
        for kind in [kind for kind in counts if kind not in others]:
            size = prod(kind[1])
            near = [
                candidate for candidate, count in others.items()
                if prod(candidate[1]) == size and candidate[0] == kind[0]
                and min(len(candidate[1]), len(kind[1])) == 2 < max(len(candidate[1]), len(kind[1]))
                and set(candidate[1]) & set(kind[1])
                and count - counts[candidate] >= _ENOUGH * counts[kind]
            ]  # fmt: skip
            if len(near) == 1:
                for item in one:
                    if item.kind == kind:
                        item.kind = near[0]


QKV = ("query", "key", "value")
"""The names of three equal pieces, and of the last two of them."""

Ways = Iterator[tuple[int, list[int]]]
"""Dimensions along which a tensor can be cut, with the sizes of the pieces."""


def _template(key: str) -> str:
    return re.sub(r"\d+", "#", key)


def cut(items: list[Item], others: list[Item], words: bool = True) -> list[Item]:
    """Returns the items with tensors cut where the other side has the pieces, as siblings. One decision a template.

    Vectors are cut as the matrices of their module are.
    """
    have, want = Counter(item.kind for item in items), Counter(item.kind for item in others)
    if all(many <= want[kind] for kind, many in have.items()):
        return items
    groups: dict[tuple[str, tuple[int, ...]], list[Item]] = defaultdict(list)
    modules: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        groups[_template(item.key), item.shape].append(item)
        modules[item.path].append(item)
    cuts: dict[int, tuple[int, list[int]]] = {}
    for (_, shape), group in groups.items():
        kind = group[0].kind
        if have[kind] <= want[kind] or id(group[0]) in cuts or len(kind[1]) < 2:
            continue
        way = _best_way(kind[0], shape, len(group), have, want, others)
        if way is None:
            continue
        dim, sizes = way
        for item in group:
            cuts[id(item)] = way
            have[kind] -= 1
            have.update(_piece_class(kind[0], shape, dim, size) for size in sizes)
            for sibling in modules[item.path]:
                if sibling is not item and sibling.shape == (shape[dim],) and id(sibling) not in cuts:
                    cuts[id(sibling)] = 0, sizes
                    have[sibling.kind] -= 1
                    have.update((kind[0], (size,)) for size in sizes)
    return [
        piece for item in items for piece in (_pieces(item, *cuts[id(item)], words) if id(item) in cuts else [item])
    ]


def _best_way(
    letter: str, shape: tuple[int, ...], count: int, have: Counter[Class], want: Counter[Class], others: list[Item]
) -> tuple[int, list[int]] | None:
    """Returns how to cut ``count`` tensors of a shape so that the other side has the pieces, if there is a way."""
    best: tuple[tuple[float, int, int], int, list[int]] | None = None
    for dim, sizes in _ways(shape, want):
        pieces = Counter(_piece_class(letter, shape, dim, size) for size in sizes)
        found = min((want[piece] - have[piece]) / (number * count) for piece, number in pieces.items())
        if found >= _ENOUGH and _are_siblings(others, letter, shape, dim, sizes) >= _ENOUGH * count:
            rate = abs(found - 1), dim, len(sizes)
            if best is None or rate < best[0]:
                best = rate, dim, sizes
    return best and best[1:]


def _are_siblings(others: list[Item], letter: str, shape: tuple[int, ...], dim: int, sizes: list[int]) -> int:
    """Returns how often the pieces are siblings on the other side: q, k and v of one layer, the experts of one."""
    if len(set(sizes)) > 1:
        return len(others)
    kind = _piece_class(letter, shape, dim, sizes[0])
    families = Counter(
        (item.path[:at], item.path[at + 1 :], item.leaf)
        for item in others if item.kind == kind for at in range(len(item.path))
    )  # fmt: skip
    return sum(count >= len(sizes) for count in families.values())


def _ways(shape: tuple[int, ...], want: Iterable[Class]) -> Ways:
    """Yields the ways to cut a tensor: in 3 or 2, into all of it (experts), or in q and two smaller ones."""
    for dim, size in enumerate(shape):
        for number in (3, 2):
            if size % number == 0 and size > number:
                yield dim, [size // number] * number
        if len(shape) >= 3 and size >= 4:
            yield dim, [1] * size
        if len(shape) == 2:
            rest = shape[1 - dim]
            for _, dims in want:
                if len(dims) == 2 and rest in dims:
                    part = dims[0] if dims[1] == rest else dims[1]
                    if part and size % part == 0 and size // part > 3:
                        yield dim, [part] * (size // part)
                    if 0 < 2 * part < size - part and ("f", tuple(sorted((size - 2 * part, rest)))) in want:
                        yield dim, [size - 2 * part, part, part]


def _piece_class(letter: str, shape: tuple[int, ...], dim: int, size: int) -> Class:
    return letter, tuple(sorted(one for one in (*shape[:dim], size, *shape[dim + 1 :]) if one != 1))


def _pieces(item: Item, dim: int, sizes: list[int], words: bool) -> list[Item]:
    """Returns the pieces of an item; three are query, key and value, the two of ``kv`` the last of them."""
    found: list[Item] = []
    start = 0
    equal = len(set(sizes)) == 1
    for at, size in enumerate(sizes):
        op = f"split:{dim}:{at}/{len(sizes)}" if equal else f"slice:{dim}:{start}:{start + size}"
        start += size
        name = str(at)
        if words and len(sizes) == 3:
            name = QKV[at]
        elif words and len(sizes) == 2 and "kv" in item.path[-1:]:
            name = QKV[at + 1]
        shape = (*item.shape[:dim], size, *item.shape[dim + 1 :])
        kind = _piece_class(item.kind[0], item.shape, dim, size)
        found.append(Item(item.key, shape, kind, (*item.path, name), item.leaf, op, item.position, dim, at, len(sizes)))
    return found


# --- modules -------------------------------------------------------------------------------------------------------


def units_of(items: list[Item], words: bool = True) -> list[Unit]:
    """Returns the modules that hold nothing but what a layer has, and all other tensors one by one."""
    modules: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        modules[item.path].append(item)
    inner: set[tuple[str, ...]] = set()
    for path in modules:
        while path and (path := path[:-1]) not in inner:
            inner.add(path)
    usual: Counter[frozenset[str]] = Counter()
    if not words:
        usual.update(frozenset(item.leaf for item in module) for path, module in modules.items() if path not in inner)
    units = []
    for path, module in modules.items():
        roles = {names.role(item.leaf, words): item for item in module}
        whole = path and path not in inner and len(roles) == len(module) > 1
        if whole and not roles.keys() <= names.LAYER_ROLES:
            whole = not words and len(module) < 6 and usual[frozenset(item.leaf for item in module)] > 2
        if whole:
            units.append(_unit(path, roles))
        elif len(module) == 1 and names.role(module[0].leaf, words) in names.LAYER_ROLES:
            units.append(_unit(path or (module[0].leaf,), roles))
        else:
            units += [_unit((*path, item.leaf), {names.role(item.leaf, words): item}) for item in module]
    return sorted(units, key=lambda unit: unit.position)


def _unit(path: tuple[str, ...], items: dict[str, Item]) -> Unit:
    main, *others = items.values()
    first = main.position
    if others:
        first = min(item.position for item in items.values())
        main = max(items.values(), key=lambda item: (prod(item.shape), -item.position))
        main = items.get("weight", main) if prod(items.get("weight", main).shape) == prod(main.shape) else main
    content = _content(*((role, item.kind) for role, item in items.items()))
    return Unit(path, tuple(map(names.segment, path)), items, main, first, content, [items])


# --- repeated blocks -----------------------------------------------------------------------------------------------


Signature = frozenset[tuple[Hashable, int]]
"""How many units of each kind a block holds."""


@dataclass(slots=True)
class Group:
    """Numbered siblings with the same content: the units of it in each member, in the order of their numbers."""

    depth: int
    numbers: list[int]
    members: list[list[int]]
    dropped: list[int] = field(default_factory=list)

    def signature(self, units: Sequence[Unit]) -> Signature:
        """Returns how many units of each kind a member holds."""
        return frozenset(Counter(units[at].kind for at in self.members[0]).items())


def _groups(units: Sequence[Unit]) -> dict[Signature, list[Group]]:
    families: dict[tuple[tuple[str, ...], str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for at, unit in enumerate(units):
        for depth, part in enumerate(unit.segments):
            if part.number >= 0:
                families[unit.path[:depth], part.stem][part.number].append(at)
    found: dict[Signature, list[Group]] = defaultdict(list)
    known: dict[Hashable, int] = {}
    what = [known.setdefault((unit.content, unit.kind), len(known)) for unit in units]
    for (prefix, _), members in families.items():
        if len(members) < 2:
            continue
        depth, places = len(prefix), dict[tuple[tuple[str, ...], int], int]()
        inventories = {
            number: {
                places.setdefault((units[at].path[depth + 1 :], what[at]), len(places)): at for at in members[number]
            }
            for number in sorted(members)
        }
        for inside, common in _alike_members(inventories):
            kept = [[at for place, at in inventories[number].items() if place in common] for number in inside]
            group = Group(depth, inside, kept)
            found[group.signature(units)].append(group)
    return found


def _alike_members(inventories: dict[int, dict[int, int]]) -> Iterator[tuple[list[int], set[int]]]:
    """Yields (numbers of siblings that hold nearly the same, what all of them hold), what most hold first.

    Siblings that lack so much of what one holds have none of its rarest parts: only the others are looked at.
    """
    holders: dict[int, list[int]] = defaultdict(list)
    alike: dict[frozenset[int], list[int]] = defaultdict(list)
    for number, held in inventories.items():
        alike[frozenset(held)].append(number)
        for place in held:
            holders[place].append(number)
    left = set(inventories)
    waiting = [(-len(numbers), numbers[0], held) for held, numbers in alike.items()]
    heapify(waiting)
    while len(left) > 1:
        many, first, usual = heappop(waiting)
        numbers = [number for number in alike[usual] if number in left]
        if (-many, first) != (len(numbers), *numbers[:1]):
            if numbers:
                heappush(waiting, (-len(numbers), numbers[0], usual))
            continue
        common: set[int] = set(usual)
        inside: list[int] = []
        rarest = sorted(usual, key=lambda place: len(holders[place]))[: len(usual) // 5 + 1]
        for number in sorted(left.intersection(chain.from_iterable(holders[place] for place in rarest))):
            both = common & inventories[number].keys()
            if len(both) >= _NEARLY * max(len(usual), len(inventories[number])):
                common = both
                inside.append(number)
        if len(inside) > 1:
            yield inside, common
        left.difference_update(inside)


def fold(source: list[Unit], target: list[Unit]) -> tuple[list[Unit], list[Unit]]:
    """Returns the units with repeated blocks folded where both sides repeat them as often."""
    while found := _alike(_groups(source), _groups(target)):
        source = _folded(source, chain.from_iterable(groups for groups, _ in found))
        target = _folded(target, chain.from_iterable(groups for _, groups in found))
    return source, target


Alike = tuple[list[Group], list[Group]]
"""Groups of both sides that hold much the same and have as many members."""


def _alike(ours: dict[Signature, list[Group]], theirs: dict[Signature, list[Group]]) -> list[Alike]:
    """Returns the largest groups of both sides that are alike; of many as large, all that have no unit in common."""
    holders: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for number, other in enumerate(theirs):
        for kind, count in other:
            holders[kind].append((number, count))
    signs, groups = [*theirs], [*theirs.values()]
    rated: list[tuple[float, Alike]] = []
    for one, mine in ours.items():
        both: Counter[int] = Counter()
        for kind, count in one:
            for number, its in holders[kind]:
                both[number] += min(count, its)
        many = sum(count for _, count in one)
        for number in sorted(both):
            others = groups[number]
            sizes = {len(group.members) for group in (*mine, *others)}
            if len(sizes) > 1 and not (one == signs[number] and len(mine) == len(others) == 1):
                continue
            share = both[number] / max(many, sum(count for _, count in signs[number]))
            if share >= _ENOUGH:
                rated.append((both[number] + share + (len(sizes) == 1) / 2, (mine, others)))
    best = max((rate for rate, _ in rated), default=0.0)
    largest = [alike for rate, alike in rated if rate == best]
    taken: tuple[set[int], set[int]] = set(), set()
    found = []
    for alike in largest if len(largest) > _MANY else largest[:1]:
        inside = [{at for group in side for member in group.members for at in member} for side in alike]
        if all(mine.isdisjoint(gone) for mine, gone in zip(inside, taken, strict=True)):
            found.append(alike)
            taken[0].update(inside[0])
            taken[1].update(inside[1])
            if len({len(group.members) for side in alike for group in side}) > 1:
                _shorten(alike[0][0], alike[1][0])
    return found


def _shorten(one: Group, other: Group) -> None:
    """Keeps equal numbers of two groups, or the first ones if the numbers have nothing in common."""
    common = set(one.numbers) & set(other.numbers)
    count = min(len(one.numbers), len(other.numbers))
    for group in (one, other):
        kept = [
            at for at, number in enumerate(group.numbers)
            if (number in common if len(common) == count else at < count)
        ]  # fmt: skip
        group.dropped = [unit for at, inside in enumerate(group.members) if at not in kept for unit in inside]
        group.members = [group.members[at] for at in kept]


def _folded(units: list[Unit], groups: Iterable[Group]) -> list[Unit]:
    """Returns the units with the first member of each group standing for all of them."""
    gone: set[int] = set()
    for group in groups:
        gone.update(group.dropped)
        first: dict[Hashable, Unit] = {}
        for member, inside in enumerate(group.members):
            for at in inside:
                rest = units[at].path[group.depth + 1 :], units[at].content
                if member == 0:
                    first[rest] = units[at]
                else:
                    first[rest].copies += units[at].copies
                    gone.add(at)
    return [unit for at, unit in enumerate(units) if at not in gone]
