"""What a terminal gets to see of a hostile file: names escaped, tables aligned, JSON exact, and no more than fits."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracles import Run, thinned
from pickled import archive, mapping, tensor, text
from sparse import write_sparse

from ckptool.cli import render
from ckptool.cli.terminal import tables

Saved = Callable[..., Path]

NASTY = {
    "a colour": "\x1b[31mred",
    "a title": "\x1b]0;pwned\x07",
    "a link": "\x1b]8;;http://example.org\x1b\\x\x1b]8;;\x1b\\",
    "clearing": "\x1b[2J\x1b[H",
    "an 8-bit sequence": "\x9b31mred",
    "a carriage return": "harmless\rdiffer",
    "a newline": "one\ntwo",
    "backspaces": "abc\x08\x08\x08xyz",
    "a tab": "a\tb",
    "a null": "a\x00b",
    "an override": "abc\u202egpj.exe",
    "an isolate": "a\u2066b\u2069",
    "a right-to-left mark": "a\u200fb",
    "a line separator": "a\u2028b",
    "of no width": "a\u200bb\ufeff",
    "markup": "[bold red]x[/bold red][link=http://example.org]y[/]",
    "emoji codes": ":smile: {0} %s",
    "half a surrogate": "a\ud800b",
    "bytes that are no text": "a\udcffb",
    "wide": "重み.バイアス",
    "combining": "poids_e\u0301te\u0301",
    "an emoji": "🎉.weight",
    "spaces": "a b  c",
    "empty": "",
    "a tag": "a\U000e0041b",
}


ALONE = ["a null", "half a surrogate", "bytes that are no text", "empty", "markup"]
"""Those that a format may refuse, which must not keep the rest from being shown, and rich's own marks."""
KEYS = {**{name: [NASTY[name]] for name in ALONE}, "the rest": [NASTY[name] for name in NASTY if name not in ALONE]}


def plain(shown: str) -> bool:
    """Whether a terminal can be given this: lines of printable characters."""
    return all(char.isprintable() or char == "\n" for char in shown)


def ways(path: object, good: object) -> Iterator[list[object]]:
    out = ["--force", "--no-fsync"]
    yield ["inspect", path]
    yield ["inspect", path, "--flat"]
    yield ["inspect", path, "--keys"]
    yield ["inspect", path, "--depth", 1, "--sort", "numel"]
    yield ["inspect", path, "--check"]
    yield ["inspect", path, "--stats", "--hash"]
    yield ["inspect", path, "--root", "no\x1b[31m"]
    yield ["diff", path, good, "--values"]
    yield ["diff", good, path, "--quick", "--devices"]
    yield ["filter", path, "-o", "out.pth", "--all", *out]
    yield ["filter", "--match", path, good, "-o", "out.pth", *out]
    yield ["filter", "--match", good, path, "-o", "out.pth", "--all", "--require", "*", *out]
    yield ["remap", path, "--sub", "s/^/x./", "-o", "out.pth", *out]
    yield ["remap", path, "--drop", "*", "--dry-run"]
    yield ["remap", path, "--drop", "x\x1b[31m", "--dry-run"]
    yield ["convert", path, "--to", "safetensors", "-o", "out.safetensors", *out]
    yield ["convert", path, "--to", "npz", "-o", "out.npz", *out]
    yield ["load-partial", path, "--into", good, "-o", "out.pth", "--all", *out]
    yield ["load-partial", good, "--into", path, "-o", "out.pth", "--init", "*=zeros", "--freeze", "loaded", *out]


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_no_command_shows_what_a_terminal_would_obey(keys: list[str], saved: Saved, run: Run) -> None:
    state = {**{key: torch.ones(2) for key in keys}, "w": torch.ones(3)}
    path = saved({"state_dict": state, "note": keys, **{f"about {key}": {key: key} for key in keys}}, "given.pth")
    good = saved({"w": torch.ones(2), **{key: torch.ones(5) for key in keys}}, "good.pth")
    for args in ways(path, good):
        code, out, err = run(*args)
        assert plain(out), args
        assert plain(err), args
        assert code in (0, 1) or err.count("\n") == 1, args
        assert "--keys" not in args or out.splitlines()[: len(keys)] == [render.safe(key) for key in keys], args


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_json_holds_the_very_name(keys: list[str], saved: Saved, run: Run) -> None:
    path = saved({**{key: torch.ones(2) for key in keys}, "w": torch.ones(3)}, "given.pth")
    good = saved({"w": torch.ones(2)}, "good.pth")
    for args in ways(path, good):
        if "--keys" in args:
            continue
        code, out, err = run(*args, "--json")
        document = json.loads(out)
        assert out.isascii(), args
        assert plain(err), args
        assert code != 0 or "error" not in document, args
    (report,) = json.loads(run("inspect", path, "--json")[1])["result"]
    assert [row["key"] for row in report["tensors"]] == [*keys, "w"]
    assert json.loads(run("diff", path, good, "--json")[1])["result"]["only_in_a"] == keys


