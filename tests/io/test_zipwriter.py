from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.serialization import config as serialization

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Span
from ckptool.errors import FormatError
from ckptool.io import zip_write as zipwriter
from ckptool.io.files import Files
from ckptool.io.output import LocalOutput
from ckptool.io.zip_write import ZipWriter

Saved = Callable[..., Path]


def written(path: Path, content: dict[str, bytes], root: str = "archive") -> bytes:
    with LocalOutput(str(path)) as output:
        archive = ZipWriter(output, root)
        for name, data in content.items():
            archive.add(name, data)
        archive.close()
        output.commit()
    return path.read_bytes()


def reader(data: bytes) -> Any:
    return torch._C.PyTorchFileReader(io.BytesIO(data))


def test_the_archive_is_byte_for_byte_what_torchs_writer_makes(tmp_path: Path) -> None:
    content = {"data.pkl": b"pickle", "byteorder": b"little", "data/0": bytes(100), "data/1": b"",
               "data/2": b"x" * 5000, "n" * 300: b"long name", "version": b"3\n"}  # fmt: skip
    ours = written(tmp_path / "ours.zip", content, "out")
    theirs = torch._C.PyTorchFileWriter(str(tmp_path / "out.zip"))
    for name, data in content.items():
        if name != "version":
            theirs.write_record(name, data, len(data))
    theirs.write_end_of_file()  # adds version and .data/serialization_id
    expected = (tmp_path / "out.zip").read_bytes()
    begin = expected.index(b"out/.data/serialization_id") - 30  # what comes before it must be the same to the bit
    assert expected[begin : begin + 4] == b"PK\x03\x04"
    assert ours[:begin] == expected[:begin]
    entries, their_entries = ours.index(b"PK\x01\x02"), expected.index(b"PK\x01\x02")
    length = ours.index(b"PK\x06\x06") - entries
    assert ours[entries : entries + length] == expected[their_entries : their_entries + length]
    # The end records are the same but for the count and the places.
    ends, their_ends = ours[-98:], expected[-98:]
    assert [ends[i] for i in (*range(24), *range(56, 64))] == [their_ends[i] for i in (*range(24), *range(56, 64))]
    assert len(ours) - entries - length == 98


