"""Harder versions of a pair: what another code base might do to it, one change at a time.

A set is a function of a pair and a random generator; it gives a pair, or None where the pair has nothing of the kind.
Its docstring says what it does, and where two answers are equally right.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from random import Random

from .inverse import inverse
from .pairs import Entry, Made, Pair

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_DIGITS = re.compile(r"\d+")
_NUMBERED = re.compile(r"(.*?)(\d+)")

Set = Callable[[Pair, Random], Pair | None]


def stress(name: str, pair: Pair) -> Pair | None:
    """The pair as the set of that name has it: always the same."""
    return SETS[name](pair, Random(f"{name} {pair.name}"))


# What the sets are made of


def _renamed(pair: Pair, source: Callable[[str], str] = str, target: Callable[[str], str] = str) -> Pair:
    """The pair with other names on either side."""

    def entries(old: list[Entry], name: Callable[[str], str]) -> list[Entry]:
        new = [entry._replace(key=name(entry.key)) for entry in old]
        assert len({entry.key for entry in new}) == len(new), "two keys of one name"
        return new

    def mapping(old: dict[str, Made]) -> dict[str, Made]:
        return {target(key): Made(tuple(map(source, made.sources)), made.op) for key, made in old.items()}

    return replace(
        pair,
        source=entries(pair.source, source),
        target=entries(pair.target, target),
        mapping=mapping(pair.mapping),
        source_ties=[[source(key) for key in group] for group in pair.source_ties],
        target_ties=[[target(key) for key in group] for group in pair.target_ties],
        doubtful=frozenset(map(target, pair.doubtful)),
        mismatched=[(target(one), source(other)) for one, other in pair.mismatched],
        alternatives=[mapping(old) for old in pair.alternatives],
    )


def _kept(pair: Pair, source: Callable[[str], bool] = bool, target: Callable[[str], bool] = bool) -> Pair:
    """The pair without the keys for which a side says no. What has lost a source has none, but for tied ones."""
    left = {entry.key for entry in pair.source if source(entry.key)}
    ties = {key: [other for other in group if other in left] for group in pair.source_ties for key in group}

    def still(key: str) -> str | None:
        return key if key in left else next(iter(ties.get(key, [])), None)

    def mapping(old: dict[str, Made]) -> dict[str, Made]:
        new = {}
        for key, made in old.items():
            sources = tuple(one for one in map(still, made.sources) if one is not None)
            if target(key) and len(sources) == len(made.sources):
                new[key] = Made(sources, made.op)
        return new

    return replace(
        pair,
        source=[entry for entry in pair.source if entry.key in left],
        target=[entry for entry in pair.target if target(entry.key)],
        mapping=mapping(pair.mapping),
        source_ties=[group for old in pair.source_ties if len(group := [key for key in old if key in left]) > 1],
        target_ties=[group for old in pair.target_ties if len(group := list(filter(target, old))) > 1],
        doubtful=frozenset(filter(target, pair.doubtful)),
        mismatched=[(one, other) for one, other in pair.mismatched if target(one) and other in left],
        alternatives=[mapping(old) for old in pair.alternatives],
    )


def _new_words(random: Random, old: Iterable[str], taken: set[str]) -> dict[str, str]:
    """A random word for each."""
    new: dict[str, str] = {}
    for word in sorted(set(old)):
        while True:
            made = "".join(
                random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(random.randint(2, 4))
            )
            if made not in taken:
                break
        taken.add(made)
        new[word] = made
    return new


def _words(entries: list[Entry]) -> set[str]:
    return {word for entry in entries for word in _WORD.findall(entry.key)}


def _spelt(words: dict[str, str], keep_last: bool = False) -> Callable[[str], str]:
    def name(key: str) -> str:
        last = max(key.rfind("."), key.rfind("/")) + 1 if keep_last else len(key)
        return _WORD.sub(lambda match: words.get(match[0], match[0]), key[:last]) + key[last:]

    return name


def _template(path: str) -> str:
    return _DIGITS.sub("#", path)


# The sets


def plain(pair: Pair, random: Random) -> Pair:
    """as it is"""
    return pair


def reverse(pair: Pair, random: Random) -> Pair:
    """from the target to the source; pieces of which one has no partner make no whole"""
    return inverse(pair)


def words_shared(pair: Pair, random: Random) -> Pair:
    """every word a random one, the same on both sides"""
    words = _new_words(random, _words(pair.source) | _words(pair.target), set())
    return _renamed(pair, _spelt(words), _spelt(words))


def words_apart(pair: Pair, random: Random) -> Pair:
    """every word a random one, another on either side; only numbers, order and shapes are left.
    Where these leave two answers, only order tells, and it is counted"""
    taken: set[str] = set()
    source, target = (_spelt(_new_words(random, _words(side), taken)) for side in (pair.source, pair.target))
    return _renamed(pair, source, target)


def words_apart_but_last(pair: Pair, random: Random) -> Pair:
    """the same, but the last segment of every key is kept"""
    taken: set[str] = set()
    source, target = (_spelt(_new_words(random, _words(side), taken), True) for side in (pair.source, pair.target))
    return _renamed(pair, source, target)


def words_half(pair: Pair, random: Random) -> Pair:
    """half the words of the source are random ones"""
    words = sorted(_words(pair.source))
    some = random.sample(words, len(words) // 2)
    return _renamed(pair, _spelt(_new_words(random, some, _words(pair.source) | _words(pair.target))))


def source_shuffled(pair: Pair, random: Random) -> Pair:
    """the source is listed in random order"""
    return replace(pair, source=random.sample(pair.source, len(pair.source)))


def target_shuffled(pair: Pair, random: Random) -> Pair:
    """the target is listed in random order"""
    return replace(pair, target=random.sample(pair.target, len(pair.target)))


def source_sorted(pair: Pair, random: Random) -> Pair:
    """the source is listed alphabetically: layer.10 before layer.2"""
    return replace(pair, source=sorted(pair.source))


def modules_shuffled(pair: Pair, random: Random) -> Pair:
    """the children of every module of the source are listed in another order, alike in every block; numbers stay"""

    def walk(entries: list[tuple[list[str], Entry]], depth: int) -> list[Entry]:
        children: dict[str, list[tuple[list[str], Entry]]] = {}
        for segments, entry in entries:
            children.setdefault(segments[depth], []).append((segments, entry))
        at = _template(".".join(entries[0][0][:depth]))
        names = sorted(children, key=lambda name: Random(f"{seed} {at} {name}").random())
        # Siblings that differ by a number stay in their order, in the slots that they have now.
        families: dict[str, list[str]] = {}
        for name in children:
            stem = _NUMBERED.fullmatch(name)
            families.setdefault(stem[1] + "#" if stem else name, []).append(name)
        turn = {family: iter(members) for family, members in families.items()}
        out = []
        for name in names:
            stem = _NUMBERED.fullmatch(name)
            name = next(turn[stem[1] + "#" if stem else name])
            leaves = [(segments, entry) for segments, entry in children[name] if len(segments) == depth + 1]
            deeper = [(segments, entry) for segments, entry in children[name] if len(segments) > depth + 1]
            out += [entry for _, entry in leaves]
            if deeper:
                out += walk(deeper, depth + 1)
        return out

    seed = random.random()
    return replace(pair, source=walk([(re.split("[./]", entry.key), entry) for entry in pair.source], 0))


def equal_shapes(pair: Pair, random: Random) -> Pair:
    """every tensor of both sides has the same shape, so that shapes say nothing. Tensors in pieces are left out; heads
    of another number of classes now fit"""
    pieces = {
        key
        for key, made in pair.mapping.items()
        if len(made.sources) > 1 or re.search("split|slice|stride|gather", made.op)
    }
    gone = pieces | {key for piece in pieces for key in pair.mapping[piece].sources}
    pair = _kept(pair, lambda key: key not in gone, lambda key: key not in pieces)

    def flat(entries: list[Entry]) -> list[Entry]:
        return [entry._replace(shape=(64, 64)) for entry in entries]

    mapping = {key: Made(made.sources, "rename") for key, made in pair.mapping.items()}
    mapping |= {one: Made((other,), "rename") for one, other in pair.mismatched}
    return replace(pair, source=flat(pair.source), target=flat(pair.target), mapping=mapping, mismatched=[])


def _copies(pair: Pair, random: Random) -> tuple[str, str]:
    one, other = _new_words(random, ["a", "b"], _words(pair.source) | _words(pair.target)).values()
    return f"{one}.", f"{other}."


def copy_of_source(pair: Pair, random: Random) -> Pair:
    """the source twice, under two random prefixes, as with EMA weights; only the first is true. Nothing but the order
    of the copies tells which: the right answer is none, and a guess counts as it falls"""
    one, other = _copies(pair, random)
    first, second = (_renamed(pair, lambda key, prefix=prefix: prefix + key) for prefix in (one, other))
    return replace(first, source=first.source + second.source, source_ties=first.source_ties + second.source_ties)


def copy_of_source_either(pair: Pair, random: Random) -> Pair:
    """the same pairs; taking all from the second copy is right too, since the two differ in a random word alone. A
    mixture is wrong"""
    both = copy_of_source(pair, Random(f"ema {pair.name}"))
    one, other = both.source[0].key.split(".")[0] + ".", both.source[-1].key.split(".")[0] + "."
    second = {
        key: Made(tuple(other + source.removeprefix(one) for source in made.sources), made.op)
        for key, made in both.mapping.items()
    }
    return replace(both, alternatives=[second])


def copy_of_target(pair: Pair, random: Random) -> Pair:
    """the target twice, under two random prefixes; only the first has a source. As above, the right answer is none"""
    one, other = _copies(pair, random)
    first, second = (_renamed(pair, target=lambda key, prefix=prefix: prefix + key) for prefix in (one, other))
    return replace(first, target=first.target + second.target, doubtful=first.doubtful | second.doubtful)


def copy_of_target_either(pair: Pair, random: Random) -> Pair:
    """the same pairs; filling the second copy is right too. Filling both, or a mixture, is wrong"""
    both = copy_of_target(pair, Random(f"tower {pair.name}"))
    one, other = both.target[0].key.split(".")[0] + ".", both.target[-1].key.split(".")[0] + "."
    second = {other + key.removeprefix(one): made for key, made in both.mapping.items()}
    ties = [[other + key.removeprefix(one) for key in group] for group in both.target_ties]
    return replace(both, alternatives=[second], target_ties=both.target_ties + ties)


def _module(key: str) -> str:
    """The template of the module that holds a key; segments end with a dot, or a slash as in JAX."""
    return _template(key[: max(key.rfind("."), key.rfind("/")) + 1])


def _without(entries: list[Entry], random: Random, share: float) -> Callable[[str], bool]:
    modules = sorted({_module(entry.key) for entry in entries})
    gone = set(random.sample(modules, round(share * len(modules))))
    return lambda key: _module(key) not in gone


def source_lacks(pair: Pair, random: Random) -> Pair:
    """30 % of the modules are missing in the source, in every block alike"""
    return _kept(pair, _without(pair.source, random, 0.3))


def target_lacks(pair: Pair, random: Random) -> Pair:
    """30 % of the modules are missing in the target"""
    return _kept(pair, target=_without(pair.target, random, 0.3))


def both_lack(pair: Pair, random: Random) -> Pair:
    """30 % of the modules are missing in the source, and 30 % of the target's, others"""
    return _kept(pair, _without(pair.source, random, 0.3), _without(pair.target, random, 0.3))


