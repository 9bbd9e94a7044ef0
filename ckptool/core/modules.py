"""nn.Module stand-ins: the state_dict that a pickled model would give, without its class.

The order is `torch.nn.Module.state_dict`'s: a module's parameters, then its persistent buffers, then what its class
adds, then its submodules in the order they were registered. Source: ``torch/nn/modules/module.py`` (2.13), where the
slots are dicts; before 2.0 they were OrderedDicts, and 1.0 lacks ``_non_persistent_buffers_set``.

Of the classes that add keys of their own those of torch.ao are known, by their attributes, and so are their subclasses:

    Conv*d                 a state that is a tuple      weight, bias, scale, zero_point
    LinearPackedParams     a ScriptObject, a dtype      dtype, _packed_params: (weight, bias)
    EmbeddingPackedParams  a ScriptObject, a dtype      dtype, _packed_weight: the weight
    Linear, QFunctional    two numbers                  scale, zero_point
    dynamic LSTM and GRU   ScriptObjects                the objects themselves

A ``fx.GraphModule`` is pickled as a call on its ``__dict__``. A submodule whose state is anything else gives one entry,
``<state of CLASS>``, as its keys are known to its class only. Unknown without running the class are also
``_extra_state``, an overridden ``state_dict`` and hooks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, TypeGuard

from ckptool.core.tensor import Span, Storage, TensorInfo
from ckptool.core.tree import (
    Global,
    PyObject,
    as_mapping,
    attributes,
    children,
    key_text,
    least_to_refuse,
    ordered_dict,
    refuse_key,
)
from ckptool.limits import MAX_KEY, MAX_KEYS, MAX_MODULE_DEPTH, MAX_MODULES, MAX_SHARED_PARTS

_VERSIONS = (
    {
        f"{lazy}{norm}{dims}d": 2
        for lazy in ("", "Lazy") for norm in ("BatchNorm", "InstanceNorm", "ConvBn", "ConvBnReLU", "BNReLU")
        for dims in (1, 2, 3)
    }
    | {"SyncBatchNorm": 2, "HistogramObserver": 3}
    | {f"{kind}MinMaxObserver": 3 for kind in ("", "PerChannel", "MovingAverage", "MovingAveragePerChannel")}
)  # fmt: skip
"""Classes of torch.nn and torch.ao whose ``_version`` is not 1 (torch 2.13)."""

_QUANTIZED = dict.fromkeys(("Linear", "LinearReLU", "LinearLeakyReLU", "LinearTanh", "LinearPackedParams"), 3)
_DYNAMIC = {"Linear": 4, "LinearReLU": 4, "LSTM": 2, "GRU": 2}
"""Those of torch.ao.nn.quantized, and of its dynamic modules, whose names torch.nn has too."""

_ADDED = object()
"""In what `_body` returns: the entries that only the class of the module adds."""


def is_module(node: object) -> TypeGuard[PyObject]:
    """Returns whether a node has the attributes of an nn.Module, whatever its class, or is a known quantised one."""
    return isinstance(node, PyObject) and _body(node) is not None


def class_name(module: PyObject) -> str:
    """Returns the name of a module's class."""
    return "GraphModule" if module.qualname.startswith("reduce_") else module.qualname


def _body(node: PyObject) -> dict[Any, Any] | None:
    """Returns the ``__dict__`` that a module has: its state, or an argument of the call that makes it, as for a
    GraphModule; None for anything else."""
    arguments: tuple[Any, ...] = node.args[:4] if node.called else ()
    for named in (attributes(node), *arguments):
        if isinstance(named, dict) and all(
            as_mapping(named.get(slot)) is not None for slot in ("_parameters", "_modules")
        ):
            return named
    if isinstance(node.state, tuple):
        added = _of_tuple(node.state)
        return None if added is None else {"_parameters": {}, "_modules": {}, _ADDED: added}
    inner: Any = node
    while isinstance(inner, PyObject) and inner.qualname == "OptimizedModule" and inner.called and inner.args:
        inner = inner.args[0]  # torch.compile pickles as a call on the original module
    if inner is node or not is_module(inner):
        return None
    return {"_parameters": {}, "_modules": {"_orig_mod": node.args[0]}}


