"""Files of strangers: whatever they name, wherever it stands, whatever is asked, nothing of it is imported or called.

Each file here would make a directory if a part of it ran. What is not about running: paths. Limits: test_limits.
"""

from __future__ import annotations

import contextlib
import copyreg
import importlib
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracles import CANARY, Run, content, thinned
from pickled import THING, beside, legacy, mapping, model, pid, tarred, tensor, text, zipped

REPOSITORY = Path(__file__).parents[1]

SONGBIRD = f"""
import os
def call(*args, **keywords):
    if not os.path.exists({CANARY!r}):
        os.mkdir({CANARY!r})
    return Thing
class Thing:
    def __new__(cls, *args, **keywords):
        call()
        return object.__new__(cls)
    def method(self, *args):
        call()
    __init__ = __call__ = __setstate__ = __setattr__ = __setitem__ = append = extend = add = method
    def __hash__(self):
        call()
        return 1
call()
"""


@pytest.fixture(autouse=True)
def songbird(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that can be imported, and makes the canary's directory when it is, or when anything in it is called."""
    folder = tmp_path / "importable"
    folder.mkdir()
    (folder / "songbird.py").write_text(SONGBIRD)
    monkeypatch.syspath_prepend(folder)
    for code in (1, 0x101, 0x10001):
        monkeypatch.setitem(copyreg._inverted_registry, code, ("songbird", "call"))  # type: ignore[attr-defined]
    yield
    sys.modules.pop("songbird", None)


# --- every opcode that can name or call ------------------------------------------------------------------------------

CALL, ARGUMENT = b"csongbird\ncall\n", text("x")
MADE = THING + b")\x81"
REBUILT = b"ctorch._tensor\n_rebuild_from_type_v2\n("

PAYLOADS = {
    "GLOBAL": THING,
    "REDUCE": CALL + ARGUMENT + b"\x85R",
    "STACK_GLOBAL": text("songbird") + text("call") + b"\x93" + ARGUMENT + b"\x85R",
    "a dotted name": text("songbird") + text("Thing.method") + b"\x93" + ARGUMENT + b"\x85R",
    "INST": b"(" + ARGUMENT + b"isongbird\ncall\n",
    "OBJ": b"(" + THING + ARGUMENT + b"o",
    "NEWOBJ": THING + ARGUMENT + b"\x85\x81",
    "NEWOBJ_EX": THING + ARGUMENT + b"\x85}\x92",
    "NEWOBJ_EX with keywords": THING + b")}" + ARGUMENT + b"Ns\x92",
    "BUILD": MADE + b"}" + ARGUMENT + b"Nsb",
    "BUILD with slots": MADE + b"N}" + ARGUMENT + b"Ns\x86b",
    "BUILD of a dict": b"ccollections\nOrderedDict\n)R}" + text("hook") + MADE + b"sb",
    "APPEND": MADE + ARGUMENT + b"a",
    "APPENDS": MADE + b"(" + ARGUMENT + b"e",
    "SETITEM": MADE + ARGUMENT + b"Ns",
    "SETITEMS": MADE + b"(" + ARGUMENT + b"Nu",
    "ADDITEMS": MADE + b"(" + ARGUMENT + b"\x90",
    "a call of a call": CALL + b")R" + ARGUMENT + b"\x85R",
    "a key": b"}" + MADE + b"Ns",
    "an item of a frozenset": b"(" + MADE + b"\x91",
    "getattr": b"cbuiltins\ngetattr\n" + THING + text("method") + b"\x86RN\x85R",
    "map": b"cbuiltins\nlist\ncbuiltins\nmap\n" + CALL + b"]" + ARGUMENT + b"a\x86R\x85R",
    "a function that rebuilds": REBUILT + CALL + THING + ARGUMENT + b"\x85NtR",
    "the class of a tensor": REBUILT + b"ctorch._utils\n_rebuild_tensor_v2\n" + THING
    + b"(" + pid() + b"K\x00K\x01\x85K\x01\x85\x89ccollections\nOrderedDict\n)Rt" + MADE + b"tR",
    "the state of a parameter": b"ctorch._utils\n_rebuild_parameter_with_state\n("
    + tensor() + b"\x88ccollections\nOrderedDict\n)R}" + text("a") + MADE + b"stR",
    "called and thrown away": CALL + ARGUMENT + b"\x85R0N",
}  # fmt: skip
"""Opcodes that leave one object; all is read, and named."""

REFUSED = {
    "EXT1": b"\x82\x01" + ARGUMENT + b"\x85R",
    "EXT2": b"\x83\x01\x01" + ARGUMENT + b"\x85R",
    "EXT4": b"\x84\x01\x00\x01\x00" + ARGUMENT + b"\x85R",
    "PERSID": b"Psongbird.call\n",
    "BINPERSID": MADE + b"Q",
    "a storage's class": b"(" + text("storage") + THING + text("0") + text("cpu") + b"K\x01tQ",
    "a storage's device": pid(location=MADE),
    "a storage's key": pid(key=MADE),
    "a tensor's shape": tensor(shape=MADE),
    "a tensor's storage": tensor(storage=MADE),
}
"""Opcodes that no tensor file has in such a place: an error that says so."""

ALONE = ("the class of a tensor", "the state of a parameter", "BUILD of a dict", "a key", "an item of a frozenset")
"""Payloads that Python's machine alone cannot load, or that run without anything being called."""


@pytest.mark.parametrize("name", [name for name in {**PAYLOADS, **REFUSED} if "storage" not in name])
def test_the_songbird_sings_when_a_payload_is_really_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise all the tests below could not fail.
    if name in ("PERSID", "BINPERSID", "a tensor's shape", "GLOBAL", *ALONE[:2]):
        pytest.skip("needs torch's own machine")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    importlib.import_module("songbird")
    os.rmdir(CANARY)
    with contextlib.suppress(TypeError, AttributeError):
        pickle.loads(b"\x80\x04" + {**PAYLOADS, **REFUSED}[name] + b".")
    assert Path(CANARY).exists()


# --- every place that a pickle has -----------------------------------------------------------------------------------

Place = Callable[[bytes], str]


def shard(write: Callable[[str], str]) -> str:
    os.makedirs("given", exist_ok=True)
    write("given/pytorch_model-00002-of-00002.bin")
    torch.save({"v": torch.ones(1)}, "given/pytorch_model-00001-of-00002.bin")
    names = {key: f"pytorch_model-0000{number}-of-00002.bin" for number, key in ((1, "v"), (2, "w"))}
    Path("given/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return "given"


def scripted(payload: bytes = b"N", constant: bytes = b"N") -> str:
    """A TorchScript archive with a payload in one of its pickles."""
    attributes = mapping(text("w"), tensor(), text("hook"), payload)
    zipped(b"\x80\x02c__torch__\nM\n)\x81" + attributes + b"b.")
    with zipfile.ZipFile("given.pth", "a") as made:
        made.writestr("archive/constants.pkl", b"\x80\x02" + constant + b".")
        made.writestr("archive/code/__torch__.py", 'class M(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n')
    return "given.pth"


def exported(payload: bytes) -> str:
    """An archive of torch.export as torch 2.7 wrote it, with a payload in its weights."""
    zipped(beside(payload), "inner.pt")
    with zipfile.ZipFile("given.pt2", "w") as made:
        made.writestr("serialized_exported_program.json", "{}")
        made.write("inner.pt", "serialized_state_dict.pt")
    return "given.pt2"


def packaged(payload: bytes) -> str:
    """A torch.package archive with a payload in one of its resources."""
    with zipfile.ZipFile("given.pt", "w") as made:
        made.writestr("p/.data/extern_modules", "")
        made.writestr("p/.data/0.storage", bytes(4))
        made.writestr("p/m/w.pkl", b"\x80\x02" + mapping(text("w"), tensor(pid(b"K\0")), text("hook"), payload) + b".")
    return "given.pt"


PLACES: dict[str, Place] = {
    "torch.export, its weights": exported,
    "torch.package, a resource": packaged,
    "TorchScript, a module": lambda payload: scripted(payload),
    "TorchScript, a constant": lambda payload: scripted(constant=payload),
    "a zip's data.pkl": lambda payload: zipped(beside(payload)),
    "thrown away before a zip's tree": lambda payload: zipped(
        b"\x80\x02" + payload + b"0" + mapping(text("w"), tensor()) + b"."
    ),
    "legacy magic": lambda payload: legacy(payload, "magic"),
    "legacy version": lambda payload: legacy(payload, "version"),
    "legacy system": lambda payload: legacy(payload, "system"),
    "legacy system, in its dict": lambda payload: legacy(payload, "in the system's dict"),
    "legacy tree": lambda payload: legacy(payload, "tree"),
    "legacy keys": lambda payload: legacy(payload, "keys"),
    "tar storages": lambda payload: tarred(payload, "storages"),
    "tar, a storage": lambda payload: tarred(payload, "a storage"),
    "tar, its views": lambda payload: tarred(payload, "views"),
    "tar tensors": lambda payload: tarred(payload, "tensors"),
    "tar, a tensor": lambda payload: tarred(payload, "a tensor"),
    "tar pickle": lambda payload: tarred(payload, "pickle"),
    "a shard": lambda payload: shard(lambda path: zipped(beside(payload), path)),
    "a legacy shard": lambda payload: shard(lambda path: legacy(payload, "keys", path)),
}


def plain(payload: bytes, path: str) -> str:
    Path(path).write_bytes(payload)
    return path


NO_PLACES: dict[str, Place] = {
    "a plain pickle": lambda payload: plain(beside(payload), "given.pkl"),
    "a plain pickle of protocol 0": lambda payload: plain(beside(payload)[2:], "given.pkl"),
    "a zip's second pickle": lambda payload: second(payload, "archive/other.pkl", "outside/constants.pkl"),
}
"""Files that are refused for what they are."""


def second(payload: bytes, *names: str) -> str:
    zipped(beside(b"N"))
    with zipfile.ZipFile("given.pth", "a") as made:
        for name in names:
            made.writestr(name, beside(payload))
    return "given.pth"


def ways(path: str) -> Iterator[list[str]]:
    """Every command, in every way in which it reads a file."""
    out = ["--force", "--no-fsync"]
    yield ["inspect", path]
    yield ["inspect", path, "--check", "--stats", "--hash", "--json"]
    yield ["inspect", path, "--flat", "--sort", "numel"]
    yield ["diff", path, "good.pth", "--values", "--devices"]
    yield ["diff", "good.pth", path, "--quick", "--json"]
    yield ["filter", path, "-o", "out.pth", "--verify", *out]
    yield ["filter", "--match", path, "good.pth", "-o", "out.safetensors", *out]
    yield ["filter", "--match", "good.pth", path, "-o", "out.pth", "--report", "report.json", *out]
    yield ["remap", path, "--rename", "w=u", "-o", "out.pth", "--save-map", "map.json", *out]
    yield ["remap", path, "--drop", "nothing", "--allow-unused", "--dry-run", "--json"]
    yield ["convert", path, "--to", "safetensors", "-o", "out.safetensors", *out]
    yield ["convert", path, "--to", "torch", "-o", "out.pth", *out]
    yield ["convert", path, "--to", "torch-legacy", "-o", "out.pth", *out]
    yield ["convert", path, "--to", "sharded", "-o", "out", *out]
    yield ["convert", path, "--to", "npz", "-o", "out.npz", "--dtype", "float16", *out]
    yield ["convert", path, "--to", "torch", "-o", "published.pth", "--publish", *out]
    yield ["load-partial", path, "--into", "good.pth", "-o", "out.pth", "--optimizer", "remap", *out]
    yield [
        "load-partial",
        "good.pth",
        "--into",
        path,
        "-o",
        "out.pth",
        "--init",
        "*=default",
        "--freeze",
        "loaded",
        *out,
    ]


@pytest.fixture
def every(run: Run) -> Callable[..., list[tuple[int, str, str]]]:
    """Runs every command over a file, in all `ways`: none may run or import anything, or end without a word."""

    def call(path: str, step: int = 1, begin: int = 0) -> list[tuple[int, str, str]]:
        torch.save({"w": torch.ones(1)}, "good.pth")
        results = []
        for args in list(ways(path))[begin::step]:
            code, out, err = run(*args)
            assert not Path(CANARY).exists(), args
            assert "songbird" not in sys.modules, args
            assert code in (0, 1, 2), args
            assert code != 2 or (err.count("\n"), err[:16]) == (1, "ckptool: error: "), (args, err)
            results.append((code, out, err))
        return results

    return call


Every = Callable[..., list[tuple[int, str, str]]]


@thinned(3)
@pytest.mark.parametrize("name", PAYLOADS)
def test_no_opcode_makes_any_command_run_anything(name: str, step: int, run: Run, every: Every) -> None:
    path = PLACES["a zip's data.pkl"](PAYLOADS[name])
    assert run("inspect", path)[0] == 0
    results = every(path, step, list(PAYLOADS).index(name) % step)
    assert {code for code, _, _ in results} >= {0, 2} or 2 not in {code for code, _, _ in results[: 6 // step]}


@thinned(3)
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_file_of_tensors_has_is_refused_by_every_command(name: str, step: int, every: Every) -> None:
    begin = list(REFUSED).index(name) % step
    assert {code for code, _, _ in every(PLACES["a zip's data.pkl"](REFUSED[name]), step, begin)} == {2}
    if name != "a storage's device":  # of torch's old streams only the first place that names a storage counts
        assert {code for code, _, _ in every(PLACES["legacy tree"](REFUSED[name]), step, begin)} == {2}


OPCODES = ["REDUCE", "STACK_GLOBAL", "INST", "called and thrown away"]


@thinned(8)
@pytest.mark.parametrize("place", PLACES)
def test_no_place_makes_any_command_run_anything(place: str, step: int, run: Run, every: Every) -> None:
    """Every command in every place, the opcodes in turn or all of them: each meets each in the places of a format."""
    first = list(PLACES).index(place)
    for number, name in enumerate(OPCODES):
        path = PLACES[place](PAYLOADS[name])
        assert run("inspect", path)[0] == 0
        every(path, step, (first + number) % step)


@pytest.mark.parametrize("name", ["EXT1", "PERSID", "BINPERSID"])
@pytest.mark.parametrize("place", PLACES)
def test_what_reaches_outside_is_refused_in_every_place(place: str, name: str, run: Run) -> None:
    if name == "BINPERSID" and place == "tar pickle":
        pytest.skip("there it is a module that is named with its source")
    code, out, err = run("inspect", PLACES[place](REFUSED[name]))
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("place", NO_PLACES)
def test_pickles_that_are_no_checkpoints_are_refused_and_not_run(place: str, every: Every) -> None:
    assert {code for code, _, _ in every(NO_PLACES[place](PAYLOADS["REDUCE"]))} == {2}


def test_an_exploit_alone_in_a_plain_pickle_is_shown_by_inspect_and_refused_by_all_that_need_weights(
    every: Every,
) -> None:
    path = plain(b"\x80\x04" + PAYLOADS["REDUCE"] + b".", "given.pth")
    codes: dict[str, set[int]] = {args[0]: set() for args in ways(path)}
    for args, (code, _, _) in zip(ways(path), every(path), strict=True):
        codes[args[0]].add(code)
    assert codes.pop("inspect") == {0, 1}
    assert set().union(*codes.values()) == {2}


AUDITED = """
import sys
met = []
def hook(event, args):
    if event != "object.__getattr__" and ("songbird" in repr(args) or event in ("os.system", "subprocess.Popen",
            "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")):
        met.append((event, repr(args)[:200]))
sys.addaudithook(hook)
import json
from ckptool.cli import main
codes = [main(args) for args in json.load(open("ways.json"))]
print(codes, met, "songbird" in sys.modules, file=sys.stderr)
"""


def test_the_interpreter_is_never_asked_for_what_a_file_names() -> None:
    """Python itself tells of every import, open, exec and system call of a process that runs every command."""
    torch.save({"w": torch.ones(1)}, "good.pth")
    shell = b"cposix\nsystem\n" + text("echo songbird") + b"\x85R"
    plain = [value for name, value in PAYLOADS.items() if name not in ALONE[:2] and "keywords" not in name]
    paths = [
        zipped(beside(b"(" + b"".join(values) + shell + b"l"), f"{number}.pth")
        for number, values in enumerate([plain, PAYLOADS.values(), *([value] for value in REFUSED.values())])
    ]
    Path("ways.json").write_text(json.dumps([args for path in paths for args in ways(path)]))
    done = subprocess.run(
        [sys.executable, "-c", AUDITED], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), "importable"])},
    )  # fmt: skip
    codes, met = done.stderr.splitlines()[-1].split("] [", 1) if "] [" in done.stderr else (done.stderr, "")
    assert met.startswith("] False") or met == "] False", done.stderr
    assert codes.count("0") > 10, done.stderr
    assert not Path(CANARY).exists()