def test_records_lie_where_torch_and_zipfile_find_them(tmp_path: Path) -> None:
    content = {f"r{i}": os.urandom(i * 37 % 300) for i in range(50)}
    data = written(tmp_path / "a.zip", {**content, "version": b"3\n"})
    torchs = reader(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        for name, value in content.items():
            assert archive.read(f"archive/{name}") == value
            assert torchs.get_record(name) == value
            assert torchs.get_record_offset(name) % 64 == 0


@pytest.mark.parametrize("length", range(1, 70, 3))
def test_every_payload_is_aligned_whatever_its_name(length: int, tmp_path: Path) -> None:
    data = written(tmp_path / "a.zip", {"n" * length: b"payload", "version": b"3\n"})
    assert data.index(b"payload") % 64 == 0


def test_more_members_than_sixteen_bits_count(tmp_path: Path) -> None:
    content = {f"data/{i}": b"%d" % i for i in range(65_600)}
    data = written(tmp_path / "a.zip", {**content, "version": b"3\n"})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert len(archive.namelist()) == 65_601
        assert archive.read("archive/data/65599") == b"65599"
    assert reader(data).get_record("data/65599") == b"65599"


def test_records_beyond_four_gigabytes_are_laid_out_as_torch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file with a hole stands for 4 GiB of data; `blocks` claims the bytes and only moves on.
    path = tmp_path / "far.zip"
    with LocalOutput(str(path), fsync=False) as output:
        archive = ZipWriter(output, "archive")
        archive.add("data.pkl", b"pickle")
        big = (1 << 32) + 100

        def hole() -> Any:
            output._flush()
            output.position += big
            yield b""

        archive.add_blocks("data/0", big, hole(), 0x12345678)
        archive.add("data/1", b"behind four gigabytes")
        archive.add("version", b"3\n")
        archive.close()
        output.commit()
    with zipfile.ZipFile(path) as archive_read:
        info = archive_read.getinfo("archive/data/0")
        assert (info.file_size, info.compress_size, info.CRC) == (big, big, 0x12345678)
        assert archive_read.getinfo("archive/data/1").header_offset > 1 << 32
    theirs = torch._C.PyTorchFileReader(str(path))
    assert theirs.get_record("data/1") == b"behind four gigabytes"
    assert theirs.get_record_offset("data/0") % 64 == 0
    assert theirs.get_record_offset("data/1") % 64 == 0
    from ckptool.io.files import Files
    from ckptool.io.source import LocalFile
    from ckptool.io.zip_read import read_directory

    with LocalFile(str(path)) as file, Files() as files:
        members = read_directory(file)
        assert members["archive/data/0"].span.nbytes == big
        assert files.locate(members["archive/data/0"].span).offset == theirs.get_record_offset("data/0")
        assert files.read(members["archive/data/1"].span) == b"behind four gigabytes"


def test_a_record_of_another_size_than_promised_is_a_bug_that_shows(tmp_path: Path) -> None:
    with LocalOutput(str(tmp_path / "a.zip")) as output, pytest.raises(RuntimeError, match="data/0"):
        ZipWriter(output, "archive").add_blocks("data/0", 10, [b"only"], None)


# --- through torch.load ----------------------------------------------------------------------------------------------

NAMES = [
    "resnet_old.pth",
    "resnet_module.pth",
    "dtypes.pth",
    "views.pth",
    "tied.pth",
    "deflated.pth",
    "resnet_nested.pth",
]


def offsets(path: Path) -> dict[str, int]:
    theirs = torch._C.PyTorchFileReader(str(path))
    names = [name for name in theirs.get_all_records() if name.startswith("data/")]
    return {name: theirs.get_record_offset(name) for name in names}


@pytest.mark.parametrize("name", ["resnet_old.pth", "dtypes.pth", "tied.pth", "views.pth"])
def test_torch_can_compute_where_each_storage_lies(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With .format_version 1 torch does without the headers; in debug mode it asserts that it was right.
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    save(open_checkpoint(FIXTURES / name), tmp_path / "out.pth")
    with FakeTensorMode(), serialization.patch({"load.calculate_storage_offsets": True}):
        fake = torch.load(tmp_path / "out.pth", weights_only=True)
    lies = set(offsets(tmp_path / "out.pth").values())
    found = {key: tensor.untyped_storage()._checkpoint_offset for key, tensor in fake.items()}
    assert set(found.values()) <= lies
    content = (tmp_path / "out.pth").read_bytes()
    real = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(real) == list(fake)
    for key, tensor in real.items():
        raw = bytes(tensor.untyped_storage().tolist())
        assert content[found[key] : found[key] + len(raw)] == raw, key


@pytest.mark.parametrize("name", NAMES)
def test_storages_are_numbered_by_first_use_and_lie_in_that_order(name: str, tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / name), tmp_path / "out.pth")
    found = offsets(tmp_path / "out.pth")
    order = sorted(found, key=lambda record: int(record.split("/")[1]))
    assert order == [f"data/{i}" for i in range(len(order))]
    assert sorted(found.values()) == [found[record] for record in order]
    assert all(offset % 64 == 0 for offset in found.values())


def test_data_records_lie_as_torch_save_lays_them(tmp_path: Path) -> None:
    torch.manual_seed(5)
    tensors = {f"t{i}": torch.randn(i * 7 % 50 + 1) for i in range(30)} | {"none": torch.empty(0)}
    theirs = io.BytesIO()
    torch.save(tensors, theirs)  # root "archive", as ours
    (tmp_path / "theirs.pth").write_bytes(theirs.getvalue())
    save(open_checkpoint(tmp_path / "theirs.pth"), tmp_path / "out.pth")
    with (
        zipfile.ZipFile(io.BytesIO(theirs.getvalue())) as expected,
        zipfile.ZipFile(tmp_path / "out.pth") as ours,
    ):
        names = [name for name in expected.namelist() if name != "archive/.data/serialization_id"]
        assert ours.namelist() == names
        for name in names:
            one, other = ours.getinfo(name), expected.getinfo(name)
            assert one.flag_bits == other.flag_bits, name
            if name != "archive/data.pkl":
                assert one.file_size == other.file_size, name
                assert ours.read(name) == expected.read(name), name
                assert one.CRC == other.CRC, name


def test_known_checksums_are_taken_over_and_are_right(tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / "resnet_old.pth"), tmp_path / "out.pth")
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        assert archive.testzip() is None


