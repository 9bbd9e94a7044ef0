"""Names the known file types that ckptool cannot read, for the error message."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from itertools import islice

from ckptool.errors import CkptoolError, FormatError, UnsupportedError, listed
from ckptool.formats import protobuf
from ckptool.io.archives import HEAD, MOST_MEMBERS, ReadAt, is_tar, reader, tar_members, unpacked
from ckptool.io.files import is_file, names_in
from ckptool.io.paths import is_url, join
from ckptool.io.probe import Probe
from ckptool.io.source import Source, read_span
from ckptool.io.zip_read import archive_start, is_zip
from ckptool.pickling.streams import CHECKPOINTS, MAGICS

MAGIC = {
    b"GGUF": "a GGUF file",
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg"), "a GGML file (older than GGUF)"),
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras .h5)",
    **dict.fromkeys((b"\4\0\0\0\1\0\0\0\3\0\0\0V 1", b"4\n1\n3\nV 1\n"), "a Torch7 file (.t7, of Lua)"),
    b"7767517\n": "an ncnn model's layers (.param)",
    b"\xdd\x85\x76\0": "an ncnn model's layers (.param.bin)",
    **dict.fromkeys((b"\x47\x6b\x30\1", b"\x38\x4b\x0d\0"), "an ncnn model's weights (.bin)"),
    b"\x12\1\0\0\0\0\0\0": "an MXNet file (.params)",
    **dict.fromkeys((b"\x0c\xdb\x20\xde", b"\x0c\xdb\x3a\x2a"), "a part of an Orbax checkpoint (OCDBT)"),
    b"model_checkpoint_path:": "the list of TensorFlow checkpoints in its directory",
    b"\x1f\x8b": "a gzip file: unpack it first (`gunzip -c FILE > OUT`)",
    b"BZh": "a bzip2 file: unpack it first (`bunzip2 -c FILE > OUT`)",
    b"\xfd7zXZ": "an xz file: unpack it first (`unxz -c FILE > OUT`)",
    b"\x5d\0\0": "an lzma file: unpack it first (`unlzma -c FILE > OUT`)",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it first (`unzstd -c FILE > OUT`)",
    b"\x04\x22\x4d\x18": "an lz4 file: unpack it first (`unlz4 -c FILE > OUT`)",
    **dict.fromkeys(
        (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"),
        "a zlib file: unpack it first (`python -c "
        "'import sys, zlib; sys.stdout.buffer.write(zlib.decompress(sys.stdin.buffer.read()))' < FILE > OUT`)",
    ),
    b"Rar!": "a RAR archive: unpack it first",
    b"7z\xbc\xaf": "a 7-zip archive: unpack it first",
}
"""The first bytes of known files."""

FLATBUFFERS = {b"TFL3": "a TFLite model", b"ET12": "an ExecuTorch program", b"PTMF": "a TorchScript flatbuffer (.ff)"}
"""Bytes 4 to 8 of known files."""

FLAX = re.compile(
    rb"(?:[\x81-\x8f]|\xde..|\xdf....)(?:[\xa1-\xbf]|\xd9.)[A-Za-z_0-9][\w./-]*(?=[\x80-\xdf])", re.DOTALL
)
"""How a map of MessagePack begins whose first key is a name."""

SCHEMA = re.compile(rb"(\s|#[^\n]*\n)*schema\s*=\s*\d")
"""How a schema of patterns may begin (see `ckptool.references.schema`)."""

LEVELDB = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
"""The last bytes of a LevelDB table, which a TensorFlow checkpoint's index is (``tensorflow/core/lib/io/table.cc``)."""

WEIGHTS = (".pth", ".pt", ".bin", ".ckpt", ".pyth", ".th", ".pth.tar", ".safetensors", ".pkl", ".npz", ".npy", ".gguf")
"""Suffixes of members of an archive that are likely checkpoints."""


def following(file: Source, end: int) -> str:
    """Returns what follows the end of a file's content, for a note; looks at the first bytes only."""
    head = file.read(end, min(4096, file.size - end))
    kind = next((kind.partition(":")[0] for magic, kind in MAGIC.items() if head.startswith(magic)), "unknown bytes")
    if head.startswith(CHECKPOINTS):
        kind = "another torch.save?"
    elif head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        kind = "a pickle?"
    elif not any(head):
        kind = "zeros, as padding"
    elif head.isascii() and head.decode("ascii").replace("\n", "").replace("\r", "").isprintable():
        kind = "text"
    how = f" `tail -c +{end + 1} FILE` gives them as a file" if kind.endswith("?") else ""
    return f"{file.size - end} bytes after the end, from byte {end} on, are not read: {kind}{how}"