# --- what is said of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAYLOADS)
def test_inspect_names_what_a_file_would_have_called_and_is_a_gate(name: str, run: Run) -> None:
    is_named_so(PLACES["a zip's data.pkl"](PAYLOADS[name]), run)


@pytest.mark.parametrize("place", PLACES)
def test_inspect_names_it_wherever_it_stands(place: str, run: Run) -> None:
    is_named_so(PLACES[place](PAYLOADS["REDUCE"]), run)


def is_named_so(path: str, run: Run) -> None:
    code, out, _ = run("inspect", path)
    assert code == 0
    assert re.search(r"names beyond tensors, none imported or run: .*songbird\.", out)
    code, out, _ = run("inspect", path, "--check", "--fail-on", "acting,unknown")
    assert code == 1
    assert re.search(r"(acting|unknown) +songbird\.[\w.]+: named by the pickle, not needed by tensors, not run", out)
    code, out, _ = run("inspect", path, "--check", "--json")
    (report,) = json.loads(out)["result"]
    assert code == ("acting" in report["kinds"].values())  # calls; a class alone is unknown
    assert any(one.startswith("songbird.") for one in report["unsafe"])
    assert {one["kind"] for one in report["check"]["findings"]} <= {"acting", "unknown"}


def test_a_name_behind_a_name_that_tensors_need_is_not_needed_by_tensors(run: Run) -> None:
    behind = (
        text("torch._utils") + text("_rebuild_tensor_v2.__globals__.__getitem__") + b"\x93" + text("sys") + b"\x85R"
    )
    code, out, _ = run("inspect", zipped(beside(behind)), "--check")
    assert code == 1
    assert "acting  torch._utils._rebuild_tensor_v2.__globals__.__getitem__" in out