def false_friends(pair: Pair, random: Random) -> Pair | None:
    """two modules of equal shapes side by side in the source swap their names, in every block. Names lead astray, and
    only the order of the listing contradicts: where both sides had the same names a person would be misled too. So
    following the names is as right as following the order; a mixture is wrong"""
    inside: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
    for entry in pair.source:
        segments = entry.key.split(".")
        for depth in range(len(segments) - 1):
            parent, child, rest = ".".join(segments[:depth]), segments[depth], ".".join(segments[depth + 1 :])
            inside.setdefault(parent, {}).setdefault(child, {})[rest] = entry.shape
    used = {key for made in pair.mapping.values() for key in made.sources}
    parents: dict[str, list[str]] = {}
    for parent in inside:
        parents.setdefault(_template(parent), []).append(parent)
    found = []
    for template, instances in parents.items():
        names = sorted({child for parent in instances for child in inside[parent] if not child.isdigit()})
        for number, one in enumerate(names):
            for other in names[number + 1 :]:
                both = [parent for parent in instances if one in inside[parent] or other in inside[parent]]
                alike = all(inside[parent].get(one) == inside[parent].get(other) for parent in both)
                if alike and any(
                    f"{parent}.{one}.{rest}".strip(".") in used for parent in both for rest in inside[parent][one]
                ):
                    found.append((template, one, other))
    if not found:
        return None
    template, one, other = random.choice(found)
    depth = len(template.split(".")) if template else 0

    def name(key: str) -> str:
        segments = key.split(".")
        if (
            len(segments) > depth + 1
            and _template(".".join(segments[:depth])) == template
            and segments[depth] in (one, other)
        ):
            segments[depth] = other if segments[depth] == one else one
        return ".".join(segments)

    return replace(_renamed(pair, name), alternatives=[pair.mapping])


