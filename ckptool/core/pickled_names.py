"""What the classes and functions that a pickle names are for: tensors, plain data, anything else, or to act.

``tensor``: what tensors and plain containers need: the list of `torch.load(weights_only=True)`, and NumPy's arrays.
``ordinary``: classes that only hold data, by name: argparse.Namespace, pathlib, datetime, omegaconf, torch.nn.
``acting``: functions that are called and are on no list, whatever else is in Python's standard library or in packages
that run what they are given, names that reach through a module or a function, and calls of what a call returned.
``unknown``: any other class, and a function that is named and not called. `torch.load(weights_only=False)` imports its
module, and may call its methods.
"""

from __future__ import annotations

import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable
from typing import Literal

from ckptool.core.dtypes import BY_STORAGE, DTYPES

NameKind = Literal["tensor", "ordinary", "unknown", "acting"]

CALLED = "()"
"""Ends a second entry of a name in `Checkpoint.names`: the pickle calls the function, or what it made."""

_TENSOR = {
    "collections": {"OrderedDict", "Counter"},
    "builtins": {"set", "frozenset", "bytearray", "complex", "bytes"},
    "_codecs": {"encode"},
    "torch": {
        "Size", "Tensor", "device", "strided", "per_tensor_affine", "per_channel_affine",
        "per_channel_affine_float_qparams", "per_tensor_symmetric", "per_channel_symmetric",
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
    },
    "torch.nn.parameter": {"Parameter", "Buffer", "UninitializedParameter", "UninitializedBuffer"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch.jit._pickle": {  # lists and dicts of TorchScript
        "build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag",
    },
    "torch.distributed.tensor": {"DTensor"},
    "torch.distributed.tensor._dtensor_spec": {"DTensorSpec", "TensorMeta"},
    "torch.distributed.tensor.placement_types": {"Shard", "Replicate", "Partial"},
    "torch.distributed.device_mesh": {"DeviceMesh"},
    "torch.nested._internal.nested_tensor": {"NestedTensor", "_rebuild_njt"},
    # NumPy's arrays, which are read as tensors
    "numpy": {"dtype", "ndarray"},
    **{f"numpy.{core}.multiarray": {"_reconstruct"} for core in ("core", "_core")},
    **{f"numpy.{core}.numeric": {"_frombuffer"} for core in ("core", "_core")},
}  # fmt: skip

