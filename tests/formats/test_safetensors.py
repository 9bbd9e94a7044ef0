from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, assert_same_tensors, bits, library_takes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.dtypes import BY_SAFETENSORS
from ckptool.errors import CkptoolError, FormatError, LimitError, LossError, UnsupportedError
from ckptool.formats import read

Saved = Callable[..., Path]


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def we_take(path: Path) -> bool:
    try:
        read(str(path))
    except UnsupportedError:  # understood, and torch could not hold it: an odd number of 4-bit floats
        return True
    except CkptoolError:
        return False
    return True


# --- differential: our answer is the reference library's --------------------------------------------------------------


def layout(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """A valid header and its data."""
    header: dict[str, Any] = {}
    position = 0
    for number in range(rng.randrange(0, 5)):
        dtype = rng.choice([name for name in BY_SAFETENSORS if not name.startswith("F6")])
        shape = [rng.choice([0, 1, 2, 3, 8]) for _ in range(rng.randrange(0, 4))]
        if dtype == "F4":
            shape = [*shape, rng.choice([2, 4, 6])]
        bits_ = 4 if dtype == "F4" else BY_SAFETENSORS[dtype].bits
        for size in shape:
            bits_ *= size
        name = rng.choice(["a", "b.weight", "", "ü", "x y", 'q"'])
        header[f"{name}{number}" if name else name] = entry(dtype, shape, position, position + bits_ // 8)
        position += bits_ // 8
    # An empty name twice would leave a hole, which is another test's business.
    position = 0
    for item in header.values():
        begin, end = item["data_offsets"]
        item["data_offsets"] = [position, position + end - begin]
        position += end - begin
    if rng.random() < 0.4:
        header["__metadata__"] = {"format": "pt", "note": "x"}
    names = list(header)
    rng.shuffle(names)
    return {name: header[name] for name in names}, rng.randbytes(position)


def broken(rng: random.Random, header: dict[str, Any], data: bytes) -> bytes:
    """The same file with one thing done to it, which may or may not make it invalid."""
    tensors = [name for name in header if name != "__metadata__"]
    one: dict[str, Any] = header[rng.choice(tensors)] if tensors else {}
    raw: bytes | None = None
    kind = rng.randrange(24)
    length: int | None = None
    if kind == 0:
        data += bytes(rng.randrange(1, 9))
    elif kind == 1:
        data = data[: -rng.randrange(1, 9)]
    elif kind == 2 and one:
        one["data_offsets"][rng.randrange(2)] += rng.choice([-1, 1, 8])
    elif kind == 3 and one:
        one["dtype"] = rng.choice(["F31", "f32", "", "C128", None, 5, "F6_E2M3", "I64", "F4"])
    elif kind == 4 and one:
        one["shape"] = rng.choice([[-1], [2.0], ["2"], None, 3, [1 << 63], [1 << 40, 1 << 40], [[2]], [True], "2"])
    elif kind == 5 and one:
        one["data_offsets"] = rng.choice(
            [[0], [0, 1, 2], [8, 0], None, ["0", "4"], [0.0, 4.0], [-4, 0], [1 << 64, 1 << 64]]
        )
    elif kind == 6 and one:
        del one[rng.choice(list(one))]
    elif kind == 7 and one:
        one["extra"] = [1, {"a": None}]
    elif kind == 8:
        header["__metadata__"] = rng.choice([None, {}, {"a": 1}, {"a": None}, [], "x", {"a": {"b": "c"}}, {"a": "b"}])
    elif kind == 9:
        raw = json.dumps(header).encode() + rng.choice([b" ", b"\n\t ", b"\0", b"x", b"{}"]) * 3
    elif kind == 10:
        raw = rng.choice([b" ", b"\n", b"\t\r", b"\0", b"\xef\xbb\xbf"]) + json.dumps(header).encode()
    elif kind == 11:
        raw = rng.choice([b"[]", b"null", b"1", b'"x"', b"{", b"", b"{]", b"{'a': 1}", b'{"a": }', b"{}{}", b"{} {}"])
    elif kind == 12:
        length = rng.choice([0, 1, 1 << 30, 1 << 63, (1 << 64) - 1, 100_000_001])
    elif kind == 13:
        raw = json.dumps(header).encode() + b"}"
    elif kind == 14:
        header[rng.choice(["new", "__metadata"])] = rng.choice(
            [entry("F32", [1], 0, 4), entry("U8", [0], 0, 0), {}, None, [], 1]
        )
    elif kind == 15 and one:
        one["shape"] = [*one["shape"], 1] if isinstance(one.get("shape"), list) else []
    elif kind == 16 and one:
        one["shape"] = [0, *one["shape"]]
    elif kind == 17:
        raw = json.dumps(header, ensure_ascii=False).encode("latin-1", "replace")
    elif kind == 18:
        raw = json.dumps(header, indent=1).encode()
    elif kind == 19:
        raw = json.dumps(header).replace("}", ",}", 1).encode()
    elif kind == 20:  # not -0: the library takes it for a float, and nothing hangs on it
        raw = json.dumps(header).replace("0", rng.choice(["00", "0.0", "0e0", "NaN", "Infinity", "1_0"]), 1).encode()
    elif kind == 21:
        raw = json.dumps(header).encode().replace(b"a", b"\xff", 1)
    elif kind == 22:
        raw = json.dumps(header).encode().replace(b"a", rng.choice([b"\\ud800", b"\\u0000", b"\x01", b"\\x"]), 1)
    elif kind == 23 and one:
        one["shape"] = []
    return file_of(header if raw is None else raw, data, length)


@pytest.mark.parametrize("seed", range(40))
def test_we_take_what_the_library_takes_and_no_more(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    for number in range(25):
        header, data = layout(rng)
        whole = file_of(header, data) if number < 3 else broken(rng, header, data)
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(whole)
        assert we_take(path) == library_takes(path), whole


@pytest.mark.parametrize(
    ("first", "second", "nbytes"),
    [((0, 4), (8, 12), 12), ((4, 8), (8, 12), 12), ((0, 4), (2, 6), 6), ((0, 4), (0, 4), 4), ((0, 4), (4, 8), 12)],
    ids=["a hole between", "a hole before", "an overlap", "one range twice", "bytes behind"],
)
def test_data_that_no_tensor_has_or_two_have_are_refused(
    first: tuple[int, int], second: tuple[int, int], nbytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"a": entry("F32", [1], *first), "b": entry("F32", [1], *second)}, bytes(nbytes)))
    assert not library_takes(path)
    with pytest.raises(FormatError, match=r"leaves a hole|overlaps|describes 8 bytes of data, the file has 12"):
        read(str(path))


def test_the_differential_test_sees_both_answers(tmp_path: Path) -> None:
    answers = []
    for seed in range(10):
        rng = random.Random(seed)
        for _ in range(25):
            header, data = layout(rng)
            (tmp_path / "x.safetensors").write_bytes(broken(rng, header, data))
            answers.append(library_takes(tmp_path / "x.safetensors"))
    assert 50 < sum(answers) < 200


def test_every_file_taken_gives_the_librarys_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for seed in range(60):
        header, data = layout(random.Random(seed))
        path.write_bytes(file_of(header, data))
        expected = load_file(path)
        found = open_checkpoint(path)
        assert sorted(found.state_dict()) == sorted(expected)
        assert_same_tensors(found, {key: expected[key] for key in found.state_dict()})


def test_a_name_twice_is_refused_though_the_library_takes_the_last(tmp_path: Path) -> None:
    one = json.dumps(entry("U8", [1], 0, 1))
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(f'{{"a":{one},"a":{one}}}'.encode(), b"x"))
    assert library_takes(path)
    with pytest.raises(FormatError, match=r"twice.*a"):
        read(str(path))
    path.write_bytes(file_of(f'{{"__metadata__":{{"k":"1"}},"a":{one},"__metadata__":{{"k":"2"}}}}'.encode(), b"x"))
    with pytest.raises(FormatError):
        read(str(path))


