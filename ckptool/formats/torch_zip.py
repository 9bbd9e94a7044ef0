"""torch.save's zip archive (torch >= 1.6).

    ROOT/data.pkl              the tree, protocol 2; tensors are calls that name a storage by persistent id
    ROOT/.format_version       "1": storages are numbered in the order of first use
    ROOT/.storage_alignment    "64"
    ROOT/byteorder             "little" | "big"
    ROOT/data/0, 1, ...        raw storages, each beginning on a multiple of 64
    ROOT/version               "3\\n"

Source: ``torch/serialization.py`` and ``caffe2/serialize/inline_container.cc`` of torch 2.13.
"""

from __future__ import annotations

from typing import Any, Literal

from ckptool import pickles, rebuild
from ckptool.checkpoint import Checkpoint, Storage
from ckptool.errors import FormatError, UnsupportedError
from ckptool.files import File, Files, Output
from ckptool.layout import Layout, MapLocation
from ckptool.tree import brief
from ckptool.zips import is_zip, read_directory, read_small
from ckptool.zipwriter import ZipWriter

NAME = "torch-zip"
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pyth", ".pth.tar", ".pt.tar", ".tar")


def matches(file: File) -> bool:
    """Returns whether it is a zip archive; `read` tells torch's own from its neighbours."""
    return is_zip(file)


def read(file: File) -> Checkpoint:
    """Returns the checkpoint; reads the zip directory and data.pkl.

    Raises: FormatError, LimitError; UnsupportedError for TorchScript, torch.export, torch.package and npz.
    """
    members = read_directory(file)
    root = next(iter(members), "").split("/", 1)[0]
    _refuse_neighbours(file, root, set(members))
    prefix = f"{root}/data/"
    order = read_small(file, members, f"{root}/byteorder", 16)
    if order not in (None, b"little", b"big"):
        raise FormatError(f"its byteorder record reads {order!r}", file.path)
    byteorder: Literal["little", "big"] = "big" if order == b"big" else "little"
    storages: dict[str, Storage] = {}

    def persistent_load(pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise FormatError(f"it refers to something that is no storage: {brief(pid)}")
        _, storage_type, key, location, numel = pid[:5]
        if not isinstance(key, str):
            raise FormatError(f"a storage's key is {brief(key)}")
        dtype = rebuild.dtype_of_storage(storage_type)
        storage = storages.get(key)
        if storage is None:
            member = members.get(f"{prefix}{key}")
            if member is None:
                raise FormatError(f"the storage {key!r} is named in data.pkl and absent from the archive")
            expected = rebuild.storage_nbytes(dtype, numel)
            if member.span.nbytes != expected:
                raise FormatError(f"the storage {key!r} has {member.span.nbytes} bytes; data.pkl says {expected}")
            storage = Storage(member.span, dtype, rebuild.location(location), byteorder, member.crc32 or None)
            storages[key] = storage
        elif storage.dtype != dtype:
            raise UnsupportedError(f"the storage {key!r} is used under two types: {storage.dtype} and {dtype}")
        return storage

    pickled = read_small(file, members, f"{root}/data.pkl", pickles.MAX_PICKLE) or b""
    pickles.scan(pickled)
    tree, names = pickles.load(pickled, builders=rebuild.builders, persistent_load=persistent_load)
    return Checkpoint(tree, format=NAME, url=file.path, nbytes=file.size, names=names)


def _refuse_neighbours(file: File, root: str, names: set[str]) -> None:
    """Says by name which other kind of zip archive this is."""
    inner = {name.split("/", 1)[1] for name in names if name.startswith(f"{root}/")}
    kind = None
    if "constants.pkl" in inner or "model.json" in inner:
        kind = "a TorchScript archive (torch.jit.save)"
    elif "archive_format" in inner or "serialized_state_dict.pt" in names:
        kind = "a torch.export archive (.pt2)"
    elif ".data/extern_modules" in inner:
        kind = "a torch.package archive"
    elif any(name.endswith(".npy") for name in names):
        kind = "a NumPy archive (.npz)"
    if kind:
        raise UnsupportedError(f"{kind}, which is not supported yet", file.path)
    if "data.pkl" not in inner:
        raise FormatError("a zip archive without data.pkl: not made by torch.save", file.path)
    if any(not name.startswith(f"{root}/") for name in names):
        raise FormatError(f"its members are not all below {root}/: torch.load refuses it too", file.path)


def write(
    checkpoint: Checkpoint, output: Output, files: Files, map_location: MapLocation | None = None
) -> tuple[str, ...]:
    """Writes the whole tree, streaming; the result is laid out as torch 2.13 lays it out. Returns what was left out.

    Storages are numbered in the order of first use; views of one storage stay views of one storage,
    and what no tensor uses of a storage is not written.
    """
    layout = Layout(checkpoint.tree, map_location)
    pickled, used = layout.pickled(lambda storage, number: rebuild.persistent_id(storage, str(number)))
    output.reserve(len(pickled) + sum(storage.nbytes + 256 for storage in used) + 4096)
    archive = ZipWriter(output, "archive")
    archive.add("data.pkl", pickled)
    archive.add(".format_version", b"1")
    archive.add(".storage_alignment", b"64")
    archive.add("byteorder", b"little")
    for number, storage in enumerate(used):
        crc32 = layout.content(storage).crc32
        archive.add_blocks(f"data/{number}", storage.nbytes, layout.blocks(storage, files), crc32)
    archive.add("version", b"3\n")
    archive.close()
    return ()
