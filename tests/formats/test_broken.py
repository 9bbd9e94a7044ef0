"""Files that broke on the way: cut at any byte, any byte changed, headers made at random. See `tests.fuzz.judge`."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import FIXTURES, Run, library_takes, thinned

import ckptool
from ckptool import formats
from ckptool.core.dtypes import BY_SAFETENSORS
from ckptool.errors import CkptoolError
from tests.fuzz import judge, samples

CORPUS = sorted((Path(samples.__file__).parent / "corpus").iterdir())


def at_random(examples: int) -> settings:
    """The same examples on every run."""
    health = list(HealthCheck)
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=health)


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], bool]:
    """Holds an input against every command."""
    place, work, sound = tmp_path / "input", tmp_path / "work", tmp_path / "sound.pth"
    place.mkdir()
    work.mkdir()
    sound.write_bytes(samples.torch_zip())
    monkeypatch.chdir(work)

    def held(data: bytes) -> bool:
        for left in [*place.iterdir(), *work.iterdir()]:
            left.unlink()
        return judge.hold(samples.place(data, place), sound)

    return held


@pytest.mark.parametrize("kind", samples.SAMPLES)
def test_every_sample_is_sound(kind: str, hold: Callable[[bytes], bool]) -> None:
    assert hold(samples.SAMPLES[kind]())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_was_found_once_stays_found(path: Path, hold: Callable[[bytes], bool]) -> None:
    hold(path.read_bytes())


def places(kind: str, data: bytes) -> list[int]:
    """The bytes that matter: all, but tar fills its blocks with zeros."""
    last = len(data.rstrip(b"\0"))
    return [at for at in range(len(data)) if kind != "tar" or (at < last and any(data[max(0, at - 2) : at + 2]))]


# --- cut off ---------------------------------------------------------------------------------------------------------


@thinned(11)
@pytest.mark.parametrize("kind", samples.SAMPLES)
def test_cut_at_any_byte_it_is_refused_in_one_line(kind: str, step: int, tmp_path: Path) -> None:
    data = samples.SAMPLES[kind]()
    work = tmp_path / "input"
    work.mkdir()
    for end in places(kind, data)[::step]:
        if kind == "pickle" and not data[:end]:
            continue
        path = samples.place(data[:end], work)
        with pytest.raises(CkptoolError):
            ckptool.open(path)
        if end % 16 == 0:
            assert judge.answer("inspect", path)[0] == 2, end


def boundaries(path: Path) -> list[int]:
    """Where the parts of a zip archive begin and end."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        data = path.read_bytes()
        found = [archive.start_dir, len(data) - 22]
    for info in members:
        name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
        start = info.header_offset + 30 + name + extra
        found += [info.header_offset, info.header_offset + 30, start, start + info.compress_size]
    position = found[0]
    while data[position : position + 4] == b"PK\x01\x02":
        position += 46 + sum(struct.unpack_from("<HHH", data, position + 28))
        found.append(position)
    return sorted(set(found))