FOREIGN = {
    r"saved_model\.pb(txt)?": "a TensorFlow SavedModel",
    r".*\.data-\d{5}-of-\d{5}": "a TensorFlow checkpoint",
    r"Manifest\.json": "a Core ML package (.mlpackage)",
    r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt": "an Orbax checkpoint",
    r"\.zarray|\.zgroup|zarr\.json": "an array or group in Zarr's format (Orbax, T5X)",
    r".*\.param": "an ncnn model",
    r".*\.onnx": "an ONNX model",
    r".*\.h5": "an HDF5 file (Keras .h5)",
    r".*\.keras": "a Keras archive (.keras)",
    r".*\.msgpack": "a MessagePack file (Flax)",
    r".*\.ml(package|model)": "a Core ML model",
}
"""Patterns of file names in directories of other frameworks, asked where no format fits; the first match decides."""

TOOLS = {
    "Keras archive": "h5py.File, after `unzip FILE model.weights.h5`,", "HDF5": "h5py.File",
    "TensorFlow checkpoint": "tf.train.load_checkpoint",
    "SavedModel": "tf.train.load_checkpoint('variables/variables')",
    "ONNX": "onnx.numpy_helper.to_array", "Orbax": "orbax.checkpoint.StandardCheckpointer().restore",
    "Flax": "flax.serialization.msgpack_restore", "Core ML": "coremltools", "MXNet": "mxnet.nd.load",
    "Torch7": "torchfile.load", "TFLite": "tf.lite.Interpreter", "Caffe model": "caffe.Net",
}  # fmt: skip
"""What gives the arrays of another framework's file, by a word of its kind."""


def _not_read(kind: str, path: str) -> UnsupportedError:
    """Returns the error for a file of another framework, with what gives its arrays."""
    tool = next((tool for word, tool in TOOLS.items() if word in kind), "")
    how = f": {tool} gives its arrays; store them with numpy.savez" if tool else ""
    return UnsupportedError(f"{kind}; it is not a format ckptool reads{how}", path)


def _directory(probe: Probe) -> CkptoolError:
    """Returns the error for a directory: another framework's, or one without weights, which directories in it have."""
    if kind := _foreign_names(probe.names):
        return _not_read(kind, probe.path)
    paths = {name: join(probe.path, name) for name in probe.names[:MOST_MEMBERS]}
    found = {name: names_in(path) for name, path in paths.items() if is_url(path) or os.access(path, os.R_OK)}
    weights = (*WEIGHTS, ".metadata", ".distcp", ".index.json")
    inside = [name for name, names in found.items() if any(one.endswith(weights) for one in names)]
    lacks = "a directory without an index or a file of weights"
    if inside:
        return FormatError(f"{lacks} in it; name one of its directories that have: {listed(inside)}", probe.path)
    kinds = (f"{kind}, in its directory {name}" for name, names in found.items() if (kind := _foreign_names(names)))
    kind = next(kinds, None)
    return _not_read(kind, probe.path) if kind else FormatError(lacks, probe.path)


def _foreign_names(names: Sequence[str]) -> str | None:
    """Returns which framework's directory has these names."""
    kinds = (kind for mark, kind in FOREIGN.items() if any(re.fullmatch(mark, name, re.DOTALL) for name in names))
    return next(kinds, None)


def refusal(probe: Probe) -> CkptoolError:
    """Returns the error for an input of no known format, saying what it is if that is recognized."""
    if probe.is_directory:
        return _directory(probe)
    file, head = probe.file, probe.head
    if is_zip(file):
        return _archive(probe)
    text = head.lstrip().lower()
    if not head:
        return FormatError("an empty file (0 bytes)", file.path)
    if head.startswith(b"version https://git-lfs"):
        return FormatError("a Git LFS pointer, not the file itself: run `git lfs pull`", file.path)
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        return FormatError("an HTML or XML page, not a checkpoint: the download gave an error page", file.path)
    if head.startswith(b"PK\x05\x06"):
        return FormatError("an empty zip archive", file.path)
    if (inside := unpacked(file, head)) is not None:
        return UnsupportedError(_compressed(inside, head), file.path)
    if is_tar(head):
        return UnsupportedError(f"a tar archive{_inside(tar_members(reader(file)), 'tar xf FILE')}", file.path)
    if kind := _foreign(probe):
        return _not_read(kind, file.path)
    if SCHEMA.match(head):
        what = (
            "a schema of patterns, which has no tensors: `ckptool diff SCHEMA.toml FILE` holds a checkpoint against it"
        )
        return UnsupportedError(what, file.path)
    if probe.name.lower().endswith(".toml"):
        return FormatError("a TOML file, no checkpoint; a schema of patterns begins with schema = 1", file.path)
    if text.startswith((b"{", b"[")):
        return FormatError("a JSON file; an index must be named *.index.json and have a weight_map", file.path)
    unknown = "no checkpoint that ckptool knows: neither torch, safetensors nor an index"
    try:
        begins = archive_start(file)
    except FormatError:  # no zip archive in it
        return FormatError(unknown, file.path)
    what = f"; a zip archive begins at byte {begins}: `tail -c +{begins + 1} FILE` gives it as a file" if begins else ""
    return FormatError(f"{unknown}{what}", file.path)