def test_files_of_tensors_alone_pass_the_gate(run: Run) -> None:
    torch.save({"w": torch.nn.Parameter(torch.ones(2)), "epoch": 3, "size": torch.Size([2])}, "fine.pth")
    assert run("inspect", "fine.pth", "--check")[0] == 0


@pytest.mark.parametrize("name", PAYLOADS)
def test_what_becomes_safetensors_is_tensors_only_and_what_was_left_is_said(name: str, run: Run) -> None:
    path = zipped(beside(PAYLOADS[name]))
    code, out, _ = run("convert", path, "--to", "safetensors", "-o", "safe.safetensors")
    assert code == 0, out
    data = Path("safe.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header) - {"__metadata__", "hook"} == {"w"}
    assert "hook" not in header or name in ALONE[:2]
    assert b"songbird" not in data
    assert re.search(r"left out +.*hook", out), out
    assert run("inspect", "safe.safetensors", "--check")[0] == 0


# --- zips and paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["archive/DATA.PKL", "archive/Data/0", "archive/data/A"])
def test_two_members_that_torch_may_take_for_each_other_are_refused(other: str, run: Run) -> None:
    zipped(beside(b"N"))
    with zipfile.ZipFile("given.pth", "a") as made:
        made.writestr("archive/data/a", b"")
        made.writestr(other, beside(PAYLOADS["REDUCE"]))
    code, _, err = run("inspect", "given.pth")
    assert (code, err) == (2, f"ckptool: error: given.pth: two zip members differ in case only: {other[8:].lower()}\n")


@pytest.mark.parametrize(
    "name",
    ["../given.pth", "../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b.bin", "a\\b.bin", "x\0y", "./given.pth"],
)
def test_an_index_never_leads_out_of_its_directory(name: str, every: Every) -> None:
    zipped(beside(b"N"))
    Path("inside").mkdir()
    Path("inside/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    for path in ("inside", "inside/model.safetensors.index.json"):
        for code, out, err in every(path):
            assert (code, "names a file outside its directory" in err or "names a file outside" in out) == (2, True)


def test_shards_lie_beside_the_index_as_it_was_named_link_or_not(run: Run) -> None:
    """As in the cache of Hugging Face, whose files are links made by the user's own tools."""
    os.makedirs("blobs")
    os.makedirs("snapshot")
    zipped(beside(b"N"), "blobs/1234")
    Path("blobs/5678").write_text(json.dumps({"weight_map": {"w": "model-1.bin"}}))
    os.symlink("../blobs/5678", "snapshot/model.bin.index.json")
    assert run("inspect", "snapshot")[0] == 2
    os.symlink("../blobs/1234", "snapshot/model-1.bin")
    assert run("inspect", "snapshot", "--check")[0] == 0
    os.remove("snapshot/model-1.bin")
    os.symlink("model-1.bin", "snapshot/model-1.bin")
    assert run("inspect", "snapshot")[0] == 2


def tar_with(*odd: tuple[str, bytes, str]) -> str:
    tarred(b"N", "sys_info")
    with tarfile.open("given.pth", "a") as made:
        for name, kind, target in odd:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            made.addfile(info)
    return "given.pth"


def test_a_tar_is_never_unpacked(every: Every, tmp_path: Path) -> None:
    path = tar_with(
        ("../escaped", tarfile.REGTYPE, ""), (str(tmp_path / "absolute"), tarfile.REGTYPE, ""),
        ("link", tarfile.SYMTYPE, "/etc/passwd"), ("hard", tarfile.LNKTYPE, "/etc/passwd"),
        ("pipe", tarfile.FIFOTYPE, ""), ("device", tarfile.CHRTYPE, ""),
    )  # fmt: skip
    above = set(os.listdir(".."))
    assert every(path)[0][0] == 0
    assert set(os.listdir("..")) == above
    assert not {"absolute", "link", "hard", "pipe", "device"} & set(content())


@pytest.mark.parametrize(
    "odd",
    [("pickle", tarfile.SYMTYPE, "/etc/passwd"), ("pickle", tarfile.LNKTYPE, "sys_info"),
     ("tensors", tarfile.REGTYPE, "")],
)  # fmt: skip
def test_a_tar_that_two_readers_would_read_in_two_ways_is_refused(odd: tuple[str, bytes, str], every: Every) -> None:
    assert {code for code, _, _ in every(tar_with(odd))} == {2}


# --- bombs that had not been met before ------------------------------------------------------------------------------


def test_frozensets_that_take_years_to_compare_never_reach_the_machine(run: Run) -> None:
    def doubled(at: int) -> bytes:
        one = b"q%c" % at
        get = b"h%c" % at
        return b"(\x91" + one + b"0" + (b"(" + get + get + b"\x86\x91" + one + b"0") * 64

    pickled = doubled(1) + doubled(2) + mapping(text("w"), tensor(), b"h\x01", b"N", b"h\x02", b"N")
    code, _, err = run("inspect", model(pickled))
    assert (code, "MAX_TUPLE_ITEMS" in err) == (2, True)


def test_a_tuple_of_a_million_items_is_no_key_of_an_old_dict(run: Run) -> None:
    """Python 2 pickled an OrderedDict as pairs: the machine has not hashed their keys, so they were never counted."""
    large = b"(" + b"N" * 1000 + b"tq\x01(" + b"h\x01" * 1000 + b"tq\x02"
    value = large + b"00ccollections\nOrderedDict\n](" + b"](h\x02Ne" * 3000 + b"e\x85R"
    before = b"\x80\x02" + mapping(text("w"), tensor()) + b"(" + text("x")
    code, _, err = run("inspect", zipped(before + value + b"u."))
    assert (code, err) == (0, "")


def test_a_large_key_above_many_tensors_is_said_in_few_words(run: Run) -> None:
    key = b"(" + b"N" * 200_000 + b"t"
    below = mapping(*(text(f"{i}") + tensor() for i in range(150)))
    path = model(mapping(text("w"), tensor(), text("other"), mapping(key, below)))
    for args in (["inspect", path, "--check"], ["diff", path, path], ["convert", path, "-o", "out.safetensors"]):
        code, out, err = run(*args)
        assert len(out) + len(err) < 100_000, args
        assert code in (0, 2)
