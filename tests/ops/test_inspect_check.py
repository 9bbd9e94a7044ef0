"""`inspect --check`: a changed byte, a number that is none, a name that calls; and nothing said of a sound file."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, Run, Saved, thinned

import ckptool
from ckptool.core.findings import Check
from ckptool.errors import FormatError

SOUND = ["resnet_old.pth", "resnet_122.pth", "resnet_new.pth", "resnet_old.safetensors", "resnet_legacy.pth",
         "tied.pth", "views.pth", "dtypes.pth", "dtypes.safetensors", "conj_neg.pth", "big_endian.pth", "deflated.pth",
         "sharded", "sharded_bin", "ema.pth"]  # fmt: skip


def check(path: Path | ckptool.Checkpoint, **options: Any) -> Check:
    found = ckptool.inspect(path, check=True, **options).check
    assert found is not None
    return found


def kinds(path: Path, **options: Any) -> list[str]:
    return [finding.kind for finding in check(path, **options).findings]


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_a_sound_file(name: str, run: Run) -> None:
    assert check(FIXTURES / name).findings == []
    code, out, err = run("inspect", FIXTURES / name, "--check")
    assert (code, err) == (0, "")
    assert "check: nothing found" in out


@pytest.mark.parametrize("name", SOUND)
def test_it_says_where_no_checksums_are(name: str) -> None:
    path = FIXTURES / name
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    bare = [file.name for file in files if not zipfile.is_zipfile(file)]
    assert check(path).unchecked == (
        [f"changed bytes in {', '.join(bare)}: the format has no checksums"] if bare else []
    )


# --- checksums -------------------------------------------------------------------------------------------------------


def flipped(source: Path, position: int, path: Path) -> Path:
    data = bytearray(source.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)
    return path


def zipfile_finds(path: Path) -> bool:
    """Whether the oracle finds a wrong member."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is not None
        except Exception:
            return True


