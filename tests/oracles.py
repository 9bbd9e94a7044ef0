"""Judges that are not ckptool: torch.load, and comparisons of whole trees down to the last bit."""

from __future__ import annotations

import functools
import json
import pickle
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open

from ckptool.core.tensor import Derived, Storage, TensorInfo
from ckptool.core.tree import Global, PyObject, as_mapping, attributes
from ckptool.io.files import Files
from ckptool.values import blocks as data

Saved = Callable[..., Path]
"""Saves an object with torch.save; see `conftest.saved`."""

Run = Callable[..., tuple[int, str, str]]
"""Runs a command line: (exit code, stdout, stderr); see `conftest.run`."""

State = dict[str, torch.Tensor]

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CANARY = "CKPTOOL_CANARY_EXECUTED"


seed_torch = torch.default_generator.manual_seed
"""Seeds the CPU alone: `torch.manual_seed` formats a traceback for each kind of device, some ms under pytest."""


def _closed(schema: Any) -> Any:
    """The schema, of whose objects with named fields no other field is valid."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(one) for name, one in schema.items()}
    return closed | {"additionalProperties": False} if isinstance(schema.get("required"), list) else closed


@functools.cache
def published(command: str) -> Any:
    """A judge of what a command prints with --json: its published schema, and no field that the schema lacks."""
    path = FIXTURES.parent / "docs" / "reference" / "schemas" / f"{command}.json"
    schema = json.loads(path.read_text())
    del schema["anyOf"]  # result or error, without fields of its own: `test_docs` holds it
    return jsonschema_rs.validator_for(_closed(schema))


def compiled(model: torch.nn.Module) -> Any:
    """What torch.compile's OptimizedModule is to a state_dict, without the seconds that dynamo's import takes."""
    made: Any = torch.nn.Module()
    made._orig_mod = model
    return made


def content() -> dict[str, bytes | None]:
    """All that the current directory holds: files with their bytes, directories with None."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def thinned(step: int) -> pytest.MarkDecorator:
    """For a test that goes over many inputs of one kind: every ``step``-th of them, and all where slow tests run."""
    steps = [pytest.param(step, id=f"1 of {step}"), pytest.param(1, id="all", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("step", steps)


def load(path: Path | str) -> State:
    return torch.load(path, weights_only=True)


def tied_groups(state: State) -> set[frozenset[str]]:
    """Keys that are the same elements of the same memory."""
    groups: dict[Any, set[str]] = {}
    for key, tensor in state.items():
        if tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested and tensor.numel():
            lazy = tensor.is_conj(), tensor.is_neg()
            view = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), lazy
            groups.setdefault(view, set()).add(key)
    return {frozenset(keys) for keys in groups.values() if len(keys) > 1}


# --- torch.load, also where a class cannot be imported -----------------------------------------------------------


class _Nested(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("_"):
            raise AttributeError(name)
        made = type(cls)(name, (Missing,), {"__module__": cls.__module__})
        setattr(cls, name, made)
        return made


class Missing(metaclass=_Nested):
    """What the oracle gets instead of an object of a class that does not exist; written without ckptool's help."""

    def __new__(cls, *args: Any) -> Any:
        made = object.__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    made: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except ImportError:
            return self.made.setdefault((module, name), _Nested(name, (Missing,), {"__module__": module}))


_pickle_module = types.SimpleNamespace(
    Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load(), __name__="oracle"
)


def cut_off(path: Path) -> Iterator[bytes]:
    """Yields what is left of a zip archive that is cut off at or inside of a member, or just before its end."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        ends = [member.header_offset for member in archive.infolist()]
    for end in (*ends, *(end + 40 for end in ends), len(whole) - 22, len(whole) - 1):
        yield whole[:end]


def torch_load(path: Path, **options: Any) -> Any:
    """What torch.load returns, with stand-ins for classes that cannot be imported."""
    return torch.load(path, weights_only=False, pickle_module=_pickle_module, **options)


def loads_safely(path: Path) -> bool:
    """Whether torch.load(weights_only=True) takes the file."""
    try:
        torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError):
        return False
    return True


# --- two trees of torch ------------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> bytes:
    """A dense tensor's elements in C order, lazy conjugation and negation resolved."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if not plain.numel():
        return b""
    if not plain.is_contiguous():
        plain = plain.contiguous()
    flat = plain.reshape(-1)
    if flat.stride(0) != 1:  # of a single element torch calls any stride contiguous
        flat = flat.as_strided((flat.numel(),), (1,))
    return flat.view(torch.uint8).numpy().tobytes()


def numbers(array: np.ndarray[Any, Any]) -> Any:
    """NumPy's array as a tensor of the same strides; one of text or objects as it is."""
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) if array.dtype.kind in "fiucb" else array


def parts(tensor: torch.Tensor) -> list[Any]:
    """What makes up a tensor that is not one strided view."""
    if tensor.is_quantized:
        scheme = tensor.qscheme()
        if scheme == torch.per_tensor_affine:
            return [tensor.int_repr(), scheme, tensor.q_scale(), tensor.q_zero_point()]
        scales = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
        return [tensor.int_repr(), scheme, *scales, tensor.q_per_channel_axis()]
    if tensor.is_nested:
        return [tensor.layout, *(part.detach() for part in tensor.unbind())]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values(), tensor.is_coalesced()]
    if tensor.layout == torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.is_meta:
        return [tensor.stride()]
    raise NotImplementedError(tensor)