def _foreign(probe: Probe) -> str | None:
    """Returns what a file of another framework is: by its first or last bytes, its structure, the files beside it."""
    file, head = probe.file, probe.head
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[4:8] in FLATBUFFERS:
        return FLATBUFFERS[head[4:8]]
    if FLAX.match(head):
        return "a MessagePack file (Flax)"
    read_at = reader(file)
    if read_at(max(0, file.size - 8), 8) == LEVELDB:
        return "a TensorFlow checkpoint (its index, or all of it in version 1)"
    if head[:8] == b"\3\0\0\0\1\0\0\0" and head[12:16] in (b"\1\0\0\0", b"\2\0\0\0"):
        return "a Torch7 file (.t7, of Lua: a table)"
    index = re.sub(r"\.data-\d{5}-of-\d{5}$", ".index", probe.path)
    if index != probe.path and is_file(index):
        return "the data of a TensorFlow checkpoint"
    if probe.path.endswith(".bin") and is_file(probe.path.removesuffix(".bin") + ".param"):
        return "an ncnn model's weights (.bin beside .param)"
    return protobuf.kind(read_at, file.size)


def _archive(probe: Probe) -> CkptoolError:
    if {"model.weights.h5", "config.json"} <= probe.members.keys():
        return _not_read("a Keras archive (.keras)", probe.path)
    what = _inside(((name, _head(probe, name)) for name in islice(probe.members, MOST_MEMBERS)), "unzip FILE")
    if what.startswith(_HOLDS):
        return UnsupportedError(f"a zip archive{what}", probe.path)
    return FormatError(f"a zip archive without data.pkl: not made by torch.save{what}", probe.path)


def _head(probe: Probe, name: str) -> bytes:
    """Returns the first bytes of a zip member; b"" if they cannot be read, as they only serve a message."""
    try:
        return read_span(probe.file, probe.members[name].span, HEAD)
    except FormatError:
        return b""


def _compressed(read_at: ReadAt, head: bytes) -> str:
    """Returns what a compressed file is, by what is in it."""
    packed = next(kind for magic, kind in MAGIC.items() if head.startswith(magic))
    start = read_at(0, 512)
    if is_tar(start):
        return f"{packed.partition(':')[0].removesuffix(' file')}-compressed tar archive" + _inside(
            tar_members(read_at), "tar xf FILE"
        )
    kind = next((kind.partition(":")[0] for magic, kind in MAGIC.items() if start.startswith(magic)), "")
    kind = "a pickle" if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") else kind
    kind = "a joblib file" if b"joblib.numpy_pickle" in start else kind
    kind = "a checkpoint of torch" if start.startswith(CHECKPOINTS) else kind
    kind = "a safetensors file" if start[8:9] == b"{" and not any(start[5:8]) else kind
    return packed.replace(":", f" with {kind} in it:") if kind else packed


_HOLDS = " that holds"


def _inside(members: Iterable[tuple[str, bytes]], command: str) -> str:
    """Returns what an archive holds, given (name, first bytes), as the end of a message: what to extract, and how."""
    names, weights, nested = [], [], []
    for name, head in members:
        base = name.rpartition("/")[2]
        if not base or base.startswith("._"):  # directories, and what macOS adds
            continue
        names.append(name)
        if base.lower().endswith(WEIGHTS) or head.startswith(MAGICS):
            weights.append(name)
        elif head.startswith((b"PK\3\4", *MAGIC)):
            nested.append(name)
    wanted = weights or nested
    if not wanted:
        return f", and no checkpoint in it: {listed(names)}" if names else ", and nothing in it"
    return f"{_HOLDS} {listed(wanted)}: extract it first (`{command} {shlex.quote(wanted[0])}`)"