def _of_tuple(state: tuple[Any, ...]) -> dict[str, Any] | None:
    """Returns the entries of a quantised module that pickles as a tuple; None for any other tuple.

    Sources: ``__getstate__`` in ``torch/ao/nn/quantized/modules/conv.py`` and
    ``torch/ao/nn/sparse/quantized/linear.py`` of torch 2.13, and of ``LinearPackedParams`` in torch 1.4 to 1.6.
    """
    if len(state) in (14, 15) and _is_tensor(state[10]) and (state[11] is None or _is_tensor(state[11])):
        weight, bias, scale, zero_point = state[10:14]
        return {"weight": weight, "bias": bias, "scale": _scalar(scale), "zero_point": _scalar(zero_point)}
    if len(state) == 3 and _is_script_object(state[0]) and isinstance(state[2], Global):
        return {"dtype": state[2], "_packed_params": _unpacked("_packed_params", state[0])}
    if len(state) == 4 and _is_tensor(state[0]) and isinstance(state[3], Global) and type(state[2]) is bool:
        return {"dtype": state[3], "_packed_params": state[:2]}
    return None


def _added(module: PyObject, named: dict[Any, Any]) -> dict[str, Any]:
    """Returns the entries that a module's class adds to its parameters and buffers."""
    made: dict[str, Any] = dict(named.get(_ADDED, ()))
    below = as_mapping(named["_modules"]) or {}
    numbers = isinstance(named.get("scale"), float) and isinstance(named.get("zero_point"), int)
    if numbers and not {"_packed_params", "activation_post_process"}.isdisjoint(below):
        made["scale"], made["zero_point"] = _scalar(named["scale"]), _scalar(named["zero_point"])
    if module.module == "torch.ao.nn.sparse.quantized.dynamic.linear":
        made["op_type"] = "sparse_dynamic"
    if "weight_qscheme" in named and "weight_dtype" in named:  # torch.ao.nn.quantized.reference
        made["weight_qscheme"], made["weight_dtype"] = named["weight_qscheme"], named["weight_dtype"]
    for name, value in named.items():
        if _is_script_object(value) and (name.startswith("_packed_") or _tensors_in(value, set())):
            if name in ("_packed_params", "_packed_weight") and "dtype" in named:
                made["dtype"] = named["dtype"]
            made[name] = _unpacked(name, value)
    return made


def _unpacked(name: str, packed: PyObject) -> Any:
    """Returns what `state_dict` has for a ScriptObject: what is packed in it, or itself.

    Its state is (content, class). That of LinearPackedParamsBase is (weight, bias), of a sparse one (weight, bias,
    [block rows, block columns]), of EmbeddingPackedParamsBase (version, [weight], ...).
    """
    content = packed.state[0] if isinstance(packed.state, tuple) and packed.state else None
    if not isinstance(content, tuple):
        return packed
    if name == "_packed_params" and len(content) == 3 and isinstance(content[2], list):
        return (*content[:2], *content[2])
    if name == "_packed_params":
        return content
    if name == "_packed_weight" and len(content) > 1 and isinstance(content[1], list) and len(content[1]) == 1:
        return content[1][0]
    return packed


def _scalar(value: Any) -> Any:
    """Returns the tensor ``torch.tensor(value)`` of a number; any other value as it is."""
    dtype, form = ("int64", "<q") if type(value) is int else ("float32", "<f")
    try:
        raw = struct.pack(form, value)
    except (struct.error, OverflowError):
        return value
    span = Span("", 0, len(raw), memory=lambda: memoryview(raw))
    return TensorInfo(dtype, (), (), 0, Storage(span, dtype))


def _is_tensor(value: object) -> TypeGuard[TensorInfo]:
    return isinstance(value, TensorInfo)


def _is_script_object(value: object) -> TypeGuard[PyObject]:
    return isinstance(value, PyObject) and value.qualname == "ScriptObject" and value.module.split(".")[0] == "torch"


