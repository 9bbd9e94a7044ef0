"""The allow-list of classes and functions that a pickle of tensors and plain containers needs."""

from __future__ import annotations

from ckptool.core.dtypes import BY_STORAGE, DTYPES

_SAFE = {
    "collections": {"OrderedDict", "Counter"},
    "builtins": {"set", "frozenset", "bytearray", "complex", "bytes"},
    "_codecs": {"encode"},
    "torch": {
        "Size", "Tensor", "device", "strided", "per_tensor_affine", "per_channel_affine",
        "per_channel_affine_float_qparams", "per_tensor_symmetric", "per_channel_symmetric",
    },
    "torch.nn.parameter": {"Parameter", "Buffer", "UninitializedParameter", "UninitializedBuffer"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "torch._tensor": {"_rebuild_from_type_v2"},
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


def is_needed_for_tensors(module: str, qualname: str) -> bool:
    """Returns whether tensors and plain containers need this class or function; any other may run arbitrary code.

    The list is close to that of `torch.load(weights_only=True)`, and has what NumPy's arrays need.
    """
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    if module == "torch" and (qualname in DTYPES or qualname in BY_STORAGE):
        return True
    if module == "torch" and qualname.endswith("Tensor") and f"{qualname[:-6]}Storage" in BY_STORAGE:
        return True  # torch.FloatTensor and kin: what torch.save of 2016 named
    if module == "torch._utils" and qualname.startswith("_rebuild_") and "." not in qualname:  # no x.__globals__.get
        return True
    return qualname in _SAFE.get(module, ())