def test_a_field_twice_in_an_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"))
    assert not library_takes(path)
    assert not we_take(path)


def test_a_name_twice_is_refused_however_it_is_spelled(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    other = '{"dtype":"U8","shape":[1],"data\\u005foffsets":[0,1]}'
    path.write_bytes(file_of(f'{{"a":{json.dumps(entry("U8", [1], 0, 1))},"\\u0061":{other}}}'.encode(), b"x"))
    assert library_takes(path)
    assert not we_take(path)


def test_cut_at_every_byte_it_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    whole = (FIXTURES / "dtypes.safetensors").read_bytes()
    for end in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:end])
        with pytest.raises(CkptoolError, match=r"cut\.safetensors"):
            read(str(tmp_path / "cut.safetensors"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_a_header_in_another_encoding_is_refused_as_the_library_does(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(json.dumps({"a": entry("U8", [1], 0, 1)}).encode(encoding), b"x"))
    assert not library_takes(path)
    assert not we_take(path)


@pytest.mark.parametrize("name", [r"\ud800", r"a\udfffb", r"\ude00\ud83d"])
def test_a_name_that_is_no_text_is_refused_as_the_library_does(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(f'{{"{name}":{json.dumps(entry("U8", [1], 0, 1))}}}'.encode(), b"x"))
    assert not library_takes(path)
    assert not we_take(path)


@pytest.mark.parametrize("metadata", ["[]", '""', "0", "false", "1", '["a"]', '{"a":1}', '{"a":null}'])
def test_metadata_that_is_no_map_of_texts_is_refused(metadata: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(f'{{"__metadata__":{metadata}}}'.encode()))
    assert not library_takes(path)
    assert not we_take(path)


def test_an_absurd_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(b"{}", length=100_000_001) + bytes(100))
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    with pytest.raises(LimitError):
        read(str(path))


def test_a_header_nested_without_end_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"))
    assert not we_take(path)


def test_half_a_byte_that_torch_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"w": entry("F4", [2, 3], 0, 3)}, bytes(3)))
    with pytest.raises(UnsupportedError, match=r"w.*odd"):
        read(str(path))


