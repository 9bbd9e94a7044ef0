"""What a pickle names is tensor machinery, ordinary data, unknown, or acting; which of these fail a check."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import functools
import json
import logging
import operator
import os
import pathlib
import pickle
import runpy
import subprocess
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Run
from pickled import beside, legacy, mapping, tarred, tensor, text, zipped
from torch import nn
from torch._weights_only_unpickler import _get_allowed_globals
from torch.ao import quantization

import ckptool
from ckptool.core.pickled_names import kind
from ckptool.errors import UsageError


class Colour(enum.Enum):
    red = 1


class Settings:
    class Inner:
        pass

    def __init__(self) -> None:
        self.inner, self.kind, self.colour = Settings.Inner(), Settings.Inner, Colour.red


class net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.TransformerEncoderLayer(4, 2))
        self.act = nn.functional.gelu


class Keyed:
    def __new__(cls, *, size: int) -> Keyed:
        made = object.__new__(cls)
        made.size = size  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> Any:
        return (), {"size": 3}


class Call:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.made = function, args

    def __reduce__(self) -> Any:
        return self.made


def helper(value: object) -> object:
    return value


SOUND: dict[str, Callable[[], Any]] = {
    "arguments": lambda: argparse.Namespace(lr=0.1, out=pathlib.Path("runs")),
    "paths": lambda: [pathlib.Path("a"), pathlib.PurePosixPath("b"), pathlib.PureWindowsPath("c")],
    "times": lambda: [datetime.datetime.now(datetime.UTC), datetime.timedelta(1), datetime.date.today()],
    "numbers": lambda: [decimal.Decimal("0.1"), uuid.uuid4(), 1j, range(3), slice(1), ...],
    "numpy's scalars": lambda: [np.float64(1), np.int32(2), np.bool_(True), np.dtype("f4"), np.float32],
    "states of numpy's generators": lambda: [
        np.random.get_state(), np.random.RandomState(0), np.random.default_rng(0),
        np.random.Generator(np.random.Philox(1)),
    ],
    "a masked array": lambda: np.ma.array([1, 2], mask=[0, 1]),
    "containers": lambda: [
        collections.defaultdict(list, a=[1]), collections.deque([1]), collections.Counter("ab"),
        collections.UserDict(a=1),
    ],
    "a namespace": lambda: types.SimpleNamespace(a=1, logger=logging.getLogger("train")),
    "a user's enum and classes": lambda: {"colour": Colour.red, "settings": Settings()},
    "a user's function, not called": lambda: {"collate": helper, "partial": functools.partial(helper, 1)},
    "an object made with keywords": lambda: Keyed(size=3),
    "a whole model": net,
    "a whole quantised model": lambda: quantised(),
    "an optimizer and its schedule": lambda: optimizer(),
    "a class of None": lambda: type(None),
}  # fmt: skip


def quantised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    return quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def optimizer() -> Any:
    made = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    return [made.state_dict(), torch.optim.lr_scheduler.StepLR(made, 2).state_dict()]


EVIL: dict[str, Callable[[], Any]] = {
    "os.system": lambda: Call(os.system, "touch RAN"),
    "a class of subprocess": lambda: Call(subprocess.Popen, "touch RAN"),
    "eval inside a state": lambda: state(Call(eval, "1")),
    "exec among defaults": lambda: collections.defaultdict(list, a=[Call(exec, "1")]),
    "a partial of os.system": lambda: functools.partial(os.system, "touch RAN"),
    "a caller of methods": lambda: Call(operator.methodcaller, "system"),
    "runpy": lambda: Call(runpy.run_path, "evil.py"),
    "torch.hub": lambda: Call(torch.hub.load, "a/b", "c"),
    "torch.load": lambda: Call(torch.load, "evil.pth"),
    "a map of a file that is made": lambda: Call(np.memmap, "victim", "u1", "w+"),
    "a reader of a file": lambda: Call(torch._C.PyTorchFileReader, "x"),
    "an import": lambda: Call(__import__, "evil"),
    "getattr of an object": lambda: Call(getattr, argparse.Namespace(a=1), "a"),
    "a function of the user's that is called": lambda: Call(helper, 1),
    "a key": lambda: {Call(pickle.loads, b"N."): 1},
    "a function, only named": lambda: {"default": os.getcwd},
}


def state(value: object) -> Settings:
    made = Settings()
    made.__dict__["hook"] = value
    return made


def plain(value: Any, path: str) -> None:
    Path(path).write_bytes(pickle.dumps(value))


WRITTEN: dict[str, Callable[[Any, str], None]] = {
    "zip": torch.save,
    "zip, protocol 4": lambda value, path: torch.save(value, path, pickle_protocol=4),
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "plain": plain,
}

ANYWHERE = pytest.mark.parametrize("how", WRITTEN)


def kinds(path: str) -> dict[str, str]:
    return dict(ckptool.inspect(path).kinds)


@ANYWHERE
@pytest.mark.parametrize("name", SOUND)
def test_sound_files_of_users_pass(name: str, how: str, run: Run) -> None:
    WRITTEN[how]({"model": {"w": torch.ones(2)}, "beside": SOUND[name]()}, "given.pth")
    code, out, _ = run("inspect", "given.pth", "--check")
    assert (code, "acting" in out) == (0, False), out


@ANYWHERE
@pytest.mark.parametrize("name", EVIL)
def test_files_with_names_that_act_fail(name: str, how: str, run: Run) -> None:
    WRITTEN[how]({"model": {"w": torch.ones(2)}, "beside": EVIL[name]()}, "given.pth")
    code, out, _ = run("inspect", "given.pth", "--check", "--json")
    (report,) = json.loads(out)["result"]
    acting = {name for name, one in report["kinds"].items() if one == "acting"}
    assert (code, bool(acting)) == (1, True)
    assert acting <= set(report["unsafe"])
    assert {one["kind"] for one in report["check"]["findings"] if not one.get("passes")} == {"acting"}
    assert run("inspect", "given.pth", "--check", *(f"--allow={name}" for name in acting))[0] == 0


CALL = b"cmypackage.tools\nbuild\n"
BY_OPCODES = {
    "REDUCE": CALL + text("x") + b"\x85R",
    "thrown away": CALL + text("x") + b"\x85R0N",
    "INST": b"(" + text("x") + b"imypackage.tools\nbuild\n",
    "INST without arguments": b"(imypackage.tools\nbuild\n",
    "OBJ without arguments": b"(" + CALL + b"o",
    "by a function that rebuilds": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + CALL + b"ctorch\nTensor\n)NtR",
    "a partial that is called": b"cfunctools\npartial\n" + CALL + b"\x85R(" + CALL + b")}NtbN\x85R",
    "an object that is called": b"cmypackage.tools\nMaker\n)\x81N\x85R",
    "a chain of attributes": b"cbuiltins\ngetattr\ncbuiltins\ngetattr\ncmypackage\nThing\n"
    + text("method") + b"\x86R" + text("__globals__") + b"\x86R",
    "a method of a class": b"cbuiltins\ngetattr\ncmypackage\nThing\n" + text("method") + b"\x86RN\x85R",
    "through a module": text("mypackage.tools") + text("os.system") + b"\x93",
    "through a function": text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93",
    "what a module has of Python's": b"cmypackage.tools\n__builtins__\n",
    "a process under another name": b"cmypackage.tools\nPopen\n",
    "a name of Python 2": b"ccommands\ngetoutput\n",
}  # fmt: skip

PLACES: dict[str, Callable[[bytes], str]] = {
    "zip": lambda payload: zipped(beside(payload)),
    "legacy": lambda payload: legacy(payload, "tree"),
    "legacy, thrown away": lambda payload: legacy(payload, "system"),
    "tar": lambda payload: tarred(payload, "pickle"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BY_OPCODES)
def test_a_call_is_found_however_it_is_made(name: str, place: str, run: Run) -> None:
    code, out, _ = run("inspect", PLACES[place](BY_OPCODES[name]), "--check")
    assert code == 1, out
    assert "\n  acting " in out


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "payload",
    [CALL, b"cmypackage.tools\nNet\n)\x81", b"cmypackage.tools\nnet\n)\x81}b", b"cmypackage.tools\nMode\nK\x01\x85R"],
    ids=["a function that is named", "a class", "a class in small letters", "an enum"],
)
def test_a_class_of_a_user_is_unknown_and_fails_only_if_asked(payload: bytes, place: str, run: Run) -> None:
    path = PLACES[place](payload)
    assert {one for name, one in kinds(path).items() if name.startswith("mypackage.")} == {"unknown"}
    code, out, _ = run("inspect", path, "--check")
    assert (code, ", let pass\n" in out) == (0, True)
    assert run("inspect", path, "--check", "--fail-on", "acting,unknown")[0] == 1
    assert run("inspect", path, "--check", "--fail-on", "unknown", "--allow", "mypackage.*")[0] == 0


def test_a_config_of_omegaconf_is_ordinary_data() -> None:
    metadata = b"comegaconf.base\nContainerMetadata\n)\x81}" + text("ref_type") + b"ctyping\nAny\nsb"
    node = b"comegaconf.nodes\nAnyNode\n)\x81}" + text("_val") + b"K\x01sb"
    config = b"comegaconf.dictconfig\nDictConfig\n)\x81}(" + text("_metadata") + metadata + text("lr") + node + b"ub"
    assert set(kinds(zipped(beside(config))).values()) == {"ordinary"}


def test_all_that_torchs_own_safe_list_allows_is_tensor_machinery() -> None:
    names = [name.rpartition(".") for name in _get_allowed_globals()]
    assert [f"{module}.{name}" for module, _, name in names if kind(module, name) != "tensor"] == []


def test_what_fails_is_chosen(run: Run) -> None:
    torch.save({"w": torch.tensor([float("nan"), 1.0]), "args": argparse.Namespace(), "c": Colour.red}, "given.pth")
    assert run("inspect", "given.pth", "--check")[0] == 1
    assert run("inspect", "given.pth", "--check", "--fail-on", "acting,inf,crc")[0] == 0
    assert run("inspect", "given.pth", "--check", "--fail-on", "inf", "--fail-on", "nan")[0] == 1
    assert run("inspect", "given.pth", "--check", "--fail-on", "ordinary")[0] == 1
    code, _, err = run("inspect", "given.pth", "--check", "--fail-on", "actng")
    assert (code, "did you mean acting?" in err) == (2, True)
    assert run("inspect", "given.pth", "--fail-on", "nan")[0] == 2
    _, _, err = run("inspect", "given.pth", "--check", "--allow", "os.*")
    assert "--allow os.* fits no name" in err


def test_the_library_has_the_same_choice() -> None:
    torch.save({"w": torch.ones(1), "hook": Call(os.system, "touch RAN")}, "given.pth")
    for given, fails in (({}, True), ({"fail_on": ["nan"]}, False), ({"allow": "*.system"}, False)):
        report = ckptool.inspect("given.pth", check=True, **given)  # type: ignore[arg-type]
        assert report.check is not None
        assert report.check.fails == fails
    with pytest.raises(UsageError, match="not 'x'"):
        ckptool.inspect("given.pth", check=True, fail_on=["x"])


def test_a_command_says_that_its_output_carries_what_acts_or_leaves_it_out(run: Run) -> None:
    value = {"w": torch.ones(2), "hook": Call(os.system, "touch RAN"), "args": argparse.Namespace()}
    torch.save(value, "given.pth")
    carries = "the output carries names that act, for torch.load(weights_only=False) to call: "
    left = "names that act are left out: "
    name = f"{os.system.__module__}.system"
    commands = {
        "filter": ["filter", "given.pth"], "convert": ["convert", "given.pth"],
        "remap": ["remap", "given.pth", "--add-prefix", "x."], "publish": ["convert", "given.pth", "--publish"],
        "safetensors": ["convert", "given.pth", "--to", "safetensors"],
    }  # fmt: skip
    for command, args in commands.items():
        has = command in ("filter", "convert", "remap")
        for more in (["--dry-run"], ["--json"]):
            code, out, err = run(*args, "-o", f"{command}.out", *(["--to", "torch"] * ("--to" not in args)), *more)
            assert code == 0, err
            assert ((carries if has else left) + name in out, (left if has else carries) in out) == (True, False), out
        (output,) = Path().glob(f"{command}*.out")  # --publish has a digest in the name
        assert (name in kinds(str(output))) == has
    torch.save({"v": torch.ones(2)}, "first.pth")
    assert carries + name in run("filter", "first.pth", "given.pth", "-o", "both.pth")[1]
    torch.save({"w": torch.ones(2), "args": argparse.Namespace(), "c": Colour.red}, "sound.pth")
    assert "names that act" not in run("filter", "sound.pth", "-o", "sound.out.pth")[1]


def test_a_call_that_is_thrown_away_is_not_carried(run: Run) -> None:
    path = zipped(b"\x80\x02" + mapping(text("w"), tensor(), text("hook"), b"cos\nsystem\n)R0N") + b".")
    code, out, _ = run("filter", path, "-o", "out.pth")
    assert (code, "names that act are left out: os.system" in out) == (0, True)
    assert kinds("out.pth") == {}