@thinned(5)
@pytest.mark.parametrize("name", ["resnet_old.pth", "deflated.pth", "views.pth"])
def test_a_flipped_byte_in_a_record_is_found_wherever_zipfile_finds_it(name: str, step: int, tmp_path: Path) -> None:
    source = FIXTURES / name
    size = source.stat().st_size
    chooser = random.Random(1)
    found = 0
    for position in sorted(chooser.sample(range(size), 150 // step)):
        path = flipped(source, position, tmp_path / "flipped.pth")
        try:
            opened = ckptool.open(path)
            report = ckptool.inspect(opened, check=True)
        except FormatError:
            continue  # the header or the directory: unreadable
        except ckptool.CkptoolError:
            continue
        assert report.check is not None
        damaged = bool(report.check.findings)
        if zipfile_finds(path):
            assert damaged, position
            found += 1
    assert found > 10 // step


def test_every_byte_of_a_tensors_record_is_covered(saved: Saved, tmp_path: Path, run: Run) -> None:
    path = saved({"a": torch.arange(40, dtype=torch.int64), "b": torch.ones(3)})
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("saved/data/0")
        raw = archive.read(info)
    start = path.read_bytes().index(raw)
    for position in range(start, start + len(raw), 7):
        wrong = flipped(path, position, tmp_path / "wrong.pth")
        [finding] = check(wrong).findings
        assert (finding.kind, finding.key) == ("crc", "a")
        assert "record saved/data/0: its bytes have the checksum" in finding.text
    code, out, _ = run("inspect", wrong, "--check")
    assert code == 1
    assert "check: 1 finding\n  crc  a  record saved/data/0" in out


def test_arrays_in_a_torch_file_are_no_records(tmp_path: Path) -> None:
    tree = {"a.w": np.ones((2, 3), "f4"), "b.w": np.ones((2, 3), "f4", order="F"), "c.w": torch.ones(2)}
    torch.save(tree, tmp_path / "p.pth")
    assert check(tmp_path / "p.pth", stats=True, hashes=True).findings == []


def test_an_array_behind_its_header_is_no_whole_record(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"a": np.zeros((0,), "f4"), "b": np.arange(3, dtype="f4"), "c": np.zeros((0, 2), ">u2")}
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    assert check(tmp_path / "small.npz").findings == []
    np.savez(tmp_path / "e.npz", **arrays)
    assert check(tmp_path / "e.npz").findings == []
    with zipfile.ZipFile(tmp_path / "e.npz") as archive:
        last = archive.getinfo("c.npy").header_offset - 1  # of b's elements
    found = check(flipped(tmp_path / "e.npz", last, tmp_path / "bad.npz")).findings
    assert [(finding.kind, finding.text.split(":")[0]) for finding in found] == [("crc", "record b.npy")]


def test_the_pickle_has_a_checksum_too(saved: Saved, tmp_path: Path) -> None:
    path = saved({"a": torch.ones(3), "note": "some text that stands in the pickle"})
    position = path.read_bytes().index(b"some text")
    [finding] = check(flipped(path, position, tmp_path / "wrong.pth")).findings
    assert (finding.kind, finding.key) == ("crc", None)
    assert "record saved/data.pkl" in finding.text


def test_a_torch_that_was_told_to_compute_none_is_said(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    found = check(tmp_path / "a.pth")
    assert found.findings == []
    assert found.unchecked == [f"{tmp_path / 'a.pth'}: its checksums are all 0, torch was told to compute none"]


def test_a_record_that_is_not_where_the_directory_says_is_found(saved: Saved, tmp_path: Path) -> None:
    path = saved({"a": torch.ones(3)})
    data = path.read_bytes()
    at = data.index(b"PK\x03\x04", data.index(b"saved/data/0") - 30)
    (tmp_path / "name.pth").write_bytes(data[: at + 30] + b"saved/data/9" + data[at + 42 :])
    assert kinds(tmp_path / "name.pth") == ["offsets"]
    (tmp_path / "mark.pth").write_bytes(data[:at] + b"XX" + data[at + 2 :])
    found = check(tmp_path / "mark.pth").findings
    assert [finding.kind for finding in found] == ["offsets", "data"]
    assert "no zip member" in found[1].text


def test_a_broken_deflated_record_is_a_finding_and_no_error(tmp_path: Path) -> None:
    source = FIXTURES / "deflated.pth"
    with zipfile.ZipFile(source) as archive:
        info = max((one for one in archive.infolist() if "/data/" in one.filename), key=lambda one: one.compress_size)
    data = bytearray(source.read_bytes())
    start = (
        info.header_offset
        + 30
        + len(info.filename)
        + int.from_bytes(data[info.header_offset + 28 : info.header_offset + 30], "little")
    )
    data[start : start + info.compress_size] = b"\xff" * info.compress_size
    (tmp_path / "wrong.pth").write_bytes(data)
    report = ckptool.inspect(tmp_path / "wrong.pth", check=True, stats=True, hashes=True)
    assert report.check is not None
    assert [finding.kind for finding in report.check.findings] == ["data"]
    key = report.check.findings[0].key
    [row] = [row for row in report.tensors if row.key == key]
    assert (row.stats, row.hash, report.hash) == (None, None, None)
    with pytest.raises(FormatError):
        ckptool.inspect(tmp_path / "wrong.pth", stats=True)


def test_views_and_ties_are_covered_once(saved: Saved) -> None:
    base = torch.arange(5000, dtype=torch.float32)
    path = saved({"base": base, "tied": base, "part": base[10:20], "turned": base.view(50, 100).t()})
    told: list[int] = []
    assert check(path, progress=told.append).findings == []
    data = sum(info.file_size for info in zipfile.ZipFile(path).infolist())
    assert sum(told) < data + 4 * 5000 + 100 + 1  # the record once, the transposed view through a map, the part


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "complex64", "complex128"]
)
def test_nan_and_inf_are_counted_in_every_float(dtype: str, saved: Saved) -> None:
    values = torch.tensor([1.0, math.nan, -2.0, math.inf, -math.inf, math.nan, math.nan])
    tensor = values.to(getattr(torch, dtype))
    path = saved({"good": torch.ones(5).to(tensor.dtype), "bad": tensor})
    found = {finding.kind: (finding.key, finding.count) for finding in check(path).findings}
    if dtype == "float8_e4m3fn":  # it has no infinity
        assert found == {"nan": ("bad", int(tensor.float().isnan().sum()))}
    else:
        assert found == {"nan": ("bad", 3), "inf": ("bad", 2)}


def test_nan_is_found_in_views_legacy_files_shards_and_beside_the_weights(saved: Saved, tmp_path: Path) -> None:
    bad = torch.ones(6, 4)
    bad[2, 1] = math.nan
    saved({"w": bad.t()[1:]}, "view.pth")
    saved({"w": bad}, "legacy.pth", _use_new_zipfile_serialization=False)
    saved({"model": {"w": torch.ones(2)}, "optimizer": {"state": {0: {"exp_avg": bad}}}}, "trained.pth")
    saved({"w": bad.to_sparse()}, "sparse.pth")
    ckptool.convert(tmp_path / "legacy.pth", tmp_path / "shards", to="sharded")
    expected = {"view.pth": "w", "legacy.pth": "w", "shards": "w", "sparse.pth": "w",
                "trained.pth": "optimizer/state/0/exp_avg"}  # fmt: skip
    for name, key in expected.items():
        [finding] = check(tmp_path / name).findings
        assert (finding.kind, finding.key, finding.count) == ("nan", key, 1)


def test_plain_attributes_of_modules_and_other_averages_are_looked_at(saved: Saved) -> None:
    net = torch.nn.Linear(2, 2)
    net.loose = torch.tensor([math.inf])
    path = saved({"state_dict": {"w": torch.ones(1)}, "ema": {"w": torch.tensor([math.nan])}, "net": net})
    keys = {finding.key: finding.kind for finding in check(path).findings if not finding.passes}
    assert keys["ema/w"] == "nan"
    assert "inf" in keys.values()


def test_with_keys_chosen_only_their_numbers_are_looked_at(saved: Saved) -> None:
    bad = torch.tensor([math.nan])
    path = saved({"a": bad, "b": bad.clone(), "c": torch.ones(1)})
    assert [finding.key for finding in check(path, exclude=["a"]).findings] == ["b"]
    assert check(path, include=["c"]).findings == []


def test_statistics_and_check_share_one_read(saved: Saved) -> None:
    bad = torch.randn(1000)
    bad[7] = math.nan
    path = saved({"w": bad})
    told: list[int] = []
    report = ckptool.inspect(path, stats=True, hashes=True, check=True, progress=told.append)
    assert [finding.count for finding in (report.check or Check()).findings] == [1]
    assert report.tensors[0].stats is not None
    assert sum(told) == sum(info.file_size for info in zipfile.ZipFile(path).infolist())


# --- names, indexes, exit codes --------------------------------------------------------------------------------------


def test_a_pickle_that_would_call_something_is_found(run: Run) -> None:
    code, out, _ = run("inspect", FIXTURES / "malicious.pt", "--check")
    assert code == 1
    assert "acting  posix.mkdir: named by the pickle, not needed by tensors, not run" in out
    assert run("inspect", FIXTURES / "malicious.pt")[0] == 0


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("core", ["core", "_core"])
def test_what_numpys_arrays_need_is_no_finding_and_what_hides_behind_it_is(
    core: str, protocol: int, tmp_path: Path
) -> None:
    data = pickle.dumps({"model": {"w": np.ones(2, "f4"), "b": np.ones((2, 2), order="F")}}, protocol)
    if protocol < 4:  # later ones have lengths in front of names and of the whole
        data = data.replace(b"numpy._core", f"numpy.{core}".encode())
    (tmp_path / "sound.pkl").write_bytes(data)
    assert check(tmp_path / "sound.pkl").findings == []

    array = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    hidden = {
        "posix.system": array.replace(b"cnumpy\nndarray", b"cposix\nsystem"),
        "posix.mkdir": array + b"(K\x01K\x01\x85cposix\nmkdir\nC\x01x\x85R\x89C\x01atb",
        "numpy._core.multiarray.scalar": b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nC\x01a\x86R",
        "numpy.ndarray.tofile": b"cnumpy\nndarray.tofile\nC\x01a\x85R",
        "numpy.load": b"cnumpy\nload\nC\x01a\x85R",
    }
    for name, value in hidden.items():
        begin = pickle.dumps({"w": np.ones(2)}, 3)[:-2]  # without SETITEM and STOP
        (tmp_path / "bad.pkl").write_bytes(begin + b"sX\x01\x00\x00\x00x" + value + b"s.")
        assert ckptool.inspect(tmp_path / "bad.pkl").unsafe == [name]


def test_an_index_that_contradicts_its_shards_is_found() -> None:
    report = ckptool.inspect(FIXTURES / "sharded_broken", check=True)
    assert report.check is not None
    assert [finding.text for finding in report.check.findings if finding.kind == "index"] == report.problems
    assert len(report.problems) > 3


def test_json_lists_the_findings_and_what_was_not_checked(saved: Saved, run: Run) -> None:
    path = saved({"a": torch.tensor([math.nan, 1.0])}, "a.pth", _use_new_zipfile_serialization=False)
    code, out, _ = run("inspect", path, FIXTURES / "tied.pth", "--check", "--json")
    first, second = json.loads(out)["result"]
    assert code == 1
    assert first["check"] == {
        "findings": [{"kind": "nan", "text": "1 of 2 are NaN", "key": "a", "count": 1}],
        "unchecked": ["changed bytes in a.pth: the format has no checksums"],
    }
    assert second["check"] == {"findings": [], "unchecked": []}


@pytest.mark.usefixtures("folding")
def test_many_findings_of_a_kind_are_counted(saved: Saved, run: Run) -> None:
    path = saved({f"k{number}": torch.tensor([math.nan]) for number in range(50)})
    _, out, _ = run("inspect", path, "--check")
    assert "check: 50 findings" in out
    assert "nan  k0   1 of 1 are NaN" in out
    assert "30 more (--json has all)" in out


def test_an_unreadable_file_is_an_error_and_not_a_finding(run: Run, tmp_path: Path) -> None:
    assert run("inspect", FIXTURES / "bad" / "truncated.pth", "--check")[0] == 2
    assert run("inspect", FIXTURES / "tied.pth", tmp_path / "none.pth", "--check")[0] == 2
    assert run("inspect", FIXTURES / "malicious.pt", tmp_path / "none.pth", "--check")[0] == 2


def test_a_file_that_changes_meanwhile_is_an_error_and_not_a_finding(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "tied.pth", tmp_path / "a.pth")
    opened = ckptool.open(tmp_path / "a.pth")
    os.utime(tmp_path / "a.pth", (1, 1))
    with pytest.raises(FormatError, match="was changed since it was opened"):
        ckptool.inspect(opened, check=True)


def test_a_check_shows_no_list_of_keys_unless_asked(run: Run) -> None:
    short, long = (run("inspect", FIXTURES / "tied.pth", "--check", *more)[1] for more in ([], ["--flat"]))
    assert "twin" not in short
    assert "twin" in long