def test_six_bit_floats_are_listed_and_not_written_as_torch(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"w": entry("F6_E2M3", [4], 0, 3)}, b"abc"))
    found = open_checkpoint(path)
    assert (found.state_dict()["w"].dtype, found.state_dict()["w"].nbytes) == ("float6_e2m3fn", 3)
    with pytest.raises(CkptoolError, match="float6"):
        save(found, tmp_path / "out.pth")
    save(found, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes()[-3:] == b"abc"


# --- writing ---------------------------------------------------------------------------------------------------------


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length])


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / "dtypes.safetensors"), tmp_path / "out.safetensors")
    data = (tmp_path / "out.safetensors").read_bytes()
    start = 8 + struct.unpack_from("<Q", data)[0]
    assert start % 8 == 0
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        assert header_of(tmp_path / "out.safetensors")[name]["data_offsets"][0] % tensor.element_size() == 0


def test_the_order_of_keys_is_kept_in_the_header(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "resnet_new.pth")
    save(opened, tmp_path / "out.safetensors")
    assert [name for name in header_of(tmp_path / "out.safetensors") if name != "__metadata__"] == list(
        opened.state_dict()
    )


def test_a_tie_is_stored_once_and_recorded_as_hugging_face_does(tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / "tied.pth"), tmp_path / "out.safetensors")
    header = header_of(tmp_path / "out.safetensors")
    assert "head.weight" not in header
    assert header["__metadata__"]["head.weight"] == "emb.weight"
    assert set(load_file(tmp_path / "out.safetensors")) == {
        "emb.weight", "twin", "block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias"
    }  # fmt: skip