@pytest.mark.parametrize("name", ["resnet_nested.pth", "dtypes.pth", "deflated.pth", "composite.pth"])
def test_an_archive_cut_at_any_boundary_is_refused(name: str, tmp_path: Path) -> None:
    data = (FIXTURES / name).read_bytes()
    path = tmp_path / "cut.pth"
    edges = boundaries(FIXTURES / name)
    assert len(edges) > 20
    for end in {edge + beside for edge in edges[:: max(1, len(edges) // 15)] for beside in (-1, 0, 1)} | {edges[-1]}:
        if 0 < end < len(data):
            path.write_bytes(data[:end])
            assert judge.answer("inspect", path, "--check")[0] == 2, end


@pytest.mark.parametrize("name", ["resnet_legacy.pth", "tar_2016.pth", "resnet_old.safetensors"])
def test_a_stream_cut_around_any_tensor_is_refused(name: str, tmp_path: Path) -> None:
    data = (FIXTURES / name).read_bytes()
    path = tmp_path / "cut.pth"
    spans = [storage.span for _, node in ckptool.open(FIXTURES / name).tensors() for storage in node.storages()]
    assert spans
    spans = spans[:: max(1, len(spans) // 4)]
    for end in {edge + beside for span in spans for edge in (span.offset, span.offset + span.nbytes)
                for beside in (-8, -1, 0)}:  # fmt: skip
        if end < len(data):
            path.write_bytes(data[:end])
            assert judge.answer("inspect", path)[0] == 2, end


@pytest.mark.parametrize("name", ["sharded", "sharded_bin"])
def test_a_shard_cut_anywhere_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    for source in (FIXTURES / name).iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    shard = sorted([*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")])[0]
    data = shard.read_bytes()
    for end in range(0, len(data), max(1, len(data) // 20)):
        shard.write_bytes(data[:end])
        code, _, err = judge.call("inspect", tmp_path)
        assert code == 2
        assert shard.name in err


# --- one byte changed ------------------------------------------------------------------------------------------------


@thinned(19)
@pytest.mark.parametrize("kind", samples.SAMPLES)
def test_any_byte_changed_gives_a_right_answer_or_one_line(kind: str, step: int, tmp_path: Path) -> None:
    """Every 16th is held to commands and torch.load, by ``python -m tests.fuzz --every`` each to all of them."""
    data = samples.SAMPLES[kind]()
    work = tmp_path / "input"
    work.mkdir()
    read = 0
    for position in places(kind, data)[::step]:
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path = samples.place(bytes(changed), work)
        try:
            ckptool.open(path)
            read += 1
        except CkptoolError:
            continue
        if position % 16 == 0:
            judge.look(path)
            judge.as_torch_reads_it(path)
    assert read


@thinned(6)
@pytest.mark.parametrize("kind", samples.SAMPLES)
def test_every_command_bears_a_changed_byte(kind: str, step: int, hold: Callable[[bytes], bool]) -> None:
    data = samples.SAMPLES[kind]()
    for position in range(3, len(data), max(1, step * len(data) // 12)):
        for value in (0, 0xFF):
            hold(data[:position] + bytes([value]) + data[position + 1 :])


# --- bytes at random -------------------------------------------------------------------------------------------------

NUMBERS = [*(struct.pack("<H", value) for value in (0, 1, 0x7FFF, 0xFFFF)),
           *(struct.pack("<I", value) for value in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)),
           *(struct.pack("<Q", value) for value in (0, 1, (1 << 63) - 1, (1 << 64) - 1))]  # fmt: skip


@thinned(6)
@pytest.mark.parametrize("kind", samples.SAMPLES)
def test_changes_at_random_give_a_right_answer_or_one_line(kind: str, step: int, hold: Callable[[bytes], bool]) -> None:
    data = samples.SAMPLES[kind]()
    piece = st.one_of(st.sampled_from(NUMBERS), st.binary(max_size=6))
    change = st.tuples(st.integers(0, len(data)), st.integers(0, 12), piece)

    @at_random(25 // step)
    @given(st.lists(change, min_size=1, max_size=3))
    def changed(changes: list[tuple[int, int, bytes]]) -> None:
        made = data
        for position, length, new in changes:
            made = made[:position] + new + made[position + length :]
        hold(made)

    changed()


# --- trees at random -------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@st.composite
def tensor(draw: Callable[[Any], Any]) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    made = torch.zeros(shape).to(draw(st.sampled_from(DTYPES)))
    if made.numel():
        made.view(-1)[0] = 1
    how = draw(st.integers(0, 3))
    if how == 1 and made.dim() > 1:
        return made.transpose(0, 1)
    if how == 2 and made.dim():
        return made[1:]
    return made.expand(2, *shape) if how == 3 else made


NAMES = st.one_of(
    st.text(max_size=8), st.integers(-5, 1 << 70), st.sampled_from(["state_dict", "model", "a.b", ".", "/", ""])
)
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=20), tensor()
)
TREES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, max_size=5),
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=12,
)


@thinned(5)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_any_tree_reads_as_torch_reads_it(
    legacy: bool, step: int, hold: Callable[[bytes], bool], tmp_path: Path
) -> None:
    @at_random(30 // step)
    @given(st.dictionaries(NAMES, TREES, max_size=5))
    def read(tree: dict[Any, Any]) -> None:
        made = io.BytesIO()
        torch.save(tree, made, _use_new_zipfile_serialization=not legacy)
        assert hold(made.getvalue())
        assert judge.call("inspect", tmp_path / "input" / "input.pth")[0] == 0

    read()


# --- safetensors: the library's own answer ---------------------------------------------------------------------------


def we_take(path: Path) -> bool:
    try:
        formats.read(str(path))
    except CkptoolError:
        return False
    return True


STRICTER = {
    "has a name twice": "readers would disagree on which of the two counts; the specification forbids it",
    "more elements or dimensions than can be counted": "torch counts elements, and those of a stride, in 63 bits",
    "F4 with an odd last dimension": "torch counts 4-bit floats in pairs",
    "not all whole numbers": "of a dimension of 2^63 or more, beside one of 0: torch counts in 63 bits",
}
"""What we say where the library takes a file and we do not, and why."""


def agree(path: Path) -> None:
    """Asserts that we take a file just if the library does."""
    theirs, ours = library_takes(path), we_take(path)
    if theirs and not ours:
        with pytest.raises(CkptoolError) as caught:
            formats.read(str(path))
        assert any(reason in str(caught.value) for reason in STRICTER), (str(caught.value), path.read_bytes())
    else:
        assert ours == theirs, path.read_bytes()


SIZES = st.one_of(st.integers(0, 4), st.sampled_from([-1, 1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 10**400]))
ODD = st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.sampled_from([-0.0, 1e308, 1.0]))
SHAPES = st.one_of(st.lists(st.integers(0, 4), max_size=4), st.lists(st.one_of(SIZES, ODD), max_size=4), ODD)
KINDS = st.one_of(st.sampled_from([*BY_SAFETENSORS, "f32", "F6", ""]), ODD)
EXTRA = st.recursive(
    ODD | SIZES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner)
)


@st.composite
def header(draw: Callable[[Any], Any]) -> tuple[bytes, int]:
    """The text of a header, and how many bytes follow it: mostly right, and then one thing done to it."""
    entries: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.text(max_size=4), max_size=4, unique=True)):
        kind, shape = draw(st.sampled_from(sorted(BY_SAFETENSORS))), draw(st.lists(st.integers(0, 4), max_size=3))
        bits = 4 if kind == "F4" else BY_SAFETENSORS[kind].bits
        for size in shape:
            bits *= size
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + bits // 8]}
        position += bits // 8
    if draw(st.booleans()):
        entries["__metadata__"] = draw(st.one_of(st.dictionaries(st.text(max_size=4), st.text(max_size=4)), EXTRA))
    tensors = [entry for name, entry in entries.items() if name != "__metadata__"]
    for field, values in (("dtype", KINDS), ("shape", SHAPES), ("data_offsets", SHAPES), ("more", EXTRA)):
        if tensors and draw(st.integers(0, 9)) == 0:
            draw(st.sampled_from(tensors))[field] = draw(values)
    text = json.dumps(entries, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text)))
        new = draw(st.sampled_from(["-0", "-", "0", "1e999", "NaN", "9" * 400, "\\ud800", ",", "{", "]", " ", "\n",
                                    "\0", "\x7f", "\u2028", "\\/", "+1", "01", "1.", "1E+2", "[" * 130]))  # fmt: skip
        text = text[:at] + new + text[at + draw(st.integers(0, 2)) :]
    encoded = text.encode("utf-8", "surrogatepass")
    return encoded, position + draw(st.sampled_from([0, 0, 0, 0, -1, 1]))


def test_we_take_the_headers_that_the_library_takes(tmp_path: Path) -> None:
    answers: list[bool] = []

    @at_random(120)
    @given(header())
    def same(made: tuple[bytes, int]) -> None:
        text, nbytes = made
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(max(0, nbytes)))
        agree(path)
        answers.append(library_takes(path))

    same()
    assert 15 < sum(answers) < len(answers) - 15


def one_tensor(shape: str = "[1]", offsets: str = "[0,1]", more: str = "") -> bytes:
    return f'{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}{more}}}}}'.encode()


NUMBERS_OF_JSON = ["0", "-0", "-0.0", "0.0", "1e999", "-1e999", "1e308", "9" * 19, "9" * 20, "9" * 308, "9" * 310,
                   "-" + "9" * 400, "9" * 5000, "NaN", "Infinity", "-Infinity", "-1", "1E0", "[" * 200 + "]" * 200,
                   "[" * 124 + "]" * 124, "[" * 125 + "]" * 125, "[" * 126 + "]" * 126, "[" * 127 + "]" * 127,
                   '"a-0]"', '"-0,"', '{"-0":1}', '"\\u0000"', '"\\ud83d\\ude00"', '"\\ude00"']  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS_OF_JSON, ids=lambda number: number[:12])
