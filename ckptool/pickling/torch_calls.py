"""Decodes and encodes the calls in torch's pickles that rebuild tensors, such as ``_rebuild_tensor_v2``.

Reading: `builders` maps torch's ``_rebuild_*`` functions to functions that check their arguments and return a
`TensorInfo`. Writing: `call` returns the call that torch would have pickled for one.
Sources: ``torch/_utils.py``, ``torch/_tensor.py``, ``torch/serialization.py`` and
``torch/_weights_only_unpickler.py`` of torch 2.13.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptool.core.dtypes import BY_STORAGE, DTYPES, nbytes_of
from ckptool.core.tensor import FORMS, Derived, Extras, Opaque, Storage, TensorInfo, computed_as, is_countable, reach
from ckptool.core.tree import Global, PyObject, brief, ordered_dict
from ckptool.errors import FormatError, UnsupportedError
from ckptool.limits import MAX_DIMS, MAX_NUMEL

if TYPE_CHECKING:  # not imported for a file without a pickle
    from ckptool.pickling.dump import Form
    from ckptool.pickling.load import Builders


_SCRIPTED = {
    f"{row.name.replace('uint', 'UInt').replace('float', 'Float').replace('complex32', 'ComplexHalf')}Storage": row
    for row in DTYPES.values()
    if row.in_torch and not row.storage
}
"""Storage classes that only TorchScript's pickles name: torch has none for the newer dtypes."""


def dtype_of_storage(storage_type: object) -> str | None:
    """Returns the dtype of a pickled storage class, None for UntypedStorage. Raises: FormatError."""
    name = storage_type.qualname if isinstance(storage_type, Global) else ""
    if name in ("UntypedStorage", "_UntypedStorage"):
        return None
    row = BY_STORAGE.get(name) or _SCRIPTED.get(name)
    if row is None:
        raise FormatError(f"the pickle names no storage class of torch: {brief(storage_type)}")
    return row.name


# --- reading -----------------------------------------------------------------------------------------------------


class StorageView(NamedTuple):
    """A part of a storage with a key of its own, as torch 0.1 to 0.4 saved them; offset in elements.

    ``dtype``: that of its elements, where the storage is untyped.
    """

    base: Storage
    offset: int
    dtype: str | None = None


def strided(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object = False,
    hooks: object = None,
    meta: object = None,
    *,
    dtype: str | None = None,
) -> TensorInfo:
    """Returns the view of ``storage`` that `_rebuild_tensor_v2` makes; ``dtype`` None means the storage's own.

    Raises: FormatError if an argument has the wrong type, or the view reaches outside its storage.
    """
    if isinstance(storage, StorageView) and type(offset) is int:
        offset += storage.offset
        dtype, storage = dtype or storage.dtype, storage.base
    if not isinstance(storage, Storage):
        raise FormatError(f"a tensor is rebuilt from a {type(storage).__name__}, which is no storage")
    dtype = dtype or storage.dtype or "uint8"
    if type(shape) is not tuple or type(stride) is not tuple:
        shape, stride = _ints(shape, "shape"), _ints(stride, "stride")
    if type(offset) is not int or not _INT.issuperset(map(type, shape + stride)):
        raise _wrong_view(shape, stride, offset)
    if max(shape + stride, default=0) < _UNALIKE:
        shape, stride = _within(dtype, shape, stride, offset, storage.nbytes)
    else:
        _within.__wrapped__(dtype, shape, stride, offset, storage.nbytes)
        stride = tuple(step if step < _UNALIKE else 1 for step in stride)  # of a dimension of 1, or of no elements
    extras = None
    if isinstance(meta, dict) and (meta.get("conj") or meta.get("neg")):
        extras = Extras(conj=bool(meta.get("conj")), neg=bool(meta.get("neg")))
    return TensorInfo(dtype, shape, stride, offset, storage, bool(requires_grad), False, extras)


_INT = frozenset({int})

_UNALIKE = sys.hash_info.modulus
"""Integers from here on can share a hash: thousands of such keys would all be compared with each other."""