def is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


class _Pairs:
    """A one-to-one relation: what is one object on the left must be one object on the right, and no more."""

    def __init__(self) -> None:
        self.left: dict[Any, Any] = {}
        self.right: dict[Any, Any] = {}

    def known(self, one: Any, other: Any, where: str) -> bool:
        if one in self.left or other in self.right:
            assert self.left.get(one) == other, f"{where}: shared on one side only"
            assert self.right.get(other) == one, f"{where}: shared on one side only"
            return True
        self.left[one], self.right[other] = other, one
        return False


def assert_identical(one: Any, other: Any, *, strides: bool = False) -> None:
    """Two trees that torch.load gave: equal types, order, values to the bit, and equal sharing of memory."""
    _Identity(strides).check(one, other, "top")


class _Identity:
    def __init__(self, strides: bool) -> None:
        self.strides = strides
        self.objects, self.memory = _Pairs(), _Pairs()
        self.kept: list[Any] = []  # an id means something only while its object lives

    def check(self, one: Any, other: Any, where: str) -> None:
        assert type(one) is type(other), f"{where}: {type(one)} and {type(other)}"
        if isinstance(one, torch.Tensor):
            self.tensors(one, other, where)
        elif isinstance(one, (torch.UntypedStorage, torch.storage.TypedStorage)):
            assert one.tolist() == other.tolist(), where
        elif isinstance(one, (int, str, bytes, float, complex, type(None), type, torch.dtype, torch.device)):
            assert one == other or repr(one) == repr(other), f"{where}: {one!r} and {other!r}"
        elif type(one).__module__ == "numpy":
            assert str(one.dtype) == str(other.dtype), where
            assert one.tobytes("A") == other.tobytes("A"), where
            assert getattr(one, "strides", ()) == getattr(other, "strides", ()), where
        elif isinstance(one, (tuple, types.FunctionType)) and not one:
            pass
        elif not self.objects.known(id(one), id(other), where):
            self.insides(one, other, where)

    def insides(self, one: Any, other: Any, where: str) -> None:
        if isinstance(one, dict):
            assert len(one) == len(other), f"{where}: {list(one)} and {list(other)}"
            for (name, child), (other_name, other_child) in zip(one.items(), other.items(), strict=True):
                assert type(name) is type(other_name), f"{where}: keys {name!r} and {other_name!r}"
                assert name == other_name, f"{where}: keys {name!r} and {other_name!r}"
                self.check(child, other_child, f"{where}/{name}")
        elif isinstance(one, (list, tuple)) or type(one).__name__ == "deque":
            assert len(one) == len(other), where
            for i, (child, other_child) in enumerate(zip(one, other, strict=True)):
                self.check(child, other_child, f"{where}/{i}")
        elif isinstance(one, (set, frozenset)):
            assert one == other, where
        elif not hasattr(one, "__dict__"):
            assert repr(one) == repr(other), f"{where}: {one!r} and {other!r}"
        if hasattr(one, "__dict__") and not isinstance(one, types.FunctionType):
            self.check(vars(one), vars(other), f"{where}.__dict__")

    def tensors(self, one: torch.Tensor, other: torch.Tensor, where: str) -> None:
        same = (one.dtype, one.layout, one.device, one.requires_grad)
        assert same == (other.dtype, other.layout, other.device, other.requires_grad), where
        if not one.is_nested:
            assert one.shape == other.shape, where
        if self.objects.known(id(one), id(other), where):
            return
        if not one.is_nested:  # a jagged one counts those that came before it
            self.check(vars(one), vars(other), f"{where}.__dict__")
        if not is_dense(one):
            self.kept += [parts(one), parts(other)]
            self.check(*self.kept[-2:], f"{where} (parts)")
            return
        assert (one.is_conj(), one.is_neg()) == (other.is_conj(), other.is_neg()), where
        assert bits(one) == bits(other), f"{where}: values differ"
        if one.numel():
            self.memory.known(one.untyped_storage().data_ptr(), other.untyped_storage().data_ptr(), where)
        if self.strides:
            assert (one.stride(), one.storage_offset()) == (other.stride(), other.storage_offset()), where


# --- a tree of ckptool and one of torch --------------------------------------------------------------------------


def tree_equal(tree: Any, loaded: Any) -> None:
    """A tree that ckptool read, and what torch.load made of the same file: asserts that they are equal."""
    with Files() as files:
        _Same(files).check(tree, loaded, "top")