def test_numbers_are_those_of_the_library_wherever_they_stand(number: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for text, nbytes in [
        (one_tensor(more=f',"more":{number}'), 1), (one_tensor(f"[{number}]", "[0,0]"), 0),
        (one_tensor(offsets=f"[{number},1]"), 1), (one_tensor(f"[0,{number}]", "[0,0]"), 0),
        (one_tensor(f"[{number},0]", "[0,0]"), 0), (one_tensor(f"[1, {number} ]", "[0,0]"), 0),
        (b'{"__metadata__":{"a":' + number.encode() + b"}}", 0), (b'{"a":' + number.encode() + b"}", 0),
    ]:  # fmt: skip
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes))
        agree(path)


@pytest.mark.parametrize("space", [b" ", b"\n", b"\t", b"\r", b"\f", b"\0", b"\xc2\xa0"], ids=repr)
@pytest.mark.parametrize("where", ["before", "behind", "between"])
@pytest.mark.parametrize("count", [1, 100])
def test_space_is_what_the_library_says_it_is(space: bytes, where: str, count: int, tmp_path: Path) -> None:
    text, path = one_tensor(), tmp_path / "x.safetensors"
    text = {
        "before": space * count + text,
        "behind": text + space * count,
        "between": text[:5] + space * count + text[5:],
    }[where]
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"x")
    agree(path)