def _tensors_in(top: object, met: set[int]) -> bool:
    """Returns whether a value holds tensors that are not in ``met``, the ids of what was met, which grows."""
    trail = [top]
    while trail:
        node = trail.pop()
        if id(node) in met:
            continue
        met.add(id(node))
        if isinstance(node, TensorInfo):
            return True
        trail.extend(child for _, child in children(node))
    return False


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
        named = _body(module) or {}
        if id(module) in met:
            slots = (as_mapping(named.get(slot)) or () for slot in ("_parameters", "_buffers", "_modules"))
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
        below = as_mapping(named.get("_modules")) or {}
        trail.extend(
            (f"{prefix}{key_text(name)}.", child) for name, child in reversed(below.items()) if is_module(child)
        )


def state_dict(top: PyObject) -> dict[str, Any]:
    """Returns {key: value} in the order of ``model.state_dict()``, without non-persistent buffers."""
    found: dict[str, Any] = {}
    total = 0
    most, least = MAX_KEYS.now(), least_to_refuse()
    for prefix, module in walk_modules(top):
        for name, value in _entries(module):
            key = f"{prefix}{name}"
            total += len(prefix)
            if len(key) >= least:
                refuse_key(key)
            if total > most:
                raise MAX_KEYS.passed("its keys have too many characters in all")
            found[key] = value
    return found


def _entries(module: PyObject) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) for a module's own entries of the state_dict, and for submodules of unknown state."""
    named = _body(module) or {}
    transient = named.get("_non_persistent_buffers_set")
    if isinstance(transient, PyObject):  # protocol 2 pickles a set as set([...])
        transient = transient.args[0] if transient.args else ()
    listed = transient if isinstance(transient, (list, tuple, set, frozenset)) else ()
    skipped = {name for name in listed if isinstance(name, str)}
    for slot, left_out in (("_parameters", set()), ("_buffers", skipped)):
        for name, value in (as_mapping(named.get(slot)) or {}).items():
            if value is not None and name not in left_out:
                yield key_text(name), value
    yield from _added(module, named).items()
    for name, child in (as_mapping(named.get("_modules")) or {}).items():
        if child is not None and not is_module(child):
            kind = f"{child.module}.{child.qualname}" if isinstance(child, PyObject) else type(child).__name__
            yield f"{key_text(name)}.<state of {kind}>", child


def loose(top: PyObject) -> list[str]:
    """Returns the attributes of a model's modules that hold tensors and are not in its state_dict."""
    kept = state_dict(top)
    met = {id(value) for value in kept.values()}
    modules = [(prefix, module, _body(module) or {}) for prefix, module in walk_modules(top)]
    for _, module, named in modules:
        met |= {id(module), *(id(as_mapping(named.get(slot))) for slot in ("_parameters", "_modules"))}
        met |= {id(value) for value in named.values() if _is_script_object(value)}
    found: list[str] = []
    for prefix, _, named in modules:
        buffers = as_mapping(named.get("_buffers")) or {}
        for name, value in {**buffers, **named}.items():
            if isinstance(name, str) and f"{prefix}{name}" not in kept and _tensors_in(value, met):
                found.append(f"{prefix}{name}")
    return found


def metadata(top: PyObject) -> PyObject:
    """Returns the ``_metadata`` of ``model.state_dict()``: {module path: {"version": n}}."""
    return ordered_dict(
        {prefix.removesuffix("."): {"version": _version(module)} for prefix, module in walk_modules(top)}
    )


def _version(module: PyObject) -> int:
    named = attributes(module).get("_version")
    if isinstance(named, int):
        return named
    steps = module.module.split(".")
    if "quantized" in steps and "sparse" not in steps and "reference" not in steps:
        known = (_DYNAMIC if "dynamic" in steps else _QUANTIZED).get(module.qualname)
        if known is not None:
            return known
    return _VERSIONS.get(module.qualname, 1)


def state_dict_hooks(top: PyObject) -> list[str]:
    """Returns the paths of modules with pickled hooks, which may make a live model's state_dict differ from ours."""
    return [
        prefix.removesuffix(".") or "the model itself"
        for prefix, module in walk_modules(top)
        if as_mapping((_body(module) or {}).get("_state_dict_hooks"))
    ]