def numbers_reversed(pair: Pair, random: Random) -> Pair | None:
    """the numbers of one family of the source run backwards, in the listing too. Only families that differ from
    themselves read backwards: nobody could see a run of equal blocks turn around. Where some differ, they show the
    direction of all; yet equal blocks side by side may be taken in the order of their numbers too, in all such runs
    alike, since nothing but a number speaks of any of them"""
    families: dict[tuple[str, str], dict[int, dict[str, tuple[int, ...]]]] = {}
    for entry in pair.source:
        segments = entry.key.split(".")
        for depth, segment in enumerate(segments):
            if (match := _NUMBERED.fullmatch(segment)) and not _DIGITS.search(".".join(segments[:depth])):
                members = families.setdefault((".".join(segments[:depth]), match[1]), {})
                members.setdefault(int(match[2]), {})[".".join(segments[depth + 1 :])] = entry.shape
    used = {key for made in pair.mapping.values() for key in made.sources}

    def turns(family: tuple[str, str]) -> bool:
        members = [members[1] for members in sorted(families[family].items())]
        whole = f"{family[0]}.{family[1]}".strip(".") if family[0] else family[1]
        return len(members) > 2 and members != members[::-1] and any(key.startswith(whole) for key in used)

    able = sorted(filter(turns, families))
    if not able:
        return None
    parent, stem = random.choice(able)
    numbers = sorted(families[parent, stem])
    new = dict(zip(numbers, numbers[::-1], strict=True))
    depth = len(parent.split(".")) if parent else 0

    def member(key: str) -> int | None:
        segments = key.split(".")
        match = _NUMBERED.fullmatch(segments[depth]) if len(segments) > depth else None
        return int(match[2]) if match and match[1] == stem and ".".join(segments[:depth]) == parent else None

    def name(key: str, to: dict[int, int] = new) -> str:
        number, segments = member(key), key.split(".")
        if number is not None:
            segments[depth] = f"{stem}{to[number]}"
        return ".".join(segments)

    counted: dict[int, int] = {}
    for _, run in groupby(numbers, lambda number: sorted(families[parent, stem][number].items())):
        alike = list(run)
        counted |= dict(zip(alike, sorted(new[number] for number in alike), strict=True))
    turned = _renamed(pair, name)
    either = {
        key: Made(tuple(name(one, counted) for one in made.sources), made.op) for key, made in pair.mapping.items()
    }
    turned = replace(turned, alternatives=[either])
    groups: dict[int, list[Entry]] = {}
    for entry in turned.source:
        if (number := member(entry.key)) is not None:
            groups.setdefault(number, []).append(entry)
    appearance = list(dict.fromkeys(number for entry in pair.source if (number := member(entry.key)) is not None))
    listed = iter([entry for number in appearance for entry in groups[number]])
    return replace(turned, source=[entry if member(entry.key) is None else next(listed) for entry in turned.source])