def test_a_tie_recorded_by_the_library_is_tied_again(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.emb.weight

    from safetensors.torch import save_model

    model = Net()
    save_model(model, str(tmp_path / "m.safetensors"))
    opened = open_checkpoint(tmp_path / "m.safetensors")
    assert opened.shared() == [["emb.weight", "head.weight"]]
    save(opened, tmp_path / "out.pth")
    model.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    assert model.head.weight is model.emb.weight


def test_parts_of_one_storage_are_stored_each_with_its_own_values(tmp_path: Path) -> None:
    expected = torch.load(FIXTURES / "views.pth")
    save(open_checkpoint(FIXTURES / "views.pth"), tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert {key: bits(value) for key, value in found.items()} == {key: bits(value) for key, value in expected.items()}


def test_metadata_is_kept_word_for_word(tmp_path: Path) -> None:
    metadata = {"format": "pt", "modelspec.title": "ü\n", "ss_base": "1", "w_is_no_name": "nor is this"}
    save_file({"w": torch.ones(2)}, tmp_path / "in.safetensors", metadata)
    save(open_checkpoint(tmp_path / "in.safetensors"), tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == metadata


@pytest.mark.parametrize("name", ["pt", "format", "None", "1"])
def test_a_tensor_may_have_the_name_of_a_metadata_word(name: str, saved: Saved, tmp_path: Path) -> None:
    tensors = {name: torch.arange(3.0), "w": torch.ones(1)}
    save(open_checkpoint(saved(tensors)), tmp_path / "out.safetensors")
    found = open_checkpoint(tmp_path / "out.safetensors")
    assert list(found.state_dict()) == [name, "w"]  # and none that was made up
    assert_same_tensors(found, tensors)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tied_tensor_called_format_is_not_lost(saved: Saved, tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    save(open_checkpoint(saved({"w": shared, "format": shared})), tmp_path / "out.safetensors")
    assert sorted(open_checkpoint(tmp_path / "out.safetensors").state_dict()) == ["format", "w"]
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # accelerate refuses the file otherwise


def test_a_tie_that_was_broken_is_not_made_again(tmp_path: Path) -> None:
    # The old record says head = emb; the new checkpoint has another head.
    save(open_checkpoint(FIXTURES / "tied.pth"), tmp_path / "tied.safetensors")
    opened = open_checkpoint(tmp_path / "tied.safetensors")
    tensors = opened.state_dict()
    save(opened.with_state_dict({**tensors, "head.weight": tensors["twin"]}), tmp_path / "out.safetensors")
    again = open_checkpoint(tmp_path / "out.safetensors")
    assert ["emb.weight", "head.weight"] not in [sorted(group) for group in again.shared()]
    kept = {key: value for key, value in tensors.items() if key != "head.weight"}
    save(opened.with_state_dict(kept), tmp_path / "less.safetensors")
    assert "head.weight" not in open_checkpoint(tmp_path / "less.safetensors").state_dict()


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_would_make_the_file_unreadable_are_refused(name: str, saved: Saved, tmp_path: Path) -> None:
    opened = open_checkpoint(saved({"w": torch.ones(2)}))
    with pytest.raises(LossError, match="name"):
        save(opened.with_state_dict({name: opened.state_dict()["w"]}), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["", "a/b", "ü", "new\nline", '"', "\\", "\x00", "x" * 5000, "\U0001f600"])
def test_any_other_name_is_written_so_that_the_library_reads_it(name: str, saved: Saved, tmp_path: Path) -> None:
    opened = open_checkpoint(saved({"w": torch.ones(2)}))
    save(opened.with_state_dict({name: opened.state_dict()["w"]}), tmp_path / "out.safetensors")
    assert list(load_file(tmp_path / "out.safetensors")) == [name]


def test_what_stands_beside_the_weights_is_named_as_left_out(tmp_path: Path) -> None:
    left = save(open_checkpoint(FIXTURES / "resnet_nested.pth"), tmp_path / "out.safetensors").left_out
    assert set(left) == {"epoch", "arch", "best_acc1", "optimizer", "scheduler", "args"}
    assert save(open_checkpoint(FIXTURES / "resnet_old.pth"), tmp_path / "two.safetensors").left_out == ()
    left = save(open_checkpoint(FIXTURES / "leaves.pth"), tmp_path / "three.safetensors").left_out
    assert {"none", "huge", "cycle"} <= set(left)
    assert "weight" not in left


def test_values_are_resolved_before_they_are_written(saved: Saved, tmp_path: Path) -> None:
    z = torch.randn(2, 3, dtype=torch.complex64)
    tensors = {"conj": z.conj(), "t": z.t().conj(), "neg": torch._neg_view(torch.tensor([1, -128], dtype=torch.int8))}
    save(open_checkpoint(saved(tensors)), tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor.resolve_conj().resolve_neg()), key
