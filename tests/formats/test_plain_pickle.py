"""NumPy arrays and tensors in pickles of all protocols, with and without torch's frame, judged by numpy and torch."""

from __future__ import annotations

import io
import os
import pickle
import stat
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, Run

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import CkptoolError, FormatError, LimitError
from ckptool.io.files import Files
from ckptool.limits import limited
from ckptool.values.blocks import read_bytes

DTYPES = ["f8", "f4", "f2", "c8", "c16", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name in DTYPES:
        plain = (np.arange(24) % 5).astype(name).reshape(2, 3, 4)
        found[f"c.{name}"], found[f"f.{name}"] = plain, np.asfortranarray(plain)
        found[f"big.{name}"] = plain.astype(np.dtype(name).newbyteorder(">"))
        found[f"k.{name}"] = plain.transpose(1, 2, 0)
        found[f"scalar.{name}"], found[f"empty.{name}"] = np.array(plain[1, 2, 3]), plain[:, :0]
        found[f"large.{name}"] = np.ones((300, 5), name)
    return found


WAYS: dict[str, Any] = {
    "plain": lambda made, path, protocol: path.write_bytes(pickle.dumps(made, protocol)),
    "zip": lambda made, path, protocol: torch.save(made, path, pickle_protocol=protocol),
    "legacy": lambda made, path, protocol: torch.save(
        made, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False
    ),
}


def matches(checkpoint: Checkpoint, wanted: dict[str, np.ndarray[Any, Any]]) -> None:
    found = checkpoint.state_dict()
    assert list(found) == list(wanted)
    with Files() as files:
        for key, array in wanted.items():
            tensor = found[key]
            assert (tensor.dtype, tensor.shape) == (array.dtype.newbyteorder("=").name, array.shape), key
            assert read_bytes(tensor, files) == array.astype(array.dtype.newbyteorder("<")).tobytes(), key


@pytest.mark.parametrize(
    ("way", "protocol"),
    [
        *(("plain", protocol) for protocol in range(6)),
        *(pytest.param(way, protocol, marks=[pytest.mark.slow] if protocol not in (2, 5) else [])
          for way in ("zip", "legacy") for protocol in range(6)),
    ],
)  # fmt: skip
def test_every_dtype_order_and_protocol_is_read_as_numpy_has_it(way: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "given.pkl"
    wanted = arrays()
    WAYS[way]({"model": wanted, "epoch": 3}, path, protocol)
    checkpoint = open_checkpoint(path)
    assert checkpoint.root == ("model",)
    matches(checkpoint, wanted)
    save(checkpoint, tmp_path / "out.pth", verify=True)
    matches(open_checkpoint(tmp_path / "out.pth"), wanted)
    loaded = torch.load(tmp_path / "out.pth", weights_only=False)["model"]
    given = wanted if way == "plain" else torch.load(path, weights_only=False)["model"]
    for key, array in given.items():
        if way == "plain":
            assert torch.equal(loaded[key], torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))), key
        else:
            assert isinstance(loaded[key], np.ndarray)
            assert (loaded[key].dtype, loaded[key].tolist()) == (array.dtype, array.tolist()), key


