"""Statistics, hashes and damage of a checkpoint's data. Planned so that no byte is read twice.

The hash of a tensor is the sha256 of ``DTYPE[SHAPE]`` and a newline in ASCII (torch's name of the dtype, the sizes
joined with commas: ``float32[64,3,7,7]``, ``int64[]``), then its elements in C order, little-endian. That of a tensor
made of parts is the sha256 of ``KIND DTYPE[SHAPE]`` and a newline, a quantised one's parameters and a newline, and the
hashes of its parts, each with a newline. That of the whole is the sha256 of a line ``HASH  KEY`` for every key, as
`sha256sum` prints it, sorted by the keys' UTF-8 bytes; in a key a backslash is written twice and a newline as ``\\n``.
A tensor inside an entry that is no tensor, such as packed parameters, has the key ``ENTRY/PATH``.
None depends on the file format, on the order of keys, or on how the elements lie in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.findings import Finding, PrefixStats, Stats, not_finite
from ckptool.core.tensor import Opaque, Span, Storage, TensorInfo, quantization, whole_storage
from ckptool.core.tree import path_text, walk
from ckptool.errors import FormatError, listed
from ckptool.io import zip_read as zips
from ckptool.io.files import Files, is_file
from ckptool.io.paths import basename
from ckptool.values.scan import CHUNK, Job, read

if TYPE_CHECKING:
    from ckptool.values.stats import Moments

Choose = Callable[[str], bool]


@dataclass(slots=True)
class Contents:
    """The results by key, by prefix and of the whole. ``missed`` says what could not be computed, and why."""

    stats: dict[str, Stats] = field(default_factory=dict)
    prefixes: list[PrefixStats] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    whole: str | None = None
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


def look_into(
    checkpoint: Checkpoint,
    choose: Choose | None = None,
    *,
    stats: bool = False,
    hashes: bool = False,
    check: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Contents:
    """Returns the results for the tensors at root that ``choose`` accepts; ``check`` without it checks the whole file.

    Each tie group is read once. Memory does not grow with the file. Raises: UnreadableError; FormatError, which with
    ``check`` becomes a finding; IncompleteError for ``hashes`` of a checkpoint that lacks shards.
    """
    checkpoint.require_values("there is nothing to compute")
    chosen = {key: tensor for key, tensor in checkpoint.state_dict().items() if choose is None or choose(key)}
    found = Contents()
    plan = _Plan(lenient=check)
    if stats:
        from ckptool.values.codec import has_values

        measured: dict[str, Job] = {}
        missed: dict[str, list[str]] = {}
        for key, tensor in chosen.items():
            if not isinstance(tensor.source, Opaque) and has_values(tensor.dtype):
                measured[key] = plan.job(tensor)
                measured[key].moments = True
            else:
                kind = f"{tensor.kind} tensors" if isinstance(tensor.source, Opaque) else tensor.dtype
                missed.setdefault(kind, []).append(key)
        found.missed += [f"no statistics of {what}: {', '.join(keys)}" for what, keys in missed.items()]
    hashed = {**chosen, **{key: one for key, one in checkpoint.inside().items() if choose is None or choose(key)}}
    if hashes:
        checkpoint.require_whole()
        for tensor in hashed.values():
            plan.hash(tensor)
    named = _named(checkpoint, chosen, whole=choose is None) if check else {}
    floats = [(tensor, key) for tensor, key in named.values() if DTYPES[tensor.dtype].kind in ("float", "complex")]
    for tensor, _ in floats:
        plan.job(tensor).special = True
    with Files(progress, CHUNK) as files:
        records = list(_records(checkpoint, plan, found, files)) if check else []
        read([*plan.jobs.values(), *(record.job for record in records if isinstance(record.job.source, Span))], files)

    if stats:
        moments = {key: job.found_moments for key, job in measured.items() if job.error is None}
        found.stats = {key: one.stats() for key, one in moments.items()}
        for one in moments.values():
            one.bins = None  # to add them for every prefix would take longer than to count them
        found.prefixes = _by_prefix({key: (chosen[key].view, one) for key, one in moments.items()})
    if hashes:
        made = {key: _hash(tensor, plan) for key, tensor in hashed.items()}
        found.hashes = {key: digest for key, digest in made.items() if digest is not None}
        found.whole = _whole(found.hashes) if hashed and len(found.hashes) == len(hashed) else None
    if check:
        found.findings += _wrong(records, named)
        reported = {id(record.job) for record in records}
        for tensor, key in floats:
            job = plan.job(tensor)
            if job.error is None:
                found.findings += not_finite(key, *job.found_special, tensor.numel)
            elif id(job) not in reported:
                found.findings.append(Finding("data", job.error, key))
    return found


class _Plan:
    """The jobs so far, one for each view of a storage."""

    def __init__(self, lenient: bool) -> None:
        self.lenient = lenient
        self.jobs: dict[object, Job] = {}

    def job(self, tensor: TensorInfo) -> Job:
        """Returns the job of a tensor, a new one if it has none."""
        view = tensor.view
        found = self.jobs.get(view)
        if found is None:
            found = self.jobs[view] = Job(tensor, lenient=self.lenient)
        return found

    def hash(self, tensor: TensorInfo) -> None:
        """Has what `_hash` needs computed."""
        for part in tensor.parts if isinstance(tensor.source, Opaque) else (tensor,):
            self.job(part).head = f"{_form(part)}\n".encode("ascii")


# --- statistics --------------------------------------------------------------------------------------------------


def _by_prefix(moments: Mapping[str, tuple[object, Moments]]) -> list[PrefixStats]:
    """Returns the statistics below each prefix of two tensors or more, "" being the whole; a tie group counts once."""
    from ckptool.values.stats import Moments

    sums: dict[str, Moments] = {}
    counts: dict[str, int] = {}
    seen: set[tuple[str, object]] = set()
    for key, (view, one) in moments.items():
        prefix = key
        while prefix:
            prefix = prefix.rpartition(".")[0]
            if prefix not in sums:
                sums[prefix], counts[prefix] = Moments(), 0
            counts[prefix] += 1
            if (prefix, view) not in seen:
                seen.add((prefix, view))
                sums[prefix].add(one)
    return [PrefixStats(prefix, counts[prefix], sums[prefix].stats()) for prefix in sorted(sums) if counts[prefix] > 1]


# --- hashes ------------------------------------------------------------------------------------------------------


def digest(tensor: TensorInfo, files: Files) -> str | None:
    """Returns the hash of one tensor. Raises: as `look_into`."""
    plan = _Plan(lenient=False)
    plan.hash(tensor)
    read([*plan.jobs.values()], files)
    return _hash(tensor, plan)


def _form(tensor: TensorInfo) -> str:
    shape = "" if tensor.shape is None else ",".join(map(str, tensor.shape))
    return f"{tensor.dtype}[{shape}]"


def _hash(tensor: TensorInfo, plan: _Plan) -> str | None:
    """Returns the hash of a tensor whose bytes have been read; None where they could not be."""
    source = tensor.source
    if not isinstance(source, Opaque):
        return plan.job(tensor).digest
    lines = [f"{source.kind} {_form(tensor)}"]
    if source.kind == "quantized":
        lines.append(quantization(tensor))
    for part in source.parts:
        digest = plan.job(part).digest
        if digest is None:
            return None
        lines.append(digest)
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")).hexdigest()


def _whole(hashes: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for key, one in sorted((key.encode("utf-8", "surrogatepass"), one) for key, one in hashes.items()):
        escaped = key.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
        digest.update(one.encode("ascii") + b"  " + escaped + b"\n")
    return digest.hexdigest()


# --- damage ------------------------------------------------------------------------------------------------------


def _named(
    checkpoint: Checkpoint, chosen: Mapping[str, TensorInfo], whole: bool
) -> dict[object, tuple[TensorInfo, str]]:
    """Returns {view: (tensor, name)} of all tensors, named by key at root and by path elsewhere; a tie group once."""
    found: dict[object, tuple[TensorInfo, str]] = {}

    def put(tensor: TensorInfo, name: str) -> None:
        for part in tensor.parts if isinstance(tensor.source, Opaque) else (tensor,):
            if isinstance(part.source, Opaque):
                put(part, name)
            else:
                found.setdefault(part.view, (part, name))

    for key, tensor in chosen.items():
        put(tensor, key)
    if whole:
        for path, tensor in checkpoint.tensors():
            put(tensor, path_text(path))
        for path, node in walk(checkpoint.tree, inside=True):  # attributes of modules, tensors and other objects
            if isinstance(node, TensorInfo):
                put(node, path_text(path))
    return found


@dataclass(slots=True)
class _Record:
    """A zip member and the job that reads it."""

    name: str
    member: zips.Member
    job: Job


def _records(checkpoint: Checkpoint, plan: _Plan, found: Contents, files: Files) -> Iterator[_Record]:
    """Yields the zip members to be checked, each with the job of the tensor that fills it, or with a job of its own."""
    whole = {
        where: job
        for job in plan.jobs.values()
        if isinstance(job.source, TensorInfo)
        and (storage := whole_storage(job.source)) is not None
        and (where := _member(storage)) is not None
    }
    bare = []
    for url in _urls(checkpoint):
        file = files.open(url)
        if not zips.is_zip(file):
            bare.append(basename(url))
            continue
        members, behind = _members(checkpoint, url, files)
        if behind:
            bare.append(basename(url))
        known = any(member.crc32 for _, member in members)
        if members and not known:
            found.unchecked.append(f"{url}: its checksums are all 0, torch was told to compute none")
        for name, member in members:
            moved = _moved(name, member.span, files)
            if moved:
                found.findings.append(moved)
            elif known:
                job = whole.get((url, member.span.offset)) or Job(member.span, lenient=True)
                job.checksum = True
                yield _Record(name, member, job)
    if bare:
        found.unchecked.append(f"changed bytes in {listed(bare)}: the format has no checksums")


def _members(checkpoint: Checkpoint, url: str, files: Files) -> tuple[list[tuple[str, zips.Member]], bool]:
    """Returns (the members of an archive, whether tensors lie behind the last archive in its file).

    Of a file of many archives (DCP), or with something else behind them, they are those that are a tensor's storage.
    """
    file = files.open(url)
    storages = [one for _, tensor in checkpoint.tensors() for one in tensor.storages() if one.span.url == url]
    try:
        begins, end = zips.archive_start(file), zips.archive_end(file)
    except FormatError:  # the last archive ended long before: a large safetensors file follows
        begins, end = 1, 0
    behind = any(one.span.member is None and one.span.offset >= end for one in storages)
    if not begins and not behind:
        return list(zips.read_directory(file).items()), False
    found = {one.span.offset: zips.Member(one.span, one.crc32 or 0) for one in storages if one.span.member is not None}
    return [(files.member_name(member.span), member) for member in found.values()], behind


def _member(storage: Storage) -> tuple[str, int] | None:
    """Returns the url and the local header's offset of the zip member that a storage is; None if it is no member.

    An array in a pickle is in memory, and one in a .npz lies behind its header: neither is a whole member.
    """
    return None if storage.span.member is None else (storage.span.url, storage.span.offset)


def _urls(checkpoint: Checkpoint) -> list[str]:
    """Returns the files with data, in the order of the tree; without any, the one that was opened."""
    found: dict[str, None] = {}
    for _, node in walk(checkpoint.tree, inside=True):
        if isinstance(node, Storage):
            found[node.span.url] = None
        elif isinstance(node, TensorInfo):
            found.update((storage.span.url, None) for storage in node.storages())
    urls = [url for url in found if url]
    return urls or ([checkpoint.url] if is_file(checkpoint.url) else [])


def _moved(name: str, span: Span, files: Files) -> Finding | None:
    """Returns a finding if the local header at a member's offset is missing or has another name."""
    try:
        files.locate(span)
        there = files.member_name(span)
    except FormatError as error:
        return Finding("offsets", f"record {name}: {error.message}")
    if there != name and name.isascii():
        return Finding("offsets", f"record {name}: what lies at byte {span.offset} calls itself {there!r}")
    return None


def _wrong(records: list[_Record], named: Mapping[object, tuple[TensorInfo, str]]) -> Iterator[Finding]:
    """Yields a finding for each damaged record; its key is the first whose tensor is stored there."""
    keys: dict[tuple[str, int], str] = {}
    for tensor, name in named.values():
        for storage in tensor.storages():
            if (where := _member(storage)) is not None:
                keys.setdefault(where, name)
    for record in records:
        key = keys.get((record.member.span.url, record.member.span.offset))
        if record.job.error is not None:
            yield Finding("data", f"record {record.name}: {record.job.error}", key)
        elif record.job.crc32 != record.member.crc32:
            what = f"its bytes have the checksum {record.job.crc32:08x}, the directory says {record.member.crc32:08x}"
            yield Finding("crc", f"record {record.name}: {what}", key)