def assert_same_tensors(checkpoint: Any, loaded: dict[str, torch.Tensor]) -> None:
    """The state_dict of a checkpoint, and a dict of real tensors: keys, order, views, values to the bit, and ties."""
    found = checkpoint.state_dict()
    assert list(found) == list(loaded)
    tree_equal(found, dict(loaded))


class _Same:
    def __init__(self, files: Files) -> None:
        self.files = files
        self.objects, self.memory = _Pairs(), _Pairs()
        self.kept: list[Any] = []

    def check(self, node: Any, real: Any, where: str) -> None:
        if isinstance(node, TensorInfo):
            self.tensor(node, numbers(real) if isinstance(real, np.ndarray) else real, where)
            return
        if isinstance(node, (str, int, float, bytes, type(None))):
            assert type(node) is type(real), f"{where}: {node!r} and {real!r}"
            assert node == real or repr(node) == repr(real), f"{where}: {node!r} and {real!r}"
            return
        if isinstance(node, Global):
            name = str(real) if isinstance(real, torch.dtype) else f"{real.__module__}.{real.__qualname__}"
            assert f"{node.module}.{node.qualname}" == name, where
            return
        if isinstance(node, tuple) and not node:
            assert real == (), where
            return
        if self.objects.known(id(node), id(real), where):
            return
        mapping = as_mapping(node)
        if mapping is not None:
            assert isinstance(real, dict), f"{where}: {node!r} and {real!r}"
            assert type(real).__name__ == (type(node).__name__ if isinstance(node, dict) else node.qualname), where
            assert [(type(name), name) for name in mapping] == [(type(name), name) for name in real], where
            for name in mapping:
                self.check(mapping[name], real[name], f"{where}/{name}")
            assert "_metadata" in attributes(node) or not hasattr(real, "_metadata"), where
            if hasattr(real, "_metadata"):
                self.check(attributes(node)["_metadata"], real._metadata, f"{where}._metadata")
        elif isinstance(node, (list, tuple)):
            assert type(node) is type(real), where
            assert len(node) == len(real), where
            for i, (child, real_child) in enumerate(zip(node, real, strict=True)):
                self.check(child, real_child, f"{where}/{i}")
        elif isinstance(node, (set, frozenset, bytearray)):
            assert node == real, where
        else:
            assert isinstance(node, PyObject), f"{where}: {node!r}"
            assert not isinstance(real, (str, int, float, list, dict, torch.Tensor)), f"{where}: {node!r} for {real!r}"
            if isinstance(real, Missing):
                self.check(node.args, real.args, f"{where} (args)")
            if attributes(node) and hasattr(real, "__dict__") and not hasattr(real, "__setstate__"):
                state = {name: value for name, value in vars(real).items() if name != "args"}
                self.kept += [attributes(node), state]
                self.check(*self.kept[-2:], f"{where}.__dict__")

    def tensor(self, info: TensorInfo, real: Any, where: str) -> None:
        assert isinstance(real, torch.Tensor), f"{where}: a tensor for {real!r}"
        assert f"torch.{info.dtype}" == str(real.dtype), where
        assert info.requires_grad == real.requires_grad, where
        assert info.is_parameter == isinstance(real, torch.nn.Parameter), where
        if not is_dense(real):
            kind = str(real.layout).removeprefix("torch.") if real.layout != torch.strided else None
            kind = kind if kind != "jagged" else "nested_jagged"
            expected = kind or ("quantized" if real.is_quantized else "nested_strided" if real.is_nested else "meta")
            assert info.kind == expected, where
            assert real.is_nested or info.shape == tuple(real.shape), where
            return
        assert info.kind == "dense", where
        assert info.shape == tuple(real.shape), where
        assert (info.stride, info.storage_offset) == (real.stride(), real.storage_offset()), where
        assert info.is_contiguous == real.is_contiguous(), where
        assert (info.numel, info.nbytes) == (real.numel(), real.nbytes), where
        assert data.read_bytes(info, self.files) == bits(real), f"{where}: values differ"
        lazy = (info.extras.conj, info.extras.neg) if info.extras else (False, False)
        assert lazy == (real.is_conj(), real.is_neg()), where
        if isinstance(info.source, Derived):  # put together from parts: in memory of its own
            return
        assert isinstance(info.source, Storage), where
        if real.numel():
            self.memory.known(id(info.source), real.untyped_storage().data_ptr(), where)


def tensors_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """(path, tensor) of every tensor in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for name, child in tree.items():
            yield from tensors_of(child, (*path, name))
    elif isinstance(tree, (list, tuple)):
        for i, child in enumerate(tree):
            yield from tensors_of(child, (*path, i))


def library_takes(path: Path) -> bool:
    """Whether the reference library opens a safetensors file."""
    try:
        with safe_open(path, "np"):
            return True
    except (SafetensorError, OSError, UnicodeDecodeError, ValueError):
        return False
