"""Limits: each refuses a file by its name and its figure, and says what raises it; raised, the file is read right."""

from __future__ import annotations

import json
import random
import re
import struct
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, Run
from pickled import THING, beside, legacy, mapping, model, number, tarred, tensor, text, zipped

import ckptool
from ckptool import limits
from ckptool.errors import LimitError, UsageError

REPOSITORY = Path(__file__).parents[1]

NESTED = b"]" * 50 + b"a" * 49
SHARED = b"]q\x01(" + b"N" * 30 + b"e0(" + b"h\x01" * 30 + b"l"


def module(*below: bytes) -> bytes:
    slots = text("_parameters") + mapping(text("w"), tensor()) + text("_buffers") + b"}"
    return b"cm\nM\n)\x81}(" + slots + text("_modules") + mapping(*below) + b"ub"


def indexed() -> str:
    torch.save({"a" * 60: torch.ones(1)}, "x.bin")
    Path("x.index.json").write_text(json.dumps({"weight_map": {"a" * 60: "x.bin"}}))
    return "x.index.json"


def header() -> str:
    made = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    Path("given.safetensors").write_bytes(struct.pack("<Q", len(made)) + made + bytes(4))
    return "given.safetensors"


def with_byteorder(order: str) -> str:
    zipped(beside(b"N"))
    with zipfile.ZipFile("given.pth", "a") as made:
        made.writestr("archive/byteorder", order)
    return "given.pth"