def _mixture(pair: Pair, random: Random) -> Pair:
    changes: list[Set] = []
    if random.random() < 0.3:
        changes.append(reverse)
    if random.random() < 0.7:
        changes.append(random.choice([words_half, words_half, words_shared, words_apart_but_last]))
    if random.random() < 0.4:
        changes.append(lambda pair, random: _kept(pair, _without(pair.source, random, 0.15)))
    if random.random() < 0.4:
        changes.append(lambda pair, random: _kept(pair, target=_without(pair.target, random, 0.15)))
    if random.random() < 0.2:
        changes.append(numbers_reversed)
    if random.random() < 0.15:
        changes.append(random.choice([copy_of_source, copy_of_target]))
    if random.random() < 0.6:
        changes.append(random.choice([modules_shuffled, source_sorted, source_shuffled, target_shuffled]))
    for change in changes:
        pair = change(pair, random) or pair
    return pair


def mixture_1(pair: Pair, random: Random) -> Pair:
    """some of the changes above at once, drawn for each pair"""
    return _mixture(pair, random)


def mixture_2(pair: Pair, random: Random) -> Pair:
    """the same, drawn again"""
    return _mixture(pair, random)


# The short name of a set is that on the command line.
SETS: dict[str, Set] = {
    "plain": plain,
    "reverse": reverse,
    "rws": words_shared,
    "rwi": words_apart,
    "rwl": words_apart_but_last,
    "part": words_half,
    "ss": source_shuffled,
    "st": target_shuffled,
    "lsh": modules_shuffled,
    "alpha": source_sorted,
    "eq": equal_shapes,
    "ema": copy_of_source,
    "ema2": copy_of_source_either,
    "tower": copy_of_target,
    "tower2": copy_of_target_either,
    "ds": source_lacks,
    "dt": target_lacks,
    "db": both_lack,
    "swap": false_friends,
    "revnum": numbers_reversed,
    "mix1": mixture_1,
    "mix2": mixture_2,
}
