"""nn.Module stand-ins: the state_dict that a pickled model would give, without its class.

The order is `torch.nn.Module.state_dict`'s: a module's parameters, then its persistent buffers, then its
submodules in the order they were registered. Source: ``torch/nn/modules/module.py`` (2.13), where the slots
are dicts; before 2.0 they were OrderedDicts, and 1.0 lacks ``_non_persistent_buffers_set``.

Unknown without running the class: ``_extra_state``, an overridden ``state_dict`` and hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

from ckptool.core.tree import PyObject, as_mapping, attributes, key_text, least_to_refuse, ordered_dict, refuse_key
from ckptool.limits import MAX_KEY, MAX_KEYS, MAX_MODULE_DEPTH, MAX_MODULES, MAX_SHARED_PARTS

_VERSIONS = {
    f"{lazy}{norm}{dims}d": 2 for lazy in ("", "Lazy") for norm in ("BatchNorm", "InstanceNorm") for dims in (1, 2, 3)
} | {"SyncBatchNorm": 2}
"""Classes of torch.nn whose ``_version`` is not 1 (torch 2.13)."""


def is_module(node: object) -> TypeGuard[PyObject]:
    """Returns whether a node has the attributes of an nn.Module, whatever its class."""
    if not isinstance(node, PyObject):
        return False
    if node.qualname == "OptimizedModule" and node.called and node.args:
        return is_module(node.args[0])  # torch.compile pickles as a call on the original module
    named = attributes(node)
    return as_mapping(named.get("_parameters")) is not None and as_mapping(named.get("_modules")) is not None


def walk_modules(top: PyObject) -> Iterator[tuple[str, PyObject]]:
    """Yields (prefix, module) in state_dict order, a shared module at each of its prefixes; these end with "."."""
    count = again = 0
    most, most_shared, deepest, longest = (
        limit.now() for limit in (MAX_MODULES, MAX_SHARED_PARTS, MAX_MODULE_DEPTH, MAX_KEY)
    )
    met: set[int] = set()
    trail: list[tuple[str, PyObject]] = [("", top)]
    while trail:
        prefix, module = trail.pop()
        count += 1
        if id(module) in met:
            slots = (as_mapping(attributes(module).get(slot)) or () for slot in ("_parameters", "_buffers", "_modules"))
            again += 1 + sum(map(len, slots))
        met.add(id(module))
        if count > most:
            raise MAX_MODULES.passed("the model has too many modules")
        if prefix.count(".") > deepest:
            raise MAX_MODULE_DEPTH.passed("the model's modules are nested too deep")
        if len(prefix) > longest:
            raise MAX_KEY.passed(f"a module's name has {len(prefix):,} characters", len(prefix))
        if again > most_shared:
            raise MAX_SHARED_PARTS.passed("the model has too many parts in shared modules, counted each time")
        yield prefix, module
        if not attributes(module) and module.args and is_module(module.args[0]):
            below = {"_orig_mod": module.args[0]}
        else:
            below = as_mapping(attributes(module).get("_modules")) or {}
        trail.extend(
            (f"{prefix}{key_text(name)}.", child) for name, child in reversed(below.items()) if is_module(child)
        )


def state_dict(top: PyObject) -> dict[str, Any]:
    """Returns {key: value} in the order of ``model.state_dict()``, without non-persistent buffers."""
    found: dict[str, Any] = {}
    total = 0
    most, least = MAX_KEYS.now(), least_to_refuse()
    for prefix, module in walk_modules(top):
        named = attributes(module)
        transient = named.get("_non_persistent_buffers_set")
        if isinstance(transient, PyObject):  # protocol 2 pickles a set as set([...])
            transient = transient.args[0] if transient.args else ()
        listed = transient if isinstance(transient, (list, tuple, set, frozenset)) else ()
        skipped = {name for name in listed if isinstance(name, str)}
        for slot, left_out in (("_parameters", set()), ("_buffers", skipped)):
            for name, value in (as_mapping(named.get(slot)) or {}).items():
                if value is not None and name not in left_out:
                    key = f"{prefix}{key_text(name)}"
                    total += len(prefix)
                    if len(key) >= least:
                        refuse_key(key)
                    if total > most:
                        raise MAX_KEYS.passed("its keys have too many characters in all")
                    found[key] = value
    return found


def metadata(top: PyObject) -> PyObject:
    """Returns the ``_metadata`` of ``model.state_dict()``: {module path: {"version": n}}."""
    versions: dict[Any, Any] = {}
    for prefix, module in walk_modules(top):
        named = attributes(module).get("_version")
        version = named if isinstance(named, int) else _VERSIONS.get(module.qualname, 1)
        versions[prefix.removesuffix(".")] = {"version": version}
    return ordered_dict(versions)


def state_dict_hooks(top: PyObject) -> list[str]:
    """Returns the paths of modules with pickled hooks, which may make a live model's state_dict differ from ours."""
    return [
        prefix.removesuffix(".") or "the model itself"
        for prefix, module in walk_modules(top)
        if as_mapping(attributes(module).get("_state_dict_hooks"))
    ]