def deflated(pickled: bytes) -> str:
    with zipfile.ZipFile("given.pth", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/data/0", struct.pack("<f", 1))
    return "given.pth"


def nested_keys() -> str:
    return model(b"](" + b"}" + text("abc") + b"](" + tensor() + b"ese")


def expanded() -> str:
    torch.save({"w": torch.tensor([0.5]).expand(1000)}, "given.pth")
    return "given.pth"


def a_view_without_end() -> str:
    return zipped(beside(b"N").replace(b"K\x01\x85K\x01", b"J\0\0\0\x7f\x85K\x00"))


def deflated_in_a_zip() -> str:
    with zipfile.ZipFile("all.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.write("given.pth", "archive/given.pth")
    return "all.zip"


def a_list_of_rows() -> list[str]:
    torch.save({"w": torch.arange(8.0).view(4, 2)}, "old.pth")
    torch.save({"w": torch.zeros(2, 2)}, "new.pth")
    Path("rows.txt").write_text("3\n1\n")
    return ["load-partial", "old.pth", "--into", "new.pth", "--adapt", "w=rows:select=rows.txt", "--dry-run", "--json"]


def a_file_of_rules() -> list[str]:
    torch.save({"w": torch.zeros(2)}, "old.pth")
    Path("rules.json").write_text('[{"rename": "w", "to": "v"}]')
    return ["remap", "old.pth", "--rules", "rules.json", "--dry-run", "--json"]


def looked_at(path: str) -> list[str]:
    return ["inspect", path, "--json"]


def twice() -> list[str]:
    return [model(mapping(text("a" * 60 + "c"), tensor()))] * 2


NOISE = random.Random(1).randbytes(150_000).hex()

Call = Callable[[], list[str]]

BOMBS: dict[str, Call] = {
    "MAX_MEMO": lambda: looked_at(zipped(beside(b"Nr\xff\xff\xff\x0f"))),
    "MAX_MEMO in letters": lambda: looked_at(zipped(beside(b"Np99999999999\n"))),
    "MAX_DIGITS": lambda: looked_at(zipped(beside(number(1 << 20_000)))),
    "MAX_DIGITS in letters": lambda: looked_at(zipped(beside(b"I" + b"9" * 5000 + b"\n"))),
    "MAX_TUPLES": lambda: looked_at(zipped(beside(b")" + b"\x85" * 1000))),
    "MAX_TUPLE_ITEMS": lambda: looked_at(zipped(beside(b")" + b"2\x86" * 64))),
    "MAX_TUPLE_ITEMS of a frozenset": lambda: looked_at(
        zipped(beside(b"(\x91q\x010" + b"(h\x01h\x01\x86\x91q\x010" * 40 + b"h\x01"))
    ),
    "MAX_KEY": lambda: looked_at(model(mapping(text("a" * 70_000), tensor()))),
    "MAX_LEVELS": lambda: looked_at(model(mapping(text("a." * 250), tensor()))),
    "MAX_MATCH": lambda: ["diff", *twice(), "--json", "--ignore", "re:(a+)+$b"],
    "MAX_MATCH of a rule": lambda: ["remap", twice()[0], "--json", "--dry-run", "--sub", "s/(a|a)*$b/x/"],
    "MAX_RATIO": lambda: looked_at(deflated(b"\x80\x02" + b"N0" * 4_000_000 + b"}.")),
    "MAX_BYTEORDER": lambda: looked_at(with_byteorder("little" * 20)),
    "MAX_EXPANDED": lambda: ["inspect", a_view_without_end(), "--hash"],
}  # fmt: skip
"""Files beyond the limits as they are."""

REACHED: dict[str, tuple[int, Call]] = {
    "MAX_PICKLE": (50, lambda: looked_at(zipped(beside(b"N")))),
    "MAX_PICKLE of a stream": (
        1 << 16, lambda: looked_at(legacy(b"X\x00\x00\x02\x00" + b"x" * (1 << 17), "tree"))),
    "MAX_GLOBALS": (2, lambda: looked_at(zipped(beside(THING)))),
    "MAX_NAME": (10, lambda: looked_at(zipped(beside(THING)))),
    "MAX_WIDE": (1, lambda: looked_at(zipped(beside(b"](" + number(1 << 70) * 2 + b"e")))),
    "MAX_WIDE in letters": (1, lambda: looked_at(zipped(beside(b"](" + b"L1234567890123456789L\n" * 2 + b"e")))),
    "MAX_TUPLE_KEYS": (
        1, lambda: looked_at(zipped(beside(b"}(J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86NK\x01\x85Nu")))),
    "MAX_MEMO": (20, lambda: looked_at(zipped(beside(b"Nr\x00\x10\x00\x00")))),
    "MAX_MEMO in letters": (20, lambda: looked_at(zipped(beside(b"Np4000\n")))),
    "MAX_TUPLE_ITEMS of a tuple": (20, lambda: looked_at(zipped(beside(b")" + b"2\x86" * 8)))),
    "MAX_TUPLE_ITEMS of keys": (100, lambda: looked_at(zipped(beside(b"}(" + b"K\x01\x85N" * 101 + b"u20")))),
    "MAX_DEPTH": (30, lambda: looked_at(zipped(beside(NESTED)))),
    "MAX_DEPTH of what is written": (
        30, lambda: ["filter", zipped(beside(NESTED)), "-o", "out.pth", "--dry-run", "--json"]),
    "MAX_SHARED": (2, lambda: looked_at(zipped(beside(SHARED)))),
    "MAX_STEPS": (10, lambda: looked_at(zipped(beside(NESTED)))),
    "MAX_KEY": (9, lambda: looked_at(model(mapping(text("a" * 10), tensor())))),
    "MAX_KEY of names": (3, lambda: looked_at(nested_keys())),
    "MAX_KEY of modules": (2, lambda: looked_at(model(module(text("abc"), module())))),
    "MAX_KEYS": (4, lambda: looked_at(nested_keys())),
    "MAX_KEYS of modules": (1, lambda: looked_at(model(module(text("abc"), module())))),
    "MAX_LEVELS": (1, lambda: looked_at(model(mapping(text("a.b.c"), tensor())))),
    "MAX_LEVELS of modules": (1, lambda: looked_at(model(module(text("a.b"), module())))),
    "MAX_MODULES": (1, lambda: looked_at(model(module(text("a"), module())))),
    "MAX_MODULE_DEPTH": (
        1, lambda: looked_at(model(module(text("a"), module(text("b"), module(text("c"), module())))))),
    "MAX_SHARED_PARTS": (
        1, lambda: looked_at(model(module(text("a"), module() + b"q\x09", text("b"), b"h\x09")))),
    "MAX_DIRECTORY": (100, lambda: looked_at(zipped(beside(b"N")))),
    "MAX_RECORDS": (2, lambda: looked_at(zipped(beside(b"N")))),
    "MAX_RATIO": (10, lambda: looked_at(deflated(beside(text(NOISE + "0" * 3_500_000))))),
    "MAX_TAR_ITEMS": (0, lambda: looked_at(tarred(b"N", "sys_info"))),
    "MAX_GGUF": (100, lambda: looked_at(str(FIXTURES / "dense.gguf"))),
    "MAX_INDEX": (10, lambda: looked_at(indexed())),
    "MAX_INDEX of rules": (10, a_file_of_rules),
    "MAX_LIST": (3, a_list_of_rows),
    "MAX_DOWNLOAD": (100, lambda: looked_at(f"zip://archive/{zipped(beside(b'N'))}::{deflated_in_a_zip()}")),
    "MAX_EXPANDED": (100, lambda: [*looked_at(expanded()), "--hash"]),
    "MAX_EXPANDED compared": (100, lambda: ["diff", expanded(), "given.pth", "--values", "--json"]),
}  # fmt: skip
"""A lower figure, and a call for a file that is beyond it and read right by default."""


def refusal(done: tuple[int, str, str], limit: str, figure: int) -> str:
    """Checks that a call was refused in one line that says all of a limit; returns what it offers to raise it."""
    code, out, err = done
    assert (code, err.count("\n")) == (2, 1), err
    if out:
        error = json.loads(out)["error"]
        assert error["kind"] == "limit"
        assert error["message"] in err
    assert f": over {limit}, {figure:,}" in err
    offer = re.search(rf" \(--limit ({limit}=\d+) raises it\)$", err)
    assert bool(offer) == limits.ALL[limit].raisable
    assert offer or "--limit" not in err
    return offer[1] if offer else ""


@pytest.mark.parametrize(
    "options", [["--rules", "given"], ["--invert", "given"], ["--tp-rules", "given"], ["--rules", "/dev/zero"]]
)
def test_no_file_of_rules_is_read_beyond_the_limit(options: list[str], run: Run) -> None:
    torch.save({"w": torch.zeros(2)}, "old.pth")
    Path("given").write_text("# a remark of twenty letters")
    command = "filter" if options[0] == "--tp-rules" else "remap"
    done = run(command, "old.pth", *options, "--dry-run", "--limit", "MAX_INDEX=10")
    assert int(refusal(done, "MAX_INDEX", 10).partition("=")[2]) >= (20 if options[1] == "/dev/zero" else 28)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_the_limits_name_and_figure(name: str, run: Run) -> None:
    limit = name.split()[0]
    refusal(run(*BOMBS[name]()), limit, limits.ALL[limit].figure)


def test_a_header_that_safetensors_itself_does_not_read_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.MAX_HEADER, "figure", 10)
    assert refusal(run(*looked_at(header())), "MAX_HEADER", 10) == ""
    code, _, err = run("convert", FIXTURES / "resnet_old.pth", "-o", "out.safetensors")
    assert (code, "over MAX_HEADER, 10" in err) == (2, True)


@pytest.mark.parametrize("name", REACHED)
def test_what_a_limit_refuses_is_read_right_when_it_is_raised_as_the_error_says(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = name.split()[0]
    low, call = REACHED[name]
    args = call()
    wanted = run(*args)
    assert wanted[0] == 0
    monkeypatch.setattr(limits.ALL[limit], "figure", low)
    raised: list[str] = []
    figure = low
    for _ in range(12):
        done = run(*args, *raised)
        if done[0] == 0:
            break
        offer = refusal(done, limit, figure)
        raised, figure = ["--limit", offer], int(offer.partition("=")[2])
        assert figure > low
    assert raised
    assert done == wanted


def test_each_limit_is_tried_and_each_that_can_be_is_raised() -> None:
    raised = {name.split()[0] for name in REACHED}
    raisable = {name for name, limit in limits.ALL.items() if limit.raisable}
    times = {"MAX_MATCH", "MAX_WAIT"}  # they are no sizes: test_regexes.py, test_faults.py
    assert raised | times | {"MAX_EXPANSION"} == raisable  # see the next test
    tried = {name.split()[0] for name in BOMBS} | {"MAX_HEADER"}
    assert limits.ALL.keys() - raisable <= tried


def test_either_of_two_limits_lets_an_expanded_view_pass(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*looked_at(expanded()), "--hash"]
    wanted = run(*args)
    monkeypatch.setattr(limits.MAX_EXPANDED, "figure", 100)
    assert f"over MAX_EXPANSION, {limits.MAX_EXPANSION.figure} times it" in run(*args)[2]
    assert run(*args, "--limit", "MAX_EXPANSION=1000") == wanted
    assert run(*args, "--limit", "MAX_EXPANSION=999")[0] == 2


def test_a_cast_on_a_thread_keeps_to_the_limits_of_the_command(run: Run) -> None:
    torch.save({"w": torch.tensor([0.5]).expand(1 << 22)}, "given.pth")
    args = ["convert", "given.pth", "--dtype", "bf16", "-o", "out.safetensors"]
    code, _, err = run(*args, "--limit", "MAX_EXPANDED=1MB")
    assert (code, "over MAX_EXPANDED, 1,000,000 " in err) == (2, True)
    assert run(*args)[0] == 0


OLD, NEW = str(FIXTURES / "resnet_old.pth"), str(FIXTURES / "resnet_new.pth")


@pytest.mark.parametrize(
    "args",
    [["inspect", OLD], ["diff", OLD, OLD], ["filter", "--match", NEW, OLD, "--dry-run"],
     ["remap", OLD, "--add-prefix", "a.", "-o", "out.pth"], ["convert", OLD, "-o", "out.safetensors"],
     ["load-partial", OLD, "--into", NEW, "-o", "out.pth"]],
    ids=lambda args: args[0],
)  # fmt: skip
def test_every_command_takes_limits_and_the_next_one_has_none(args: list[str], run: Run) -> None:
    refusal(run(*args, "--limit", "MAX_RECORDS=10", "--limit", "MAX_KEY=5KB"), "MAX_RECORDS", 10)
    assert run(*args, "--limit", "MAX_RECORDS=10", "--limit", "MAX_RECORDS=500")[0] == 0
    assert not limits._given.get()


@pytest.mark.parametrize("given", ["MAX_PICKLE", "MAX_PICKLE=", "MAX_PICKLE=x", "MAX_PICKLE=-1", "MAX_PICKLE=0",
                                   "MAX_PICKLE=1e9", "=5", "", "max_pickle=5", "MAX_PICKLE=" + "9" * 5000,
                                   "MAX_PICKLE=" + "9" * 30, "MAX_PICKLE=0.1"])  # fmt: skip
def test_a_limit_that_is_none_is_one_line(given: str, run: Run) -> None:
    code, out, err = run("inspect", OLD, "--json", "--limit", given)
    assert (code, json.loads(out)["error"]["kind"], err.count("\n")) == (2, "usage", 1)


@pytest.mark.parametrize("name", ["MAX_NONE", "MAX_TUPLES", "MAX_NUMEL"])
def test_a_name_that_nothing_raises_is_answered_with_those_that_can_be(name: str, run: Run) -> None:
    code, _, err = run("inspect", OLD, "--limit", f"{name}=5")
    assert (code, err.count("\n")) == (2, 1)
    for limit in limits.ALL.values():
        assert (limit.name in err.split("can be set are ")[1].replace(",", " ").split()) == limit.raisable


def test_a_figure_is_a_number_or_a_size(run: Run) -> None:
    for text_, figure in (("1KiB", "1,024"), ("1.5kb", "1,500"), ("2000", "2,000")):
        assert f"over MAX_PICKLE, {figure} " in run("inspect", OLD, "--limit", f"MAX_PICKLE={text_}")[2]


def test_python_raises_limits_for_a_while_and_for_itself_alone() -> None:
    with ckptool.limited(MAX_RECORDS=10, MAX_KEY=20):
        with pytest.raises(LimitError, match=r"over MAX_RECORDS, 10 \(--limit MAX_RECORDS=108 raises it\)"):
            ckptool.open(OLD)
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(limits.MAX_RECORDS.now()))
        thread.start()
        thread.join()
        assert seen == [limits.MAX_RECORDS.figure]
        with ckptool.limited(MAX_RECORDS=200), pytest.raises(LimitError, match="over MAX_KEY, 20"):
            ckptool.open(OLD).state_dict()
        assert (limits.MAX_RECORDS.now(), limits.MAX_KEY.now()) == (10, 20)
    assert ckptool.open(OLD).state_dict()


@pytest.mark.parametrize("figure", [0, -1, True, 1.5, "5", None, 1 << 63])
def test_python_is_told_of_a_figure_that_is_none(figure: object) -> None:
    with pytest.raises(UsageError, match="the limit MAX_KEY is a number from 1 to"), ckptool.limited(MAX_KEY=figure):  # type: ignore[arg-type]
        pass


def test_no_memo_index_that_is_no_number_passes() -> None:
    with pytest.raises(LimitError, match=r"memoises at an impossible index \(byte \d+, MAX_MEMO\)$"):
        ckptool.open(zipped(beside(b"Npx\n")))


def test_all_limits_stand_in_one_place_and_in_security_md() -> None:
    """Elsewhere there are those of what is written, of files open at once, and of what is tried."""
    bare = {name: value for name, value in vars(limits).items() if name.startswith("MAX_") and isinstance(value, int)}
    assert {limit: vars(limits)[limit].name for limit in limits.ALL} == {limit: limit for limit in limits.ALL}
    said = (REPOSITORY / "SECURITY.md").read_text()
    rows = re.findall(r"^\| `(MAX_\w+)` \| ([\d,]+) \| (yes|no) \| \S", said, re.MULTILINE)
    wanted = [(limit.name, f"{limit.figure:,}", "yes" if limit.raisable else "no") for limit in limits.ALL.values()]
    assert rows == [*wanted, *((name, f"{value:,}", "no") for name, value in bare.items())]
    others = set()
    for path in (REPOSITORY / "ckptool").rglob("*.py"):
        if path.name not in ("limits.py", "npz.py"):
            others |= set(re.findall(r"^(MAX_\w+) = ", path.read_text(), re.MULTILINE))
    assert others == {"MAX_OPEN", "MAX_WAYS"}
    source = (REPOSITORY / "ckptool" / "limits.py").read_text()
    reasons = re.findall(r'^(MAX_\w+) = .*\n"""\S.*\.?"""$', source, re.MULTILINE)
    assert reasons == [*limits.ALL, *bare]