# --- bit rot ---------------------------------------------------------------------------------------------------------

ARCHIVES = sorted(path.name for path in FIXTURES.glob("*.*") if zipfile.is_zipfile(path))
BARE = ["resnet_old.safetensors", "dtypes.safetensors", "resnet_legacy.pth", "tar_2016.pth"]


def deflates_to_the_same(one: Path, other: Path, name: str) -> bool:
    """Whether the change is of the bits behind the end of a deflated stream."""
    try:
        with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
            return first.read(name) == second.read(name)
    except (zipfile.BadZipFile, zlib.error):
        return False


@thinned(6)
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_changed_byte_in_any_record_is_found(name: str, step: int, tmp_path: Path, run: Run) -> None:
    data = (FIXTURES / name).read_bytes()
    with zipfile.ZipFile(FIXTURES / name) as archive:
        inside = [info for info in archive.infolist() if "/data/" in info.filename and info.compress_size]
    records = [info for info in inside if not info.filename.endswith((".json", ".pt"))]  # these are no storages
    path = tmp_path / "rotten.pth"
    for number, info in enumerate(records[:: max(1, step * len(records) // 6)]):
        lengths = struct.unpack_from("<HH", data, info.header_offset + 26)
        start = info.header_offset + 30 + sum(lengths)
        for place in {0, info.compress_size // 2, info.compress_size - 1}:
            rotten = bytearray(data)
            rotten[start + place] ^= 1 << number % 8
            path.write_bytes(rotten)
            if deflates_to_the_same(path, FIXTURES / name, info.filename):
                continue
            code, out, _ = run("inspect", path, "--check", "--json")
            [report] = json.loads(out)["result"]
            found = [finding for finding in report["check"]["findings"] if finding["kind"] in ("crc", "data")]
            assert code == 1
            assert any(f"record {info.filename}:" in finding["text"] for finding in found), (info.filename, place)


@pytest.mark.parametrize("name", BARE)
def test_where_nothing_could_find_it_that_is_said(name: str, tmp_path: Path, run: Run) -> None:
    path = tmp_path / name
    path.write_bytes((FIXTURES / name).read_bytes())
    [(_, tensor)] = list(ckptool.open(path).tensors())[:1]
    [span] = [storage.span for storage in tensor.storages()]
    data = bytearray(path.read_bytes())
    data[span.offset] ^= 1
    path.write_bytes(data)
    _, out, _ = run("inspect", path, "--check")
    assert f"changed bytes in {name}: the format has no checksums" in out


# --- found by fuzzing ------------------------------------------------------------------------------------------------


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def view(shape: list[int], stride: list[int]) -> bytes:
    """The pickle of {"w": such a view of one float}."""
    storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x06tQK\x00"
    sizes = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride))
    return b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n" + storage + sizes + b"\x89}tRs."


def test_a_view_of_more_dimensions_than_numpys_is_read(hold: Callable[[bytes], bool]) -> None:
    assert hold(view([2, *[1] * 70, 2], [0, *[0] * 70, 0]))


def test_a_stride_beyond_counting_of_a_dimension_of_1_is_no_matter(
    hold: Callable[[bytes], bool], tmp_path: Path
) -> None:
    assert hold(view([2, 1], [0, 1 << 60]))
    path = samples.place(view([2, 1], [0, 1 << 62]), tmp_path)  # many that large have one hash: 1 serves as well
    found = ckptool.open(path).state_dict()["w"]
    assert (found.shape, found.stride) == ((2, 1), (0, 1))


@pytest.mark.parametrize("count", [pytest.param(1 << 30, marks=pytest.mark.slow), 1 << 40, 1 << 60], ids=hex)
def test_a_view_that_sees_its_storage_without_end_is_not_read(count: int, hold: Callable[[bytes], bool]) -> None:
    data = view([count], [0])
    assert hold(data)
    [path] = Path("../input").iterdir()
    code, out = judge.answer("inspect", path, "--check", "--json", yes=(1,))
    [finding] = json.loads(out)["result"][0]["check"]["findings"]
    assert (code, finding["kind"], "MAX_EXPANDED" in finding["text"]) == (1, "data", True)
    code, _, err = judge.call("diff", path, path, "--values")
    assert (code, "MAX_EXPANDED" in err) == (2, True)


def tied_legacy() -> bytes:
    """Two views of one storage in torch's legacy format, the second of which names its storage by GETs."""
    base, made = torch.arange(3.0), io.BytesIO()
    torch.save({"c": "cuda:0", "a": base, "b": base[1:]}, made, _use_new_zipfile_serialization=False)
    return made.getvalue()


def test_a_storage_has_the_device_that_is_named_first(hold: Callable[[bytes], bool]) -> None:
    """Once a second name made it another storage: tied tensors came apart."""
    data = tied_legacy()
    assert data.count(b"q\x11h\x08K") == 1
    assert hold(data.replace(b"q\x11h\x08K", b"q\x11h\x02K"))
    [path] = Path("../input").iterdir()
    first, second = (tensor for _, tensor in ckptool.open(path).tensors())
    assert first.source is second.source


def test_a_legacy_storage_of_two_types_is_refused(hold: Callable[[bytes], bool]) -> None:
    """Once the last one counted, for both."""
    data = tied_legacy()
    assert data.count(b"((h\x05h\x06X") == 1
    assert not hold(data.replace(b"((h\x05h\x06X", b"((h\x05ctorch\nIntStorage\nX"))
    [path] = Path("../input").iterdir()
    assert "used under two types" in judge.call("inspect", path)[2]


def repacked(data: bytes, to: io.BytesIO | None = None) -> bytes:
    """The same members as Python's zipfile stores them: no padding, and no descriptors but in a stream."""
    made = to or io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), old.read(name))
    return made.getvalue()