def test_the_sizes_in_front_are_zero_as_torch_has_them(tmp_path: Path) -> None:
    data = written(tmp_path / "a.zip", {"x": b"abc"})
    assert struct.unpack("<III", data[14:26]) == (0, 0, 0)
    assert zipwriter.ALIGNMENT == 64


# --- many records as one piece ----------------------------------------------------------------------------------------


def many(count: int = 300) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {f"layers.{i}.weight": torch.randn(i % 7) for i in range(count)}


def reads_of(monkeypatch: pytest.MonkeyPatch, job: Callable[[], object]) -> int:
    """How many spans a job reads."""
    spans: list[object] = []
    blocks = Files.blocks

    def counted(self: Files, span: Span, *rest: Any) -> Any:
        spans.append(span)
        return blocks(self, span, *rest)

    monkeypatch.setattr(Files, "blocks", counted)
    job()
    return len(spans)


def renamed(path: Path) -> Checkpoint:
    opened = open_checkpoint(path)
    return opened.with_state_dict({f"model.{key}": tensor for key, tensor in opened.state_dict().items()})


def test_records_that_keep_their_places_are_read_as_one(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = many()
    checkpoint = renamed(saved(tensors))
    assert reads_of(monkeypatch, lambda: save(checkpoint, tmp_path / "out.pth")) < 5
    again = torch.load(tmp_path / "out.pth")
    assert list(again) == [f"model.{key}" for key in tensors]
    assert all(torch.equal(again[f"model.{key}"], tensor) for key, tensor in tensors.items())
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        assert archive.testzip() is None  # which compares every local header's name with the directory's


def test_a_changed_tensor_ends_the_piece_and_nothing_is_lost(saved: Saved, tmp_path: Path) -> None:
    tensors = many()
    opened = open_checkpoint(saved(tensors))
    kept = {key: tensor for number, (key, tensor) in enumerate(opened.state_dict().items()) if number != 150}
    save(opened.with_state_dict(kept), tmp_path / "out.pth")
    again = torch.load(tmp_path / "out.pth")
    assert list(again) == list(kept)
    assert all(torch.equal(again[key], tensors[key]) for key in kept)
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("where", ["padding of the first", "padding of the last", "a gap between two"])
def test_records_with_other_gaps_are_copied_one_by_one(where: str, saved: Saved, tmp_path: Path) -> None:
    """A directory whose offsets do not say what the local headers say: the payload is where the header says."""
    tensors = {f"t{i}": torch.full((16,), float(i)) for i in range(5)}
    path = saved(tensors)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "serialization_id" not in name]
        content = {name: archive.read(name) for name in names}
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:  # no padding, no descriptors
        for number, name in enumerate(names):
            archive.writestr(name, content[name])
            if where == "a gap between two" and number == 5:
                archive.writestr("saved/.data/more", b"x" * 77)
            elif where == "padding of the first" and number == 0:
                archive.writestr("saved/.data/more", b"x" * 5)
    save(renamed(tmp_path / "other.pth"), tmp_path / "out.pth")
    again = torch.load(tmp_path / "out.pth")
    assert all(torch.equal(again[f"model.{key}"], tensor) for key, tensor in tensors.items())
    assert all(offset % 64 == 0 for offset in offsets(tmp_path / "out.pth").values())


@pytest.mark.parametrize("number", [0, 2, 4])
@pytest.mark.parametrize("field", [26, 28], ids=["name", "extra"])
def test_a_local_header_that_lies_about_its_length_is_not_handed_on(
    saved: Saved, tmp_path: Path, number: int, field: int
) -> None:
    """torch reads from 8 bytes behind; many small records are copied without locating each."""
    path = saved({f"t{i}": torch.full((16,), float(i)) for i in range(5)})
    data = bytearray(path.read_bytes())
    at = data.index(f"saved/data/{number}".encode()) - 30 + field
    struct.pack_into("<H", data, at, struct.unpack_from("<H", data, at)[0] + 8)
    path.write_bytes(data)
    with pytest.raises(FormatError, match="local header"):
        save(renamed(path), tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
