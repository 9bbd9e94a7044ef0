"""Pickles put together by hand, opcode by opcode, and the files that hold them."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from pathlib import Path

from ckptool.formats.pytorch import legacy as torch_legacy

THING = b"csongbird\nThing\n"
"""A class of the module that `test_untrusted` makes importable."""


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(encoded)) + encoded


def mapping(*parts: bytes) -> bytes:
    return b"}(" + b"".join(parts) + b"u"


def pid(key: bytes = text("0"), location: bytes = text("cpu"), numel: bytes = b"K\x01") -> bytes:
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + key + location + numel + b"tQ"


def tensor(
    storage: bytes = pid(), offset: bytes = b"K\x00", shape: bytes = b"K\x01\x85", stride: bytes = b"K\x01\x85"
) -> bytes:
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + stride + b"\x89" + hooks + b"tR"


def archive(pickled: bytes, path: str = "hostile.pth", method: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(path, "w", method) as made:
        made.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        made.writestr("archive/version", "3\n")
        made.writestr("archive/data/0", struct.pack("<f", 1))
    return path


def beside(payload: bytes) -> bytes:
    return b"\x80\x02" + mapping(text("w"), tensor(), text("hook"), payload) + b"."


def model(pickled: bytes) -> str:
    return zipped(b"\x80\x02" + pickled + b".")


def zipped(pickled: bytes, path: str = "given.pth") -> str:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/version", "3\n")
        made.writestr("archive/data/0", struct.pack("<f", 1))
    return path


def legacy(payload: bytes, place: str, path: str = "given.pth") -> str:
    """torch's stream of five pickles, with a payload in one of them."""
    thrown = payload + b"0" if payload else b""
    parts = {
        "magic": torch_legacy.MAGIC,
        "version": b"\x80\x02M\xe9\x03.",
        "system": b"\x80\x02}.",
        "tree": b"\x80\x02" + mapping(text("w"), tensor()) + b".",
        "keys": b"\x80\x02]" + text("0") + b"a.",
    }
    if place == "tree":
        parts[place] = beside(payload)
    elif place == "in the system's dict":
        parts["system"] = b"\x80\x02}" + text("type_sizes") + payload + b"s."
    else:
        parts[place] = parts[place][:2] + thrown + parts[place][2:]
    Path(path).write_bytes(b"".join(parts.values()) + struct.pack("<qf", 1, 1))
    return path


def tarred(payload: bytes, place: str, path: str = "given.pth") -> str:
    """torch's archive of 2016, with a payload in one of its members."""
    storage = b"\x80\x02K\x00" + text("cpu") + b"ctorch\nFloatStorage\n\x87."
    described = b"\x80\x02K\x01K\x00ctorch\nFloatTensor\n\x87."
    one, none = b"\x80\x02K\x01.", b"\x80\x02]."
    thrown = b"\x80\x02" + payload + b"0"
    members = {
        "sys_info": b"\x80\x02}.",
        "storages": one + storage + struct.pack("<qf", 1, 1) + none,
        "tensors": one + described + struct.pack("<i4xqqq", 1, 1, 1, 0),
        "pickle": b"\x80\x02" + mapping(text("w"), b"K\x01Q") + b".",
    }
    if place == "pickle":
        members[place] = b"\x80\x02" + mapping(text("w"), b"K\x01Q", text("hook"), payload) + b"."
    elif place == "views":
        members["storages"] = members["storages"][: -len(none)] + thrown + none[2:]
    elif place == "a storage":
        members["storages"] = members["storages"].replace(storage, thrown + storage[2:])
    elif place == "a tensor":
        members["tensors"] = members["tensors"].replace(described, thrown + described[2:])
    else:
        members[place] = thrown + members[place][2:]
    with tarfile.open(path, "w") as made:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return path