class Pipe(io.BytesIO):
    """What cannot go back."""

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise io.UnsupportedOperation

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation


def alike() -> bytes:
    """Tensors that read as fields of an extra field from wherever one begins, and like each other."""
    made = io.BytesIO()
    torch.save({"a": torch.zeros(2, dtype=torch.int64), "b": torch.arange(8, dtype=torch.int32),
                "c": torch.arange(8, dtype=torch.int32) + 1, "d": torch.zeros(100)}, made)  # fmt: skip
    return made.getvalue()


ZIPS = {
    "torch": alike,
    "repacked": lambda: repacked(alike()),
    "streamed": lambda: repacked(alike(), Pipe()),
    "deflated": samples.deflated,
}


def local_headers(data: bytes) -> list[range]:
    """Where the local headers are."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        starts = [info.header_offset for info in archive.infolist()]
    return [range(at, at + 30 + sum(struct.unpack_from("<HH", data, at + 26))) for at in starts]


@thinned(29)
@pytest.mark.parametrize("kind", ZIPS)
def test_any_bit_changed_in_a_local_header_gives_the_true_bytes_or_none(kind: str, step: int, tmp_path: Path) -> None:
    """Once a longer name moved a tensor, as it does for torch.load: other bytes, and not a word."""
    data, path = ZIPS[kind](), tmp_path / "x.pth"
    path.write_bytes(data)
    true, refused = judge.tensors(path), 0
    assert true
    places = [
        (header, position, bit) for header in local_headers(data) for position in header
        for bit in (range(8) if position < header.start + 30 else [position % 8])
    ]  # fmt: skip
    for header, position, bit in places[::step]:
        changed = bytearray(data)
        changed[position] ^= 1 << bit
        path.write_bytes(changed)
        found = judge.tensors(path)
        assert found in (None, true), (position - header.start, bit)
        refused += found is None
    assert refused


@pytest.mark.parametrize("kind", ZIPS)
@pytest.mark.parametrize("field", [26, 28], ids=["the name", "the extra field"])
def test_a_local_header_of_other_lengths_is_refused_by_every_command(
    field: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path, work = ZIPS[kind](), tmp_path / "x.pth", tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        used = [info.header_offset for info in archive.infolist() if "/data/" in info.filename]
    for place in used:
        for bit in (0, 5):
            changed = bytearray(data)
            changed[place + field] ^= 1 << bit
            path.write_bytes(changed)
            for args in (["inspect", path, "--hash"], ["convert", path, "-o", "o.safetensors"],
                         ["remap", path, "--add-prefix", "m.", "-o", "o.pth"]):  # fmt: skip
                assert judge.answer(*args)[0] == 2, (args, place, bit)
            assert judge.answer("inspect", path, "--check", yes=(1,))[0] == 1


def extended(data: bytes, extra: bytes) -> bytes:
    """The archive with an extra field in every local header, and none in its directory."""
    made, entries = bytearray(), bytearray()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            at, name, content = len(made), info.filename.encode(), archive.read(info)
            fixed = struct.pack("<5H3I", 20, 0, 0, 0, 33, info.CRC, len(content), len(content))
            made += b"PK\x03\x04" + fixed + struct.pack("<HH", len(name), len(extra)) + name + extra + content
            entries += b"PK\x01\x02" + struct.pack("<H", 20) + fixed
            entries += struct.pack("<5H2I", len(name), 0, 0, 0, 0, 0, at) + name
            count = len(archive.infolist())
    return bytes(made + entries) + struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(entries), len(made), 0
    )


EXTRAS = {
    "none": b"",
    "Info-ZIP's times and owner": b"UT\x09\0\x03" + bytes(8) + b"ux\x0b\0\x01\x04" + bytes(4) + b"\x04" + bytes(4),
    "64-bit sizes": struct.pack("<HHQQ", 1, 16, 9, 9),
    "zipalign's zeros": bytes(3),
    "a field of zeros, and zeros": bytes(7),
    "more than is read at once": b"FB" + struct.pack("<H", 4000) + b"Z" * 4000,
}


@pytest.mark.parametrize("name", EXTRAS)
def test_extra_fields_that_tools_write_are_taken(name: str, hold: Callable[[bytes], bool], tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    path.write_bytes(alike())
    true = judge.tensors(path)
    assert hold(extended(alike(), EXTRAS[name]))
    assert judge.tensors(tmp_path / "input" / "input.pth") == true


@pytest.mark.parametrize("kind", ZIPS)
def test_archives_of_every_writer_are_taken(kind: str, hold: Callable[[bytes], bool]) -> None:
    assert hold(ZIPS[kind]())


SIGNALLING = {"F16": b"\x01\x7c", "BF16": b"\x81\x7f", "F32": b"\x01\0\x80\x7f", "F64": b"\x01\0\0\0\0\0\xf0\x7f",
              "C64": b"\x01\0\x80\x7f\0\0\0\0"}  # fmt: skip


@pytest.mark.parametrize("kind", SIGNALLING)
def test_a_signalling_nan_is_no_warning(kind: str, tmp_path: Path) -> None:
    """Once numpy's own words stood on stderr."""
    value = SIGNALLING[kind]
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, data in zip(paths, (value * 3, bytes(len(value) * 3)), strict=True):
        entry = {"dtype": kind, "shape": [3], "data_offsets": [0, len(data)]}
        text = json.dumps({"w": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert judge.answer("inspect", paths[0], "--check", "--stats", yes=(1,))[0] == 1
    for pair in (paths, paths[::-1], paths[:1] * 2):
        judge.answer("diff", *pair, "--values", yes=(0, 1))


@pytest.mark.parametrize("fails", ["open", "write"])
def test_no_room_for_a_temporary_file_is_one_line(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that is not contiguous, in a deflated record, is unpacked to one."""
    path = tmp_path / "deflated.pth"
    path.write_bytes(samples.deflated())

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full() -> io.BytesIO:
        if fails == "open":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return Full()

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    code, _, err = judge.call("convert", path, "-o", "out.safetensors")
    assert (code, "a temporary file: no space left on device" in err, err.count("\n")) == (2, True, 1)
