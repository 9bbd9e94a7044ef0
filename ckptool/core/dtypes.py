"""One row per dtype: its names in torch, torch's storage classes and safetensors, and its size.

Sources: torch 2.13 (``torch/storage.py``, ``torch/_utils.py``) and the safetensors 0.8 specification.
Torch's name is the canonical one; the two 6-bit floats, which torch lacks, have the names ml_dtypes gives them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ckptool.errors import UnsupportedError, UsageError, near

Kind = Literal["float", "complex", "int", "bool", "quantized", "bits"]


class DType(NamedTuple):
    """A dtype: ``bits`` per element, and the names other systems give it (None where they lack it).

    ``storage`` is the typed storage class of torch's pickles; dtypes without one are pickled on an
    ``UntypedStorage`` through ``_rebuild_tensor_v3``.
    """

    name: str
    bits: int
    kind: Kind
    storage: str | None
    safetensors: str | None

    @property
    def in_torch(self) -> bool:
        """Returns whether torch has this dtype: all but the 6-bit floats."""
        return self.bits != 6

    @property
    def swap_unit(self) -> int:
        """Returns the bytes that are reversed together in a big-endian storage (complex: per component)."""
        return self.bits // 16 if self.kind == "complex" else self.bits // 8


_ROWS = (
    DType("float64", 64, "float", "DoubleStorage", "F64"),
    DType("float32", 32, "float", "FloatStorage", "F32"),
    DType("float16", 16, "float", "HalfStorage", "F16"),
    DType("bfloat16", 16, "float", "BFloat16Storage", "BF16"),
    DType("int64", 64, "int", "LongStorage", "I64"),
    DType("int32", 32, "int", "IntStorage", "I32"),
    DType("int16", 16, "int", "ShortStorage", "I16"),
    DType("int8", 8, "int", "CharStorage", "I8"),
    DType("uint8", 8, "int", "ByteStorage", "U8"),
    DType("bool", 8, "bool", "BoolStorage", "BOOL"),
    DType("complex64", 64, "complex", "ComplexFloatStorage", "C64"),
    DType("complex128", 128, "complex", "ComplexDoubleStorage", None),
    DType("complex32", 32, "complex", None, None),
    DType("uint16", 16, "int", None, "U16"),
    DType("uint32", 32, "int", None, "U32"),
    DType("uint64", 64, "int", None, "U64"),
    DType("float8_e4m3fn", 8, "float", None, "F8_E4M3"),
    DType("float8_e5m2", 8, "float", None, "F8_E5M2"),
    DType("float8_e4m3fnuz", 8, "float", None, "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 8, "float", None, "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 8, "float", None, "F8_E8M0"),
    # Two values per byte; torch counts bytes, so a safetensors F4 header has the last dimension doubled.
    DType("float4_e2m1fn_x2", 8, "float", None, "F4"),
    DType("float6_e2m3fn", 6, "float", None, "F6_E2M3"),
    DType("float6_e3m2fn", 6, "float", None, "F6_E3M2"),
    DType("bits8", 8, "bits", None, None),
    DType("bits16", 16, "bits", None, None),
    DType("bits1x8", 8, "bits", None, None),
    DType("bits2x4", 8, "bits", None, None),
    DType("bits4x2", 8, "bits", None, None),
    DType("qint8", 8, "quantized", "QInt8Storage", None),
    DType("quint8", 8, "quantized", "QUInt8Storage", None),
    DType("qint32", 32, "quantized", "QInt32Storage", None),
    DType("quint4x2", 4, "quantized", "QUInt4x2Storage", None),
    DType("quint2x4", 2, "quantized", "QUInt2x4Storage", None),
)

DTYPES = {row.name: row for row in _ROWS}

COMMON_FLOATS = ("float64", "float32", "float16", "bfloat16")
"""The dtypes whose values are cast and initialised without torch."""

BY_STORAGE = {row.storage: row for row in _ROWS if row.storage}
BY_SAFETENSORS = {row.safetensors: row for row in _ROWS if row.safetensors}

_ALIASES = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32",
    "fp64": "float64", "double": "float64", "long": "int64", "int": "int32", "short": "int16",
    "char": "int8", "byte": "uint8", "cfloat": "complex64", "cdouble": "complex128",
    "fp8": "float8_e4m3fn", "f8": "float8_e4m3fn", "float8": "float8_e4m3fn",
    "fp4": "float4_e2m1fn_x2", "float4": "float4_e2m1fn_x2",
}  # fmt: skip

_BY_BITS = {"e4m3": "e4m3fn", "e8m0": "e8m0fnu", **{bits: bits for bits in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")}}

_ALIASES |= {
    f"{start}{bits}": f"float8_{full}" for bits, full in _BY_BITS.items() for start in ("", "fp8_", "f8_", "float8_")
}


def lookup(name: str) -> DType:
    """Returns the row of a dtype by any of its names: ``bfloat16``, ``torch.bfloat16``, ``bf16`` or ``BF16``.

    >>> lookup("BF16").name, lookup("torch.half").name
    ('bfloat16', 'float16')
    """
    bare = name.strip().removeprefix("torch.")
    row = DTYPES.get(bare.lower()) or BY_SAFETENSORS.get(bare.upper())
    row = row or DTYPES.get(_ALIASES.get(bare.lower(), ""))
    if row is None:
        raise UsageError(f"unknown dtype {name!r}{near(bare, DTYPES)}; known: {', '.join(DTYPES)}")
    return row


class Changed(NamedTuple):
    """How many values a cast changed in kind.

    ``overflowed``: finite ones that became infinite or NaN, and what an integer dtype cannot hold. ``saturated``:
    those far beyond the largest finite value that became it. ``underflowed``: those that became zero, and were not.
    """

    overflowed: int = 0
    saturated: int = 0
    underflowed: int = 0


def nbytes_of(dtype: str, numel: int) -> int:
    """Returns the bytes that ``numel`` elements take; sub-byte dtypes must fill whole bytes."""
    bits = DTYPES[dtype].bits * numel
    if bits % 8:
        raise UnsupportedError(f"{numel} elements of {dtype} do not fill whole bytes")
    return bits // 8


def castable(old: str, new: str) -> bool:
    """Returns whether torch converts one dtype to the other without losing a component."""
    kinds = {DTYPES[old].kind, DTYPES[new].kind}
    packed = "float4_e2m1fn_x2" in (old, new)
    return DTYPES[old].in_torch and not packed and (kinds <= {"float", "int", "bool"} or kinds == {"complex"})