_PATHS = {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"}

_ORDINARY = {
    "argparse": {"Namespace"},
    "array": {"array", "_array_reconstructor"},
    "builtins": {
        "object", "int", "float", "str", "bool", "list", "dict", "tuple", "slice", "range", "NoneType",
        "type", "Ellipsis", "NotImplemented", "long", "unicode", "basestring", "xrange",
        "getattr",  # of a class: how protocol 2 names a nested one; any other call is told apart (see `CALLED`)
    },
    "collections": {"defaultdict", "deque", "ChainMap", "UserDict", "UserList", "UserString"},
    "copyreg": {"_reconstructor", "__newobj__", "__newobj_ex__"},
    "dataclasses": {"_MISSING_TYPE", "MISSING", "_HAS_DEFAULT_FACTORY_CLASS"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "_decimal": {"Decimal"},
    "enum": {"Enum", "IntEnum", "StrEnum", "Flag", "IntFlag", "auto", "EnumMeta", "EnumType", "ReprEnum"},
    "fractions": {"Fraction"},
    "functools": {"partial"},  # runs nothing until it is called
    "http": {"HTTPStatus", "HTTPMethod"},
    "ipaddress": {"IPv4Address", "IPv6Address", "IPv4Network", "IPv6Network"},
    "logging": {"getLogger", "Logger", "RootLogger"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "random": {"Random"},
    "re": {"_compile", "RegexFlag"},
    "sre_compile": {"compile"},
    "time": {"struct_time"},
    "types": {"SimpleNamespace", "MappingProxyType", "NoneType"},
    "uuid": {"UUID", "SafeUUID"},
    "zoneinfo": {"ZoneInfo._unpickle"},
    "numpy": {
        "bool", "bool_", "number", "integer", "floating", "generic", "datetime64", "timedelta64", "str_", "bytes_",
        "void", "record", "recarray", "matrix", "object_", "float128", "longdouble", "intc", "uintc",
        *(f"{kind}{bits}" for kind in ("int", "uint", "float", "complex") for bits in (8, 16, 32, 64, 128, 256)),
    },
    "numpy.rec": {"recarray", "record"},
    "numpy.ma": {"MaskedArray"},
    "numpy.ma.core": {"MaskedArray", "_mareconstruct"},
    **{f"numpy.{core}.multiarray": {"scalar"} for core in ("core", "_core")},
    **{f"numpy.{core}.records": {"recarray", "record"} for core in ("core", "_core")},
    "numpy.random._pickle": {"__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "deepspeed.runtime.fp16.loss_scaler": {"LossScaler", "DynamicLossScaler"},
    "deepspeed.runtime.zero.config": {"ZeroStageEnum"},
    "deepspeed.utils.tensor_fragment": {"fragment_address"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch": {
        "preserve_format", "contiguous_format", "channels_last", "channels_last_3d", "layout", "dtype", "memory_format",
    },
}  # fmt: skip

_DATA_PACKAGES = ("torch.nn.", "torch.ao.nn.", "omegaconf.", "numpy.dtypes.", "numpy.random.")
"""Packages whose classes only hold data when a pickle makes them."""

_ACTING_PACKAGES = {
    "torch.hub", "torch.jit", "torch.package", "torch.utils.cpp_extension", "torch._inductor", "torch.fx.graph_module",
    "cloudpickle", "dill", "joblib", "loky", "pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils",
    "IPython", "psutil", "pytest", "_pytest", "pexpect", "paramiko", "fabric", "invoke", "sh", "plumbum",
    "numpy.f2py", "numpy.testing", "numpy.distutils", "numpy.lib",
    "asyncore", "asynchat", "commands", "imp", "pipes", "popen2", "smtpd", "telnetlib", "test",  # of older Pythons
}  # fmt: skip
"""Packages of which even a class acts. For the rest, a function acts once it is called."""


_ACTING_CLASSES = {
    "Popen", "Process", "Thread", "Timer", "Pool", "ThreadPool", "ThreadPoolExecutor", "ProcessPoolExecutor", "CDLL",
    "InteractiveConsole", "InteractiveInterpreter", "memmap", "DataSource", "PyTorchFileReader", "PyTorchFileWriter",
    "SummaryWriter", "FileWriter", "FileHandler",
}  # fmt: skip


def is_function(qualname: str) -> bool:
    """Returns whether a name is written as functions are: a call of one may do anything, a class makes an object."""
    return not qualname.rpartition(".")[2].lstrip("_")[:1].isupper()


def kind(module: str, qualname: str) -> NameKind:
    """Returns what this class or function is for; one that ends with `CALLED` is called."""
    called = qualname.endswith(CALLED)
    name = qualname.removesuffix(CALLED)
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
    if not called and _is_needed_for_tensors(module, name):
        return "tensor"
    if not called and _is_ordinary(module, name):
        return "ordinary"
    return "acting" if called or _acts(module, name) else "unknown"


def beyond_tensors(names: Iterable[tuple[str, str]]) -> dict[str, NameKind]:
    """Returns {module and name: kind} of all names that tensors and plain containers do not need, sorted."""
    found: dict[str, NameKind] = {}
    for module, qualname in names:
        what = kind(module, qualname)
        plain = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        text = f"{plain}.{qualname.removesuffix(CALLED)}"
        if what != "tensor" and found.get(text) != "acting":
            found[text] = what
    return dict(sorted(found.items()))


def _is_needed_for_tensors(module: str, qualname: str) -> bool:
    """The list is that of `torch.load(weights_only=True)`, and has what NumPy's arrays and some subclasses need."""
    if module == "torch" and (qualname in DTYPES or qualname in BY_STORAGE):
        return True
    if module in ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse"):
        for ending in ("Tensor", "Storage"):  # torch.FloatTensor and kin: what torch.save of 2016 named
            if qualname.endswith(ending) and f"{qualname.removesuffix(ending)}Storage" in BY_STORAGE:
                return True
    if module == "torch._utils" and qualname.startswith("_rebuild_") and "." not in qualname:  # no x.__globals__.get
        return True
    return qualname in _TENSOR.get(module, ())


def _is_ordinary(module: str, qualname: str) -> bool:
    if qualname in _ORDINARY.get(module, ()):
        return True
    if "." in qualname:
        return False
    if module == "builtins":  # exceptions
        return qualname.endswith(("Error", "Exception", "Warning"))
    if module == "typing":
        return not is_function(qualname)
    if not f"{module}.".startswith(_DATA_PACKAGES):
        return False
    return not is_function(qualname) or qualname.startswith("__pyx_unpickle_")


def _acts(module: str, qualname: str) -> bool:
    parts = module.split(".")
    if parts[0] in sys.stdlib_module_names:
        return True
    if any(".".join(parts[:count]) in _ACTING_PACKAGES for count in range(1, len(parts) + 1)):
        return True
    if parts[0] == "torch" and qualname in ("load", "_load_from_bytes"):
        return True
    *above, last = qualname.split(".")
    if last in _ACTING_CLASSES:  # of the standard library, under another module's name too
        return True
    if any(is_function(name) for name in above):  # through a module, or a function's attributes
        return True
    return last.startswith("__") and last.endswith("__") and not (above and last == "__new__")
