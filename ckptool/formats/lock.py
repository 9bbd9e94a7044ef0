"""A lock file: the keys, shapes and dtypes of a checkpoint as text, for a repository that holds no weights.

    # ckptool lock 1, 3 keys
    conv1.weight  float32  64x3x7x7  parameter  sha256:9f86...
    head.bias     float32  1000      tied:"odd\\tkey"
    scale         bfloat16 scalar

The first line names the schema, and says how many keys there are (older locks do not). Then comes a line for each
key, sorted, its fields separated by single tabs: the key, the dtype, the sizes (``scalar`` for none, ``nested`` for a
nested tensor), and what else is known: ``parameter`` or ``buffer``, ``kind:`` of a tensor that is no strided view,
``tied:`` to the first key of a tie group, and the ``sha256:`` that `inspect --hash` gives. A key that is empty, not
printable, or begins with ``"`` or ``#`` is a JSON string. The document that `inspect --json` prints of one checkpoint
is read too. A tensor of a lock is on ``meta``, has no values, and its `Opaque.described_in` names the lock and has
the hash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache

from ckptool.core import modules
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Described, Opaque, TensorInfo, contiguous_stride, is_countable
from ckptool.core.tree import Global, brief
from ckptool.errors import FormatError, UnsupportedError
from ckptool.io.probe import Probe
from ckptool.limits import MAX_INDEX
from ckptool.text import dims

MAGIC = "# ckptool lock "
SCHEMA = 1
HEAD = re.compile(r"1(?:, (\d{1,9}) keys)?", re.ASCII)
DOCUMENT = re.compile(rb'\{\s*"schema":\s*1,\s*"command":\s*"inspect",')
SHAPE = re.compile(r"\d{1,19}(x\d{1,19}){0,999}", re.ASCII)
FIELD = re.compile(r"(parameter)|(buffer)|kind:(\w{1,40})|tied:(.+)|sha256:([0-9a-f]{64})", re.ASCII | re.DOTALL)


def matches(probe: Probe) -> bool:
    """Returns whether its first line names it, or it is the output of `inspect --json`."""
    return probe.head.startswith(MAGIC.encode()) or DOCUMENT.match(probe.head) is not None


def text(checkpoint: Checkpoint, chosen: Mapping[str, TensorInfo], hashes: Mapping[str, str | None]) -> str:
    """Returns the lock of the ``chosen`` tensors of a checkpoint; ``hashes``: {key: sha256}, where they are known."""
    whole = checkpoint.format == "model" or modules.is_module(checkpoint.at(checkpoint.root))
    first: dict[object, str] = {}
    lines = [_head(len(chosen))]
    for key in sorted(chosen):
        tensor, role = chosen[key], ""
        if tensor.is_parameter or whole:
            role = "parameter" if tensor.is_parameter else "buffer"
        kind = "" if tensor.kind in ("dense", "meta") else f"kind:{tensor.kind}"
        kept = first.setdefault(tensor.view, key) if tensor.numel else key
        tied = f"tied:{_written(kept)}" if kept != key else ""
        digest = f"sha256:{hashes[key]}" if hashes.get(key) else ""
        fields = (_written(key), tensor.dtype, dims(tensor.shape), role, kind, tied, digest)
        lines.append("\t".join(filter(None, fields)))
    return "\n".join(lines) + "\n"


def _head(count: int) -> str:
    return f"{MAGIC}{SCHEMA}, {count} keys"


def _written(key: str) -> str:
    return key if key and key.isprintable() and key[0] not in '"#' else json.dumps(key)


def read(probe: Probe) -> Checkpoint:
    """Returns the checkpoint: {key: tensor without values}. Raises: FormatError naming the line; UnsupportedError."""
    file = probe.file
    if file.size > MAX_INDEX.now():
        raise MAX_INDEX.passed(f"a lock file of {file.size:,} bytes", file.size, file.path)
    try:
        content = file.read(0, file.size).decode()
    except UnicodeDecodeError as error:
        raise FormatError("is a lock file, and no UTF-8", file.path) from error
    if content.startswith("{"):
        content = _of_document(content, file.path)
    head, *lines = content.replace("\r\n", "\n").split("\n")
    version = head[len(MAGIC) :]
    said = HEAD.fullmatch(version)
    if said is None:
        what = f"is a lock file of schema {brief(version)}: this ckptool reads {SCHEMA}; a newer one may read it"
        raise UnsupportedError(what, file.path)
    if not lines or lines.pop():
        raise FormatError(
            f"line {len(lines) + 2}: expected a newline at its end: the lock file is cut short", file.path
        )
    if said[1] is not None and int(said[1]) != len(lines):
        what = f"line 1: expected {said[1]} keys as it says, found {len(lines)}: the lock file is cut short or edited"
        raise FormatError(f"{what}; inspect --lock FILE --update-lock writes it anew", file.path)
    notes = () if said[1] else ("an older lock file, which does not say how many keys it has: it may be cut short",)
    tree: dict[str, TensorInfo] = {}
    ties: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines, 2):
        try:
            key, tensor, tied = _line(line, file.path)
            if key in tree:
                raise FormatError(f"the key {brief(key)} stands twice")
        except FormatError as error:
            raise FormatError(f"line {number}: {error.message}", file.path) from error
        tree[key] = tensor
        if tied is not None:
            ties[key] = number, tied
    for key, (number, tied) in ties.items():
        one, other = tree[key], tree.get(tied)
        source = None if other is None else other.source
        if (
            other is None
            or not isinstance(source, Opaque)
            or tied in ties
            or (one.dtype, one.shape) != (other.dtype, other.shape)
        ):
            what = f"{brief(key)} is tied to {brief(tied)}: expected a key of its dtype and shape that is not tied on"
            raise FormatError(f"line {number}: {what}", file.path)
        tree[key] = _tensor(one.dtype, one.shape, one.is_parameter, source)
    return Checkpoint(tree, url=file.path, nbytes=file.size, notes=notes)


def _of_document(content: str, url: str) -> str:
    """Returns the output of `inspect --json` as a lock, a line for each row. Raises: FormatError."""
    try:
        found = json.loads(content)
        (one,) = found["result"]
        rows = [*one["tensors"], *one.get("inside", ())]
        if "errors" in found:
            raise FormatError("is the output of an inspect that failed", url)
        lines = [
            "\t".join([
                _written(row["key"]), row["dtype"], dims(row.get("shape")),
                *(f"kind:{row['kind']}" for _ in range(row.get("kind", "meta") != "meta")),
                *(f"tied:{_written(row['tied_to'])}" for _ in range("tied_to" in row)),
                *(f"sha256:{row['hash']}" for _ in range("hash" in row)),
            ])
            for row in rows
        ]  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError("expected what `inspect --json` prints of one checkpoint", url) from error
    return "\n".join([_head(len(lines)), *lines, ""])


def _line(line: str, url: str) -> tuple[str, TensorInfo, str | None]:
    """Returns the key and tensor of a line, and the key that it is tied to. Raises: FormatError."""
    fields = line.split("\t")
    if len(fields) < 3:
        raise FormatError(f"expected a key, a dtype and a shape with tabs between them, found {brief(line)}")
    key, dtype, sizes = _key(fields[0]), fields[1], fields[2]
    if dtype not in DTYPES:
        raise FormatError(f"expected a dtype, found {brief(dtype)}")
    shape: tuple[int, ...] | None = None if sizes == dims(None) else ()
    if sizes not in (dims(None), dims(())):
        shape = tuple(map(int, sizes.split("x"))) if SHAPE.fullmatch(sizes) else (-1,)
    if shape and (min(shape) < 0 or not is_countable(shape)):
        raise FormatError(f"expected a shape such as 64x3x7x7, found {brief(sizes)}")
    found = [FIELD.fullmatch(field) for field in fields[3:]]
    said = [match.lastindex for match in found if match]
    if None in found or len(set(said)) < len(said) or {1, 2} <= {*said}:
        raise FormatError(f"expected parameter or buffer, kind:, tied: and sha256:, found {brief(fields[3:])}")
    known = {match.lastindex: match[match.lastindex or 0] for match in found if match}
    if shape is None and 3 not in known:
        raise FormatError("expected the kind: of a nested tensor")
    made = _named("torch._utils", "_rebuild_meta_tensor_no_storage")
    node = made(_named("torch", dtype), shape or (), contiguous_stride(shape or ()), False)
    described = Described(url, "a lock file, which holds no values", known.get(5, ""))
    tensor = _tensor(dtype, shape, 1 in known, Opaque(known.get(3, "meta"), node, described_in=described))
    return key, tensor, _key(known[4]) if 4 in known else None


@cache
def _named(module: str, name: str) -> Global:
    return Global.named(module, name)


def _tensor(dtype: str, shape: tuple[int, ...] | None, is_parameter: bool, source: Opaque) -> TensorInfo:
    return TensorInfo(dtype, shape, contiguous_stride(shape or ()), 0, source, is_parameter, is_parameter)


def _key(field: str) -> str:
    """Returns the key that a field means. Raises: FormatError."""
    key: object = field
    if field.startswith('"'):
        try:
            key = json.loads(field)
        except (ValueError, RecursionError):
            key = None
    if not isinstance(key, str) or _written(key) != field:
        raise FormatError(f"expected a key, found {brief(field)}")
    return key