@pytest.mark.parametrize("made", [b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"], ids=["1", "2"])
def test_what_python_2_and_either_numpy_wrote(made: bytes, tmp_path: Path) -> None:
    array = (
        made + b"_reconstruct\np4\n(cnumpy\nndarray\np5\n(I0\ntp6\nS'b'\np7\ntp8\nRp9\n(I1\n(L2L\ntp10\ncnumpy\ndtype\n"
        b"p11\n(S'f4'\np12\nI0\nI1\ntp13\nRp14\n(I3\nS'<'\np15\nNNNI-1\nI-1\nI0\ntp16\nbI00\n"
        b"S'\\x00\\x00\\x80?\\x00\\x00\\x00\\xc0'\np17\ntp18\nb"
    )
    path = tmp_path / "given.pkl"
    path.write_bytes(b"ccollections\nOrderedDict\np0\n((lp1\n(lp2\nS'w'\np3\na" + array + b"aatp19\nRp20\n.")
    matches(open_checkpoint(path), {"w": np.array([1, -2], "f4")})
    path.write_bytes(b"(dp0\nS'w'\np3\n" + array + b"s.")
    matches(open_checkpoint(path), {"w": np.array([1, -2], "f4")})


def test_arrays_that_are_one_stay_one_and_others_of_equal_bytes_do_not(tmp_path: Path) -> None:
    one, other = np.ones(500), np.ones(1, "u1")
    made: dict[str, Any] = {"a": one, "b": one, "c": other, "d": other.copy(), "e": [one, (one, {"f": (other,)})]}
    made["self"] = made
    (tmp_path / "given.pkl").write_bytes(pickle.dumps(made, 3))
    checkpoint = open_checkpoint(tmp_path / "given.pkl")
    assert checkpoint.shared() == [["a", "b", "e/0", "e/1/0"], ["c", "e/1/1/f/0"]]
    tree = checkpoint.tree
    assert tree["self"] is tree
    assert tree["e"][0] is tree["e"][1][0] is tree["a"]
    assert tree["e"][1][1]["f"][0] is tree["c"]


# --- writing what was read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["torch", "torch-legacy"])
def test_what_is_no_weight_is_written_as_the_array_it_was(to: str, tmp_path: Path) -> None:
    state: Any = np.random.RandomState(1).get_state()
    beside: dict[str, Any] = {
        "rng": {"numpy": state}, "mean": np.arange(5000.0), "matrix": np.matrix([[1.0]]),
        "when": np.array(["2020-01-01"], "M8[D]"),
        "names": np.array(["a", "b"]), "objects": np.array([None, 1], object), "fields": np.zeros(2, [("a", "f4")]),
        "scalar": np.float32(1.5), "masked": np.ma.array([1, 2], mask=[False, True]), "big": np.arange(3, dtype=">u2"),
    }  # fmt: skip
    torch.save({"net": {"w": torch.ones(2)}, **beside}, tmp_path / "given.pth")
    checkpoint = open_checkpoint(tmp_path / "given.pth")
    assert checkpoint.root == ("net",)
    save(checkpoint, tmp_path / "out.pth", to=to, verify=True)
    loaded = torch.load(tmp_path / "out.pth", weights_only=False)
    given = torch.load(tmp_path / "given.pth", weights_only=False)
    assert list(loaded) == list(given)
    for name, value in given.items():
        if name == "net":
            continue
        if name != "rng":
            assert type(loaded[name]) is type(value), name
            assert loaded[name].dtype == value.dtype
            assert repr(loaded[name]) == repr(value), name
    np.random.RandomState().set_state(loaded["rng"]["numpy"])
    assert np.array_equal(loaded["rng"]["numpy"][1], state[1])
    with Files() as files:
        assert read_bytes(checkpoint.tree["rng"]["numpy"][1], files) == state[1].tobytes()


def test_what_an_operation_touched_is_a_tensor(run: Run, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    torch.save({"w": np.ones((2, 3), "f4"), "n": np.arange(3)}, "given.pth")
    torch.save({"w": torch.zeros(2, 3), "n": np.zeros(3, int)}, "other.pth")
    assert run("convert", "given.pth", "--dtype", "bf16", "-o", "cast.pth")[0] == 0
    cast = torch.load("cast.pth", weights_only=False)
    assert torch.equal(cast["w"], torch.ones(2, 3, dtype=torch.bfloat16))
    assert isinstance(cast["n"], np.ndarray)
    assert run("filter", "given.pth", "--match", "other.pth", "-o", "merged.pth")[0] == 0
    merged = torch.load("merged.pth", weights_only=False)
    assert torch.equal(torch.as_tensor(merged["w"]), torch.ones(2, 3))
    assert np.array_equal(np.asarray(merged["n"]), np.arange(3))
    assert run("remap", "given.pth", "--transpose", "w", "-o", "turned.pth")[0] in (0, 2)
    assert run("filter", "other.pth", "--match", "given.pth", "-o", "back.pth")[0] == 0
    back = torch.load("back.pth", weights_only=False)
    assert np.array_equal(np.asarray(back["w"]), np.zeros((2, 3), "f4"))
    assert np.array_equal(np.asarray(back["n"]), np.zeros(3))


def test_every_command_takes_a_plain_pickle(run: Run, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    Path("given.pkl").write_bytes(pickle.dumps({"model": {k: v for k, v in arrays().items() if "c16" not in k}}, 4))
    os.chmod("given.pkl", 0o600)
    suffixes = {"torch": ".pth", "safetensors": ".safetensors", "npz": ".npz", "sharded": ""}
    for to, suffix in suffixes.items():
        code, _, err = run("convert", "given.pkl", "--to", to, "-o", f"out{suffix}", "--verify")
        assert (code, err) == (0, "") or "note" in err, err
        if suffix:
            assert stat.S_IMODE(os.stat(f"out{suffix}").st_mode) == 0o600, to
        if to != "npz":
            assert run("diff", "given.pkl", f"out{suffix}", "--values")[0] == 0
    code, _, err = run("inspect", "given.pkl", "--stats", "--hash", "--check")
    assert (code, err) == (0, "")
    assert run("remap", "given.pkl", "--rename", "c.f4=w", "-o", "new.pth")[0] == 0
    assert run("filter", "given.pkl", "--include", "c.*", "-o", "some.safetensors")[0] == 0
    for args in (["--force"], []):
        code, _, err = run("convert", "given.pkl", "--to", "torch", "-o", "given.pkl", *args)
        assert (code, err.count("\n")) == (2, 1)
        assert "is one of the inputs" in err
    assert run("convert", "given.pkl", "--to", "torch", "-o", "given.pkl", "--in-place")[0] == 0
    assert open_checkpoint("given.pkl").format == "torch-zip"


@pytest.mark.parametrize("protocol", range(6))
def test_tensors_in_a_plain_pickle_are_torchs(protocol: int, tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    made = OrderedDict(a=whole, b=whole, c=whole.t(), d=torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))
    (tmp_path / "given.pkl").write_bytes(pickle.dumps(made, protocol))
    checkpoint = open_checkpoint(tmp_path / "given.pkl")
    assert ["a", "b"] in checkpoint.shared()
    save(checkpoint, tmp_path / "out.pth")
    loaded = torch.load(tmp_path / "out.pth")
    assert list(loaded) == list(made)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in made.items())


def test_the_fixture_is_a_model_zoos(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(FIXTURES / "detectron2.pkl")
    matches(checkpoint, {"w": np.arange(3.0)})
    assert torch.equal(checkpoint.to_torch()["model"]["w"], torch.arange(3.0, dtype=torch.float64))


def test_without_an_array_there_is_nothing_to_work_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "given.pkl").write_bytes(pickle.dumps({"a": [1, "b"]}))
    code, _, err = run("convert", str(tmp_path / "given.pkl"), "--to", "torch", "-o", str(tmp_path / "out.pth"))
    assert (code, err.count("\n")) == (2, 1)
    assert "no tensors" in err


# --- hostile and broken -----------------------------------------------------------------------------------------------


def array_of(shape: bytes, dtype: bytes, data: bytes, fortran: bytes = b"\x89") -> bytes:
    new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return new + b"(K\x01" + shape + dtype + fortran + b"B" + len(data).to_bytes(4, "little") + data + b"tb"


def dtype_of(name: bytes, order: bytes = b"<", rest: bytes = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00") -> bytes:
    return b"cnumpy\ndtype\nU%c%b\x89\x88\x87R(K\x03U\x01%b%btb" % (len(name), name, order, rest)


F4 = dtype_of(b"f4")
LIES = {
    "bytes missing": array_of(b"K\x02\x85", F4, bytes(7)),
    "bytes too many": array_of(b"K\x02\x85", F4, bytes(9)),
    "2**62 elements": array_of(b"\x8a\x08" + (1 << 62).to_bytes(8, "little") + b"\x85", F4, bytes(8)),
    "2**62 in each of three": array_of((b"\x8a\x08" + (1 << 62).to_bytes(8, "little")) * 3 + b"\x87", F4, b""),
    "a negative size": array_of(b"J\xff\xff\xff\xff\x85", F4, b""),
    "a size that is text": array_of(b"U\x012\x85", F4, bytes(8)),
    "a shape that is a dict": array_of(b"}", F4, b""),
    "an order of its own": b"cnumpy.core.numeric\n_frombuffer\n(C\x04\0\0\0\0" + F4 + b"K\x01\x85U\x01XtR",
    "axes of another array": b"cnumpy._core.numeric\n_frombuffer\n(C\x04\0\0\0\0" + F4 + b"K\x01\x85U\x01KK\x01\x85tR",
    "elements that are a dict": b"cnumpy.core.numeric\n_frombuffer\n(}" + F4 + b"K\x01\x85U\x01CtR",
}
LEFT = {
    "a dtype with fields": array_of(b"K\x01\x85", dtype_of(b"f4", b"<", b"N)}K\x04K\x01K\x00"), bytes(4)),
    "a dtype with metadata": array_of(b"K\x01\x85", dtype_of(b"f4", b"<", b"NNNK\x04K\x01}"), b""),
    "a dtype of no order": array_of(b"K\x01\x85", dtype_of(b"f4", b"x"), bytes(4)),
    "float128": array_of(b"K\x01\x85", dtype_of(b"f16"), bytes(16)),
    "a subclass": array_of(b"K\x01\x85", F4, bytes(4)).replace(b"cnumpy\nndarray", b"csongbird\nThing"),
    "a scalar of code": b"cnumpy.core.multiarray\nscalar\n" + dtype_of(b"O8", b"|") + b"C\x10" + bytes(16) + b"\x86R",
    "an array as its own dtype": array_of(b"K\x01\x85", b"cnumpy.core.multiarray\n_reconstruct\n)R", bytes(4)),
    "nothing at all": b"cnumpy.core.multiarray\n_reconstruct\n)R",
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lies_are_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "given.pkl").write_bytes(b"\x80\x03}U\x01w" + LIES[name] + b"s.")
    with pytest.raises(FormatError, match="array") as caught:
        open_checkpoint(tmp_path / "given.pkl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_plain_array_stays_what_it_was(name: str, tmp_path: Path) -> None:
    (tmp_path / "given.pkl").write_bytes(
        b"\x80\x03}(U\x01w" + array_of(b"K\x01\x85", F4, bytes(4)) + b"U\x01x" + LEFT[name] + b"u."
    )
    checkpoint = open_checkpoint(tmp_path / "given.pkl")
    assert list(checkpoint.state_dict()) == ["w"]
    assert list(checkpoint.entries()) == ["w", "x"]


@pytest.mark.parametrize("encoded", [False, True])
def test_arrays_that_share_one_buffer_cost_one(encoded: bool, tmp_path: Path) -> None:
    count, size = 4_000, 1_000_000  # each of them copied: 4 GB
    held = b"c_codecs\nencode\nX" + size.to_bytes(4, "little") + b"a" * size + b"U\x06latin1\x86R" if encoded else (
        b"B" + size.to_bytes(4, "little") + b"a" * size
    )  # fmt: skip
    one = b"h\x01(h\x02h\x03J" + size.to_bytes(4, "little") + b"\x85h\x04tRa"
    start = (
        b"\x80\x03cnumpy._core.numeric\n_frombuffer\nq\x010"
        + held
        + b"q\x020"
        + dtype_of(b"u1", b"|")
        + b"q\x030U\x01Cq\x040"
    )
    (tmp_path / "given.pkl").write_bytes(start + b"]" + one * count + b".")
    before = time.process_time()
    checkpoint = open_checkpoint(tmp_path / "given.pkl")
    found = list(checkpoint.tensors())
    assert len(found) == count
    assert len({id(tensor.source) for _, tensor in found}) == 1
    assert time.process_time() - before < 5


def storages_of(size: int, each: bytes, count: int, start: bytes = b"") -> bytes:
    """Returns a pickle whose list has ``count`` storages, made of what ``each`` pushes; memo 1 is a stream as text."""
    stream = io.BytesIO()
    torch.save(torch.zeros(size, dtype=torch.uint8).storage(), stream, _use_new_zipfile_serialization=False)
    text = stream.getvalue().decode("latin1").encode()
    held = b"X" + len(text).to_bytes(4, "little") + text + b"q\x010ctorch.storage\n_load_from_bytes\nq\x020"
    return b"\x80\x03" + held + start + b"]" + (b"h\x02" + each + b"\x85Ra") * count + b"."


ENCODED = b"c_codecs\nencode\nh\x01U\x06latin1\x86R"


def test_tensors_that_share_one_bytes_object_cost_one(tmp_path: Path) -> None:
    (tmp_path / "given.pkl").write_bytes(storages_of(1_000_000, b"h\x03", 20_000, ENCODED + b"q\x030"))
    before = time.process_time()
    found = open_checkpoint(tmp_path / "given.pkl").tree
    assert time.process_time() - before < 10
    assert (len(found), len({*map(id, found)}), found[0].nbytes) == (20_000, 1, 1_000_000)


def test_bytes_that_are_made_anew_for_every_tensor_count_together(tmp_path: Path) -> None:
    (tmp_path / "given.pkl").write_bytes(storages_of(10_000, ENCODED, 3))
    with limited(MAX_PICKLE=40_000):
        assert len({*map(id, open_checkpoint(tmp_path / "given.pkl").tree)}) == 3
    (tmp_path / "given.pkl").write_bytes(storages_of(10_000, ENCODED, 5))
    with limited(MAX_PICKLE=40_000), pytest.raises(LimitError, match=r"pickles of its tensors .* MAX_PICKLE"):
        open_checkpoint(tmp_path / "given.pkl")


class PaddleTensor:
    """Pickled as ``paddle.save`` pickles a tensor."""

    def __init__(self, name: str, array: Any) -> None:
        self.name, self.array = name, array

    def __reduce__(self) -> Any:
        return tuple, ((self.name, self.array),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_paddles_tensors_are_arrays_and_the_names_in_them_are_said(protocol: int, tmp_path: Path) -> None:
    arrays = {"fc.weight": np.arange(6.0, dtype="f4").reshape(2, 3), "fc.bias": np.ones(3, "u2"), "n": np.array(2)}
    layer = {key: PaddleTensor(f"linear_0.{key[3:4]}_0", array) for key, array in arrays.items()}
    names = {"StructuredToParameterName@@": {key: one.name for key, one in layer.items()}}
    path = tmp_path / "model.pdparams"
    for tree in (layer | names, {"model": layer, "epoch": 3, "pair": (1, PaddleTensor("x", 2))}):
        path.write_bytes(pickle.dumps(tree, protocol))
        opened = open_checkpoint(path)
        assert list(opened.state_dict()) == list(arrays)
        with Files() as files:
            for key, array in arrays.items():
                assert read_bytes(opened.state_dict()[key], files) == array.tobytes()
        assert "Paddle's tensors" in opened.notes[0]
        assert "linear_0.w_0, linear_0.b_0" in opened.notes[0]
    for other in ({"w": np.ones(2), "t": PaddleTensor(3, 4)}, {"w": np.ones(2), "t": [PaddleTensor("a", 4)]}):  # type: ignore[arg-type]
        path.write_bytes(pickle.dumps(other, protocol))
        assert (list(open_checkpoint(path).state_dict()), open_checkpoint(path).notes) == (["w"], ())


def test_what_follows_a_pickle_is_refused_and_so_is_half_of_one(tmp_path: Path) -> None:
    path = tmp_path / "given.pkl"
    whole = pickle.dumps({"w": np.ones(3)}, 4)
    path.write_bytes(whole + whole)
    with pytest.raises(FormatError, match="bytes follow it"):
        open_checkpoint(path)
    for end in range(3, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(CkptoolError):
            open_checkpoint(path)


def test_what_a_nested_stream_names(tmp_path: Path) -> None:
    path = tmp_path / "given.pkl"
    stream = io.BytesIO()
    torch.save(torch.ones(2).storage(), stream, _use_new_zipfile_serialization=False)
    pid = stream.getvalue()
    at = pid.index(b"X\x03\x00\x00\x00cpu")
    evil = pid[:at] + b"cposix\nsystem\nU\x04true\x85R0" + pid[at:]
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\nB%b%b\x85R"
    tensor += b"K\x00K\x02\x85K\x01\x85\x89}tR"
    path.write_bytes(b"\x80\x03}U\x01w" + tensor % (len(evil).to_bytes(4, "little"), evil) + b"s.")
    assert ("posix", "system") in open_checkpoint(path).names
    for wrong in (evil[:-1], evil + b"x", b"PK" + evil, evil.replace(b"FloatStorage", b"FloatSturage")):
        path.write_bytes(b"\x80\x03}U\x01w" + tensor % (len(wrong).to_bytes(4, "little"), wrong) + b"s.")
        with pytest.raises(CkptoolError):
            open_checkpoint(path)