@thinned(4)
@pytest.mark.parametrize("name", [name for name in NASTY if not {"\0", "\ud800"} & set(NASTY[name]) and NASTY[name]])
def test_a_file_whose_own_name_is_hostile_is_shown_escaped(name: str, step: int, saved: Saved, run: Run) -> None:
    nasty = NASTY[name].replace("/", "_")
    good = saved({"w": torch.ones(3)}, "good.pth")
    path = saved({"w": torch.ones(2)}).rename(f"{nasty}.pth")  # torch itself refuses some of these
    Path(f"empty {nasty}").touch()
    more = [["inspect", path.name, f"empty {nasty}"], ["inspect", f"empty {nasty}"], ["inspect", "--" + nasty], [nasty],
            ["convert", path.name, good, "--to", "safetensors", "--force"],
            ["filter", good, "-o", f"{nasty}.made.pth", "--force"]]  # fmt: skip
    for args in [*ways(path.name, good), *more][list(NASTY).index(name) % step :: step]:
        _, out, err = run(*args)
        assert plain(out), args
        assert plain(err), args


def test_metadata_and_dtypes_of_a_header_are_shown_escaped(run: Run) -> None:
    nasty = "".join(value for value in NASTY.values() if not any("\ud800" <= char < "\ue000" for char in value))
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for header in ({"__metadata__": {nasty: nasty}, nasty: entry}, {"w": {**entry, "dtype": nasty}},
                   {"w": {**entry, "shape": [nasty]}}, {nasty: nasty}):  # fmt: skip
        encoded = json.dumps(header).encode()
        Path("given.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(4))
        for args in ways("given.safetensors", "given.safetensors"):
            _, out, err = run(*args)
            assert plain(out), args
            assert plain(err), args
    Path("x.index.json").write_text(json.dumps({"metadata": {nasty: nasty}, "weight_map": {nasty: nasty}}))
    code, out, err = run("inspect", "x.index.json")
    assert (code, plain(out), plain(err)) == (2, True, True)


def test_classes_devices_and_storages_of_a_pickle_are_shown_escaped(run: Run) -> None:
    nasty = "\x1b[31m\u202e\r"
    named = text(f"m{nasty}") + text(f"C{nasty}") + b"\x93)R"
    for value in (named, tensor(storage=named), tensor(shape=text(nasty)), b"(" + text(nasty) + b"tQ"):
        path = archive(mapping(text("w"), tensor(), text("b"), value))
        for args in ways(path, path):
            _, out, err = run(*args)
            assert plain(out), args
            assert plain(err), args


@pytest.mark.parametrize("option", ["--flat", "--stats", "--hash"])
def test_tables_are_aligned_whatever_the_names(option: str, saved: Saved, run: Run) -> None:
    path = saved({key: torch.ones(7, 1) for key in NASTY.values()})
    lines = run("inspect", path, option)[1].splitlines()
    rows = [line for line in lines if "  7x1  " in line]
    assert len(rows) == len(NASTY)
    assert len({tables.width(row[: row.index("  7x1  ")]) for row in rows}) == 1


LONG_KEYS = ["1." * 199 + "y" * 60_000, "\x1b" * 60_000, "重" * 60_000, "9" * 1_000_000, "1." * 500_000]


@thinned(3)
def test_a_long_key_costs_its_own_lines_and_no_others(step: int, saved: Saved, run: Run) -> None:
    for key in LONG_KEYS[::step]:
        content = {key: torch.ones(2), **{f"layer.{i}.w": torch.ones(3) for i in range(100)}}
        path, good = saved(content, "given.pth"), saved({"w": torch.ones(2), key: torch.ones(5)}, "good.pth")
        for args in ways(path, good):
            begin = time.process_time()
            _, out, err = run(*args)
            assert time.process_time() - begin < 5, (key[:3], args)
            assert len(out) + len(err) < 2_000_000, (key[:3], args)
            assert plain(out + err)


def test_nesting_of_ten_thousand_is_one_line_in_every_format(run: Run) -> None:
    deep = '{"a":' * 10_000 + "1" + "}" * 10_000
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]'
    for header in (deep, f'{{"__metadata__":{deep}}}', f'{{"w":{deep}}}', f'{{"w":{entry},"more":{deep}}}}}'):
        Path("given.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
        code, out, err = run("inspect", "given.safetensors")
        assert (code, out, err.count("\n")) == (2, "", 1)
    Path("x.index.json").write_text(f'{{"weight_map":{deep}}}')
    code, out, err = run("inspect", "x.index.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    nested: object = 1
    for _ in range(400):
        nested = [nested]
    assert pickle.dumps(nested)
    code, out, err = run("inspect", archive(mapping(text("w"), tensor(), text("b"), b"]" * 10_000 + b"a" * 9_999)))
    assert (code, "MAX_DEPTH" in err) == (2, True)


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_two_thousand_inputs_are_as_good_as_one(count: int, saved: Saved, run: Run) -> None:
    path = saved({"w": torch.ones(2)})
    names = []
    for number in range(count):
        names.append(f"{number}.pth")
        os.link(path, names[-1])
    code, out, _ = run("inspect", "--keys", *names)
    assert (code, out) == (0, "w\n" * count)
    code, out, _ = run("filter", *names, "-o", "out.pth", "--dry-run")
    assert code in (0, 2)
    code, out, err = run("inspect", *names, "absent.pth")
    assert (code, err.count("\n"), out.count("torch-zip")) == (2, 1, count)


def test_a_terabyte_that_is_not_there_is_looked_at_and_never_read(run: Run) -> None:
    for suffix in (".safetensors", ".pth"):
        path = write_sparse(Path(f"given{suffix}").absolute(), {f"layers.{i}.w": 1 << 34 for i in range(16)})
        assert path.stat().st_size > 1 << 40
        begin = time.process_time()
        code, out, _ = run("inspect", path)
        assert (code, "1.1 TB float32" in out) == (0, True)
        assert run("diff", path, path)[0] == 0
        assert run("remap", path, "--add-prefix", "m.", "-o", "out.pth", "--dry-run")[0] == 0
        code, out, err = run("convert", path, "-o", "out.safetensors", "--dry-run")
        assert (code, "1.1 TB" in out) == (0, True), err
        assert time.process_time() - begin < 4
        path.unlink()


def test_hundreds_of_shards_are_one_checkpoint(run: Run) -> None:
    Path("given").mkdir()
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    weight_map = {}
    for number in range(300):
        name = f"model-{number:05}-of-00300.safetensors"
        header = f'{{"layers.{number}.w":{entry}}}'.encode()
        (Path("given") / name).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        weight_map[f"layers.{number}.w"] = name
    Path("given/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "300 tensors" in run("inspect", "given")[1]
    assert run("diff", "given", "given", "--values")[0] == 0
    assert run("filter", "given", "-o", "out.safetensors", "--no-fsync")[0] == 0