@lru_cache(FORMS)
def _within(
    dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, nbytes: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape and the stride of a view, checked against a storage of ``nbytes``. Cached by shape."""
    if not 0 <= offset <= MAX_NUMEL or len(shape) != len(stride) or len(shape) > MAX_DIMS:
        raise _wrong_view(shape, stride, offset)
    numel, count = 1, 1
    for size, step in zip(shape, stride, strict=True):
        if not (0 <= size <= MAX_NUMEL and 0 <= step <= MAX_NUMEL):
            raise _wrong_view(shape, stride, offset)
        numel *= size
        count *= size or 1
        if count > MAX_NUMEL:
            raise FormatError(f"a tensor has shape {brief(shape)}: more elements than torch can count")
    end = offset + reach(shape, stride)
    if numel and DTYPES[dtype].bits * end > 8 * nbytes:
        raise FormatError(
            f"a {dtype} tensor of shape {brief(shape)}, stride {brief(stride)}, offset {offset} "
            f"reaches element {end - 1} of a storage of {nbytes} bytes"
        )
    return shape, stride


def _wrong_view(shape: tuple[Any, ...], stride: tuple[Any, ...], offset: object) -> FormatError:
    """Returns the error for a shape, a stride and an offset that do not fit together."""
    _ints(shape, "shape"), _ints(stride, "stride")
    if min((*shape, *stride), default=0) < 0:
        return FormatError(f"a tensor has shape {brief(shape)} and stride {brief(stride)}: a negative one")
    return FormatError(
        f"a tensor of shape {brief(shape)} has stride {brief(stride)} and storage offset {brief(offset)}"
    )


def _ints(value: object, what: str) -> tuple[int, ...]:
    if isinstance(value, PyObject) and value.qualname == "Size" and value.args:
        value = value.args[0]
    if (
        isinstance(value, (tuple, list))
        and len(value) <= MAX_DIMS
        and all(type(item) is int and abs(item) <= MAX_NUMEL for item in value)
    ):
        return tuple(value)
    raise FormatError(f"a tensor's {what} is {brief(value)}: not a tuple of integers that torch could have")


def _dtype_named(name: object) -> str:
    if isinstance(name, Global) and name.module == "torch" and name.qualname in DTYPES:
        return name.qualname
    raise FormatError(f"{brief(name)} is no dtype that torch can save")


def _tensor_v3(
    storage: object, offset: object, shape: object, stride: object,
    requires_grad: object, hooks: object, dtype: object, meta: object = None,
) -> TensorInfo:  # fmt: skip
    name = _dtype_named(dtype)
    if isinstance(storage, Storage) and storage.byteorder == "big" and DTYPES[name].bits > 8:
        # torch swaps an UntypedStorage in units of one byte, so not at all: such a file's values are ambiguous.
        raise UnsupportedError(f"a big-endian file with a {name} tensor: torch itself does not read it right")
    return strided(storage, offset, shape, stride, requires_grad, None, meta, dtype=name)


def _parameter(data: object, requires_grad: object = True, *_: object) -> TensorInfo:
    if not isinstance(data, TensorInfo):
        raise FormatError(f"a Parameter is made of a {type(data).__name__}")
    return replace(data, requires_grad=bool(requires_grad), is_parameter=True)


def _parameter_with_state(data: object, requires_grad: object, hooks: object, state: object) -> TensorInfo:
    made = _parameter(data, requires_grad)
    extras = made.extras or Extras()
    return replace(made, extras=replace(extras, state=state))


def _from_type_v2(func: Any, cls: object, args: object, state: object) -> TensorInfo | PyObject:
    if not callable(func) or not isinstance(args, tuple):
        raise FormatError(f"_rebuild_from_type_v2 is called with {brief(func)}")
    made = func(*args)
    if isinstance(made, TensorInfo):
        return replace(made, extras=replace(made.extras or Extras(), subclass=cls, state=state))
    name = getattr(func, "qualname", "")
    node = _function("_rebuild_from_type_v2", "torch._tensor")(func, cls, args, state)
    if name == "_rebuild_njt":
        inner = args[0] if args and isinstance(args[0], dict) else {}
        values = inner.get("values")
        if isinstance(values, TensorInfo):
            parts = tuple(inner[name] for name in ("values", "offsets", "lengths") if _is_tensor(inner.get(name)))
            return _opaque("nested_jagged", node, values.dtype, None, parts)
    if name == "_rebuild_wrapper_subclass":
        return _wrapper_subclass(node, args, state)
    return node


def _wrapper_subclass(node: PyObject, args: tuple[Any, ...], state: object) -> TensorInfo:
    """Returns a DTensor, ShardedTensor or another wrapper subclass: ``size`` is the global shape.

    The file has this rank's shards: attributes of a DTensor, and of the objects in a list of a ShardedTensor.
    """
    layers = state if isinstance(state, tuple) else (state,)
    shards = [
        shard.state for layer in layers if isinstance(layer, list) for shard in layer if isinstance(shard, PyObject)
    ]
    slots = [part for state in shards for part in (state if isinstance(state, tuple) else (state,))]
    parts = [
        value
        for attributes in (*layers, *slots)
        if isinstance(attributes, dict)
        for value in attributes.values()
        if isinstance(value, TensorInfo)
    ]
    if len(args) < 3:
        raise FormatError("_rebuild_wrapper_subclass is called without a size")
    kind = _SHARDS.get(getattr(args[0], "qualname", ""), "subclass")
    return _opaque(kind, node, _dtype_named(args[1]), _ints(args[2], "size"), tuple(parts))


_SHARDS = {"DTensor": "dtensor_local_shard", "ShardedTensor": "sharded_tensor_local_shards"}
"""What is in the file of a tensor of these classes."""


def _qtensor(storage: object, offset: object, shape: object, stride: object, *rest: Any) -> TensorInfo:
    whole = strided(storage, offset, shape, stride)
    params = rest[0] if rest else ()
    scales = tuple(part for part in params if _is_tensor(part)) if isinstance(params, tuple) else ()
    node = _function("_rebuild_qtensor")(storage, offset, shape, stride, *rest)
    return _opaque("quantized", node, whole.dtype, whole.shape, (whole, *scales), whole.stride, whole.storage_offset)


def _sparse(layout: object, data: object) -> TensorInfo:
    name = layout.args[0] if isinstance(layout, PyObject) and layout.args else layout
    kind = str(name).removeprefix("torch.") if isinstance(name, (str, Global)) else ""
    node = _function("_rebuild_sparse_tensor")(layout, data)
    if not isinstance(data, tuple) or kind not in _SPARSE:
        raise FormatError(f"a sparse tensor of layout {brief(name)} cannot be understood")
    parts = tuple(part for part in data if _is_tensor(part))
    at = 2 if kind == "sparse_coo" else 3
    if len(parts) != at or len(data) <= at:
        raise FormatError(f"a {kind} tensor has {len(parts)} parts")
    return _opaque(kind, node, parts[-1].dtype, _ints(data[at], "shape"), parts)


_SPARSE = ("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")


def _nested(*args: Any) -> TensorInfo:
    parts = tuple(part for part in args if _is_tensor(part))
    if not parts:
        raise FormatError("a nested tensor without a buffer")
    return _opaque("nested_strided", _function("_rebuild_nested_tensor")(*args), parts[0].dtype, None, parts)


def _meta(dtype: object, shape: object, stride: object, requires_grad: object = False) -> TensorInfo:
    node = _function("_rebuild_meta_tensor_no_storage")(dtype, shape, stride, requires_grad)
    made = _opaque("meta", node, _dtype_named(dtype), _ints(shape, "shape"), (), _ints(stride, "stride"))
    return replace(made, requires_grad=bool(requires_grad))


def _device_tensor(data: object, dtype: object, device: object, requires_grad: object = False) -> TensorInfo:
    """Returns a tensor of xla, ort, mtia or maia as one of the CPU.

    It is pickled as a CPU tensor or a NumPy array, the dtype to cast it to (NumPy lacks bfloat16, which is pickled as
    float32), and the device to copy it to.
    """
    if isinstance(data, PyObject):
        from ckptool.pickling.numpy_calls import tensor_of

        data = tensor_of(data)
    if not isinstance(data, TensorInfo):
        raise FormatError("a tensor of another device is made of something that is no dense tensor and no array")
    name = _dtype_named(dtype)
    made = data if name == data.dtype else computed_as(data, Derived("cast", (data,)), name)
    return replace(made, requires_grad=bool(requires_grad))


def _is_tensor(value: object) -> bool:
    return isinstance(value, TensorInfo)


@cache
def _function(qualname: str, module: str = "torch._utils") -> Global:
    return Global.named(module, qualname)


def _opaque(
    kind: str, node: PyObject, dtype: str, shape: tuple[int, ...] | None,
    parts: tuple[TensorInfo, ...], stride: tuple[int, ...] = (), offset: int = 0,
) -> TensorInfo:  # fmt: skip
    if min(shape or (), default=0) < 0 or not is_countable(shape or ()):
        raise FormatError(f"a {kind} tensor has shape {brief(shape)}: negative, or more than torch can count")
    return TensorInfo(dtype, shape, stride, offset, Opaque(kind, node, parts))


def _typed(value: Any, type_name: object = None) -> Any:
    """Returns the container that a call of TorchScript's pickler only adds a type to."""
    return value


DEVICE_CALLS = (
    "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy",
    "_rebuild_xla_tensor", "_rebuild_mlc_tensor",  # before torch 2
)  # fmt: skip

builders: Builders = {
    ("torch._utils", "_rebuild_tensor"): strided,
    ("torch._utils", "_rebuild_tensor_v2"): strided,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter_with_state,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type_v2,
    ("torch._utils", "_rebuild_qtensor"): _qtensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    ("torch._utils", "_rebuild_nested_tensor"): _nested,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _meta,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _sparse,  # torch 1.9 to 1.12
    **{("torch._utils", name): _device_tensor for name in DEVICE_CALLS},
    **{("torch.jit._pickle", f"build_{kind}list"): _typed for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _typed,  # what torch::pickle_save of C++ writes has these too
}
"""The functions that `pickling.load.load` calls in place of torch's."""


# --- writing -----------------------------------------------------------------------------------------------------


def call(tensor: TensorInfo, storage: Storage, offset: int, stride: tuple[int, ...]) -> tuple[Global, tuple[Any, ...]]:
    """Returns (function, args) that rebuild a dense tensor as a view of ``storage``, the storage that is written.

    It is `_rebuild_tensor_v2` if the storage has the tensor's dtype, else `_rebuild_tensor_v3`, which names that dtype.
    """
    extras = tensor.extras
    meta = {name: True for name in ("conj", "neg") if extras and getattr(extras, name)}
    requires_grad = tensor.requires_grad and not tensor.is_parameter
    args: tuple[Any, ...] = (storage, offset, tensor.shape, stride, requires_grad, ordered_dict({}))
    typed = storage.dtype == tensor.dtype
    if not typed:
        args = (*args, _function(tensor.dtype, "torch"))
    function = _function("_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    if meta:
        args = (*args, meta)
    if extras is not None and extras.subclass is not None:
        return _function("_rebuild_from_type_v2", "torch._tensor"), (function, extras.subclass, args, extras.state)
    if not tensor.is_parameter:
        return function, args
    plain = function(*args)
    if extras is not None and extras.state is not None:
        state = (plain, tensor.requires_grad, ordered_dict({}), extras.state)
        return _function("_rebuild_parameter_with_state"), state
    return _function("_rebuild_parameter"), (plain, tensor.requires_grad, ordered_dict({}))


def form(dtype: str, location: str, requires_grad: bool, is_parameter: bool, tail: tuple[Any, ...] = ()) -> Form:
    """Returns the `call` that rebuilds a plain tensor of a typed storage, as a template.

    Its holes are the storage's key and numel, then the tensor's offset, shape and stride.
    """
    from ckptool.pickling.dump import HOLE, Form, Persistent

    pid = Persistent(("storage", storage_class(dtype), HOLE, location, HOLE, *tail))
    args = (pid, HOLE, HOLE, HOLE, requires_grad and not is_parameter, ordered_dict({}))
    plain = _function("_rebuild_tensor_v2")
    if not is_parameter:
        return Form(plain, args)
    return Form(_function("_rebuild_parameter"), (plain(*args), requires_grad, ordered_dict({})))


def storage_class(dtype: str | None) -> Global:
    """Returns the class of a pickled storage of this dtype."""
    name = DTYPES[dtype].storage if dtype else None
    return _function(name, "torch") if name else _function("UntypedStorage", "torch.storage")


def persistent_id(storage: Storage, key: str) -> tuple[Any, ...]:
    """Returns the persistent id of a storage: its numel counts elements of its class, bytes if untyped."""
    return "storage", storage_class(storage.dtype), key, storage.location, storage_numel(storage)


def storage_numel(storage: Storage) -> int:
    """Returns how many elements of its class a storage has; bytes, if it is untyped or they are smaller."""
    bits = max(8, DTYPES[storage.dtype].bits) if storage.dtype else 8
    return storage.nbytes * 8 // bits


_TEXT = re.compile(
    r"\('storage', <class '([\w.]{1,99})\.(\w{1,99})'>, '([^'\\]*)', '([^'\\]*)', (\d{1,19})(?:, None)?\)"
)


def persistent(pid: Any) -> Any:
    """Returns a storage's persistent id from its text, which is what protocol 0 has (and torch.load refuses)."""
    found = _TEXT.fullmatch(pid) if type(pid) is str else None
    if found is None:
        return pid
    module, name, key, tag, numel = found.groups()
    return "storage", Global.named(module, name), key, tag, int(numel)


def location(tag: object) -> str:
    """Returns a storage's device tag. Raises: FormatError if it is no text."""
    if not isinstance(tag, str):
        raise FormatError(f"a storage's device is {brief(tag)}")
    return tag


def storage_nbytes(dtype: str | None, numel: object) -> int:
    """Returns the bytes that a persistent id's numel claims. Raises: FormatError if it is no count."""
    if type(numel) is not int or not 0 <= numel <= MAX_NUMEL:
        raise FormatError(f"a storage has {brief(numel)} elements")
    packed = dtype is not None and DTYPES[dtype].bits < 8  # torch counts the storages of these in bytes
    return nbytes_of(dtype, numel) if dtype and not packed else numel


def makes_closed_leaves(names: Iterable[tuple[str, str]]) -> bool:
    """Returns whether no tensor of a pickle with these names can have attributes, as in nearly every file."""
    return all(
        (module == "torch" and qualname.endswith("Storage")) or (module, qualname) in _WITHOUT_STATE
        for module, qualname in names
    )


_WITHOUT_STATE = {
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict"),
}  # fmt: skip
