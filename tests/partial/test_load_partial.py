"""`ckptool load-partial`, judged by torch.load, torch's load_state_dict, safetensors and a real optimizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import CANARY, FIXTURES, Run, bits, content, seed_torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckptool

Saved = Callable[..., Path]
Refused = Callable[..., str]


CODE = """
print("a word from the user's code")
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes=6, scale=1.0, **more):
        assert not more
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))
        self[3].weight.data.fill_(scale)

    class Head(nn.Linear):
        def __init__(self):
            super().__init__(16, 6)

def build(sizes=(6,), name="x", on=True):
    assert isinstance(sizes, list) and isinstance(name, str) and on is False
    return Net(sizes[0])

def meta():
    with torch.device("meta"):
        return Net()

def lazy():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(6))

def sparse():
    model = Net()
    model[3].weight = nn.Parameter(torch.eye(16)[:6].to_sparse())
    return model

def failing():
    raise ValueError("two\\nlines")

def leaving():
    raise SystemExit(3)

def path():
    return "source.pth"

value = 5
"""


def net(classes: int = 6, seed: int = 0) -> nn.Sequential:
    seed_torch(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))
    model(torch.randn(8, 3, 4, 4))
    return model


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """source.pth of 10 classes and target.pth of 6: what is in them."""
    source, target = net(10, seed=1).state_dict(), net(6, seed=2).state_dict()
    torch.save(source, "source.pth")
    torch.save(target, "target.pth")
    return source, target


@pytest.fixture
def code(tmp_path: Path) -> Iterator[str]:
    """A module of the user's in the current directory."""
    name = f"users_{tmp_path.name}"
    Path(f"{name}.py").write_text(CODE)
    Path("syntax_error_.py").write_text("def (")
    Path("leaves_.py").write_text("import sys; sys.exit('usage: ...')")
    path = list(sys.path)
    yield name
    sys.path[:] = path
    for module in (name, "syntax_error_", "leaves_"):
        sys.modules.pop(module, None)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(bits(one[key]) == bits(other[key]) for key in one)


def document(run: Run, *args: object) -> dict[str, Any]:
    code, out, _ = run("load-partial", *args, "--json")
    found: dict[str, Any] = json.loads(out)
    assert (found["schema"], found["command"]) == (1, "load-partial")
    return {**found, "code": code}


BODY = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked")


# --- --into ------------------------------------------------------------------------------------------------------


def test_what_fits_is_loaded_and_the_rest_stays(run: Run, pair: Any) -> None:
    source, target = pair
    code, out, _ = run("load-partial", "source.pth", "--into", "target.pth", "-o", "out.pth")
    made = torch.load("out.pth", weights_only=True)
    assert code == 0
    assert same(made, {**target, **{key: source[key] for key in BODY}})
    assert made._metadata == target._metadata
    assert "mismatched  3.weight  target 6x16, source 10x16" in out


def test_the_output_loads_strictly_and_answers_as_load_state_dict_would_make_it(run: Run, pair: Any) -> None:
    source, _ = pair
    run("load-partial", "source.pth", "--into", "target.pth", "-o", "out.pth", "--adapt", "3.*=rows")
    model, judge = net(6), net(6)
    model.load_state_dict(torch.load("out.pth"))
    judge.load_state_dict({key: value[:6] if key.startswith("3.") else value for key, value in source.items()})
    assert same(model.state_dict(), judge.state_dict())


@pytest.mark.parametrize("kind", ["state_dict", "nested", "safetensors", "sharded", "legacy"])
def test_the_target_may_be_any_kind_of_checkpoint(run: Run, pair: Any, kind: str) -> None:
    source, target = pair
    into, output = Path("into.pth"), Path("out.pth")
    if kind == "state_dict":
        torch.save(target, into)
    elif kind == "nested":
        torch.save({"epoch": 7, "model_state_dict": target, "args": {"lr": 0.1}}, into)
    elif kind == "legacy":
        torch.save(target, into, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        into, output = Path("into.safetensors"), Path("out.safetensors")
        save_file(target, into, metadata={"format": "pt"})
    else:
        into, output = Path("shards"), Path("out.safetensors")
        ckptool.convert("target.pth", into, to="sharded", max_shard_size=500)
        assert len(list(into.glob("*.safetensors"))) > 1
    code, _, _ = run("load-partial", "source.pth", "--into", into, "-o", output)
    made = load_file(output) if output.suffix == ".safetensors" else torch.load(output)
    if kind == "nested":
        assert (made["epoch"], made["args"]) == (7, {"lr": 0.1})
        made = made["model_state_dict"]
    assert code == 0
    expected = {**target, **{key: source[key] for key in BODY}}
    assert same(dict(sorted(made.items())), dict(sorted(expected.items())))


def test_a_whole_model_pickle_is_a_target_and_none_of_its_code_runs(run: Run) -> None:
    file = FIXTURES / "resnet_module.pth"
    found = ckptool.open(file)
    source = {key: torch.full(tensor.shape, 2, dtype=getattr(torch, tensor.dtype))
              for key, tensor in found.state_dict().items()}  # fmt: skip
    torch.save(source, "source.pth")
    code, out, _ = run("load-partial", "source.pth", "--into", file, "-o", "out.pth", "--strict")
    assert code == 0
    assert same(torch.load("out.pth", weights_only=True), source)
    assert "whole-model pickle" in out
    assert not Path(CANARY).exists()


def test_the_source_may_be_nested_and_wrapped(run: Run, pair: Any) -> None:
    source, target = pair
    wrapped = {f"module._orig_mod.{key}": value for key, value in source.items()}
    torch.save({"model": wrapped, "epoch": 3}, "nested.pth")
    _, out, _ = run("load-partial", "nested.pth", "--into", "target.pth", "-o", "out.pth")
    assert same(torch.load("out.pth"), {**target, **{key: source[key] for key in BODY}})
    assert "looked through 'module._orig_mod.'" in out
    assert "the weights of nested.pth are at model" in out


def test_an_unknown_suffix_is_refused(refused: Refused, pair: Any) -> None:
    assert "no format has this suffix" in refused("load-partial", "source.pth", "--into", "target.pth", "-o", "out")


def test_map_location_rewrites_the_tags(run: Run, pair: Any) -> None:
    run("load-partial", "source.pth", "--into", "target.pth", "-o", "gpu.pth", "--map-location", "cuda:1",
        "--init", "3.*=zeros", "--adapt", "3.weight=rows")  # fmt: skip
    assert {tensor.location for tensor in ckptool.open("gpu.pth").state_dict().values()} == {"cuda:1"}
    run("load-partial", "gpu.pth", "--into", "target.pth", "-o", "cpu.pth", "--strict")
    assert torch.load("cpu.pth")["0.weight"].device.type == "cpu"


# --- --model -----------------------------------------------------------------------------------------------------


def test_a_model_is_built_by_the_users_code_with_arguments_and_that_is_said(run: Run, pair: Any, code: str) -> None:
    source, _ = pair
    found = run("load-partial", "source.pth", "--model", f"{code}:Net", "--arg", "classes=7", "--arg", "scale=2.5",
                "-o", "out.pth")  # fmt: skip
    made = torch.load("out.pth", weights_only=True)
    assert found[0] == 0, found
    assert made["3.weight"].shape == (7, 16)
    assert set(made["3.weight"].flatten().tolist()) == {2.5}
    assert all(torch.equal(made[key], source[key]) for key in BODY)
    assert not any(value.requires_grad for value in made.values())
    net(7).load_state_dict(made)
    assert f"imported and ran {code}:Net, your own code" in found[1]
    assert "a word from" not in found[1]
    assert "a word from" in found[2]


def test_a_factory_takes_literals_and_an_attribute_may_be_nested(run: Run, pair: Any, code: str) -> None:
    args = ("--arg", "sizes=[6, 2]", "--arg", 'name="x = y"', "--arg", "on=false")
    assert run("load-partial", "source.pth", "--model", f"{code}:build", *args, "-o", "out.pth")[0] == 0
    assert torch.load("out.pth")["3.weight"].shape == (6, 16)
    torch.save({"weight": torch.ones(6, 16)}, "head.pth")
    assert run("load-partial", "head.pth", "--model", f"{code}:Net.Head", "-o", "head.safetensors")[0] == 0
    assert load_file("head.safetensors")["weight"].sum() == 96


def test_json_stays_one_document_whatever_the_users_code_prints(run: Run, pair: Any, code: str) -> None:
    found = document(run, "source.pth", "--model", f"{code}:Net", "--dry-run")
    assert found["code"] == 0
    assert any("your own code" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("{}:failing", r"ValueError: two\nlines"), ("{}:leaving", "SystemExit: 3"), ("{}:absent", "AttributeError"),
        ("{}:Net.absent", "AttributeError"), ("{}:value", "TypeError"), ("{}:path", "not a torch.nn.Module but a str"),
        ("no_such_module_:Net", "ModuleNotFoundError"), ("syntax_error_:f", "SyntaxError"),
        ("leaves_:f", "SystemExit: usage"), ("{}", "PKG.MOD:NAME"), (":x", "PKG.MOD:NAME"),
    ],
)  # fmt: skip
def test_broken_user_code_is_one_line(run: Run, pair: Any, code: str, name: str, why: str) -> None:
    found = run("load-partial", "source.pth", "--model", name.format(code), "-o", "out.pth")
    assert (found[0], found[1]) == (2, "")
    line = found[2].splitlines()[-1]
    assert line.startswith("ckptool: error: ")
    assert why in line
    assert not Path("out.pth").exists()


@pytest.mark.parametrize("argument", ["classes", "=6", "a b=6"])
def test_an_argument_without_name_or_value_is_refused(refused: Refused, pair: Any, code: str, argument: str) -> None:
    refused("load-partial", "source.pth", "--model", f"{code}:Net", "--arg", argument, "-o", "out.pth")


def test_a_model_on_meta_is_refused_unless_all_is_filled(run: Run, pair: Any, code: str) -> None:
    args = ("load-partial", "source.pth", "--model", f"{code}:meta", "-o", "out.pth")
    found = run(*args)
    assert found[0] == 2
    assert "3.weight" in found[2].splitlines()[-1]
    assert "3.bias" in found[2].splitlines()[-1]
    assert not Path("out.pth").exists()
    assert run(*args, "--adapt", "3.weight=rows", "--init", "3.bias=zeros")[0] == 0
    made = torch.load("out.pth")
    assert {value.device.type for value in made.values()} == {"cpu"}
    assert torch.equal(made["3.weight"], pair[0]["3.weight"][:6])


def test_a_meta_checkpoint_is_a_target_too(run: Run, pair: Any) -> None:
    with torch.device("meta"):
        torch.save(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).state_dict(), "meta.pth")
    torch.save({"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}, "part.pth")
    args = ("load-partial", "part.pth", "--into", "meta.pth", "-o", "out.pth")
    code, _, err = run(*args)
    assert (code, "1.weight" in err, "0.weight" in err) == (2, True, False)
    assert run(*args, "--init", "1.*=zeros")[0] == 0
    assert torch.load("out.pth")["0.weight"].sum() == 6


def test_what_no_file_can_hold_is_refused_by_name(run: Run, pair: Any, code: str) -> None:
    for name, word in (("sparse", "3.weight (sparse_coo)"), ("lazy", "3.weight (UninitializedParameter)")):
        found = run("load-partial", "source.pth", "--model", f"{code}:{name}", "-o", "out.pth")
        assert found[0] == 2
        assert word in found[2]
        assert not Path("out.pth").exists()


# --- matching, and when it is not good enough ------------------------------------------------------------------------


def test_rules_rename_first_and_the_report_has_the_original_key(run: Run, pair: Any) -> None:
    source, _ = pair
    torch.save({f"backbone.{key}": value for key, value in source.items()} | {"backbone.x": torch.zeros(1)}, "old.pth")
    Path("rules.json").write_text(json.dumps([["^backbone\\.", ""]]))
    found = document(run, "old.pth", "--into", "target.pth", "-o", "out.pth", "--rules", "rules.json")
    rows = {row["key"]: row for row in found["result"]["rows"]}
    assert rows["0.weight"]["source"] == "backbone.0.weight"
    assert (rows["x"]["reason"], rows["x"]["source"]) == ("unexpected", "backbone.x")
    assert torch.equal(torch.load("out.pth")["0.weight"], source["0.weight"])


def test_prefixes_and_patterns_choose_as_filter_does(run: Run, pair: Any) -> None:
    source, _ = pair
    torch.save({f"net.{key}": value for key, value in source.items()}, "prefixed.pth")
    for args in (
        ("prefixed.pth", "--strip-prefix", "net."),
        ("source.pth", "--include", "0.*"),
        ("source.pth", "--exclude", "re:^1"),
        ("source.pth", "--include", "0.*", "--include", "1.*", "--exclude", "*bias"),
    ):
        found = document(run, *args, "--into", "target.pth", "-o", "out.pth", "--force")
        code, out, _ = run("filter", *args, "--match", "target.pth", "-o", "filtered.pth", "--force", "--json")
        assert (found["code"], code) == (0, 0)
        assert found["result"]["rows"] == json.loads(out)["result"]["rows"]
        assert same(torch.load("out.pth"), torch.load("filtered.pth"))
    torch.save({f"m.{key}": value for key, value in net(6).state_dict().items()}, "into.pth")
    assert document(run, "source.pth", "--into", "into.pth", "--add-prefix", "m.", "--dry-run")["code"] == 0


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (("--min-loaded", "99%"), "--min-loaded wants 99.0 %"),
        (("--require", "3.*"), "--require 3.*: not loaded: 3.weight, 3.bias"),
        (("--require", "nothing"), "fits no key"),
        (("--strict",), "2 mismatched"),
        (("--strict", "--init", "3.*=zeros", "--require", "3.bias"), "--require 3.bias"),
        (("--exclude", "*"), "no key of the source fits"),
    ],
)
def test_a_gate_that_does_not_hold_says_1_and_writes_nothing(
    run: Run, pair: Any, gate: tuple[str, ...], words: str
) -> None:
    args = ("load-partial", "source.pth", "--into", "target.pth", "-o", "out.pth", "--groups-out", "groups.json", *gate)
    before = content()
    code, out, err = run(*args)
    assert (code, err) == (1, "")
    assert words in out
    assert "(not written)" in out
    assert content() == before
    assert run(*args, "--force", "--dry-run")[0] == 1


def test_gates_that_hold_let_it_pass(run: Run, pair: Any) -> None:
    gates = ("--strict", "--min-loaded", "100%", "--require", "3.*")
    args = ("load-partial", "source.pth", "--into", "target.pth", "-o", "out.pth", "--adapt", "3.*=rows", *gates)
    assert run(*args)[0] == 0


# --- adapters, rules ---------------------------------------------------------------------------------------------


def adapted(run: Run, old: torch.Tensor, new: torch.Tensor, adapter: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the command and the Python call make of one tensor; asserts that they agree."""
    torch.save({"x.weight": old}, "old.pth")
    torch.save({"x.weight": new}, "new.pth")
    found = document(run, "old.pth", "--into", "new.pth", "-o", "made.pth", "--force", "--adapt", f"x.*={adapter}")
    made: torch.Tensor = torch.load("made.pth")["x.weight"]
    model = nn.Module()
    model.x = nn.Module()
    model.x.weight = nn.Parameter(new.clone())
    report = ckptool.load_partial(model, "old.pth", adapt={"x.*": adapter})
    assert bits(model.x.weight) == bits(made)
    row = found["result"]["rows"][0]
    assert (row["reason"], row["source_shape"], row["shape"]) == ("adapted", [*old.shape], [*new.shape])
    assert [line.reason for line in report.rows] == ["adapted"]
    return made, row


def test_each_adapter_by_command_and_by_python(run: Run) -> None:
    seed_torch(0)
    old, new = torch.randn(6, 4), torch.randn(9, 4)
    made, row = adapted(run, old, new, "rows")
    assert torch.equal(made, torch.cat([old, new[6:]]))
    assert row["detail"].startswith("rows: ")
    assert torch.equal(adapted(run, new, old, "rows")[0], new[:6])
    made, _ = adapted(run, old, new, "rows:fill=mean")
    assert torch.allclose(made[6:], old.mean(0))
    Path("rows.txt").write_text("5\n0\n")
    assert torch.equal(adapted(run, old, new[:2], "rows:select=rows.txt")[0], old[[5, 0]])
    Path("a.json").write_text(json.dumps(dict(zip("abcdef", range(6), strict=True))))
    Path("b.json").write_text(json.dumps({"f": 0, "new": 1, "a": 2}))
    made, _ = adapted(run, old, new[:3], "rows:tokens=a.json,b.json,fill=zero")
    assert torch.equal(made, torch.stack([old[5], torch.zeros(4), old[0]]))
    made, _ = adapted(run, torch.ones(3, 9), torch.zeros(5, 4), "crop")
    assert (made[:3].sum(), made[3:].sum()) == (12, 0)
    kernel = torch.randn(8, 3, 3, 3)
    assert torch.allclose(adapted(run, kernel, torch.zeros(8, 1, 3, 3), "in-chans:sum")[0], kernel.sum(1, keepdim=True))
    made, _ = adapted(run, kernel, torch.zeros(8, 3, 5, 3, 3), "inflate")
    assert torch.allclose(made.sum(2), kernel, atol=1e-6)
    assert adapted(run, torch.randn(1, 17, 4), torch.zeros(1, 26, 4), "pos-embed:prefix=1")[0].shape == (1, 26, 4)
    assert adapted(run, torch.randn(49, 3), torch.zeros(169, 3), "rel-pos")[0].shape == (169, 3)


def test_all_troubles_are_listed_at_once_and_nothing_is_written(refused: Refused, pair: Any) -> None:
    line = refused(
        "load-partial", "source.pth", "--into", "target.pth", "-o", "out.pth", "--adapt", "3.weight=inflate",
        "--adapt", "3.bias=pos-embed", "--init", "0.weight=xavier_uniform", "--init", "0.bias=orthogonal",
        "--init", "1.num_batches_tracked=normal(0,1)", "--exclude", "0.*", "--exclude", "1.*",
    )  # fmt: skip
    for key in ("3.weight: inflate", "3.bias: pos-embed", "0.bias: orthogonal", "1.num_batches_tracked: normal"):
        assert key in line
    assert "0.weight" not in line


@pytest.mark.parametrize(
    "options",
    [
        (), ("--into", "target.pth", "--model", "a:b", "-o", "x.pth"), ("--into", "target.pth"),
        ("--into", "target.pth", "-o", "x.pth", "--arg", "a=1"),
        ("--into", "target.pth", "-o", "x.pth", "--adapt", "3.*=stretch"),
        ("--into", "target.pth", "-o", "x.pth", "--adapt", "rows"),
        ("--into", "target.pth", "-o", "x.pth", "--init", "3.*=nonsense"),
        ("--into", "target.pth", "-o", "x.pth", "--init", "zeros"),
        ("--into", "target.pth", "-o", "x.pth", "--init-preset", "nonsense"),
        ("--into", "target.pth", "-o", "x.pth", "--optimizer", "keep"),
        ("--into", "target.pth", "-o", "x.pth", "--freeze", "nothing.*"),
        ("--into", "target.pth", "-o", "x.pth", "--freeze", "first:9"),
        ("--into", "target.pth", "-o", "x.pth", "--min-loaded", "many"),
        ("--into", "target.pth", "-o", "x.pth", "--rules", "absent.json"),
        ("--into", "absent.pth", "-o", "x.pth"), ("--into", "target.pth", "-o", "nowhere/x.pth"),
        ("--into", "target.pth", "-o", "x.pth", "--report", "x.pth"),
        ("--into", "target.pth", "-o", "x.pth", "--report", "r.json", "--groups-out", "./r.json"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_in_one_line(refused: Refused, pair: Any, options: tuple[str, ...]) -> None:
    refused("load-partial", "source.pth", *options)


def test_without_a_source_something_must_be_initialised(refused: Refused, pair: Any) -> None:
    assert "--init" in refused("load-partial", "--into", "target.pth", "-o", "x.pth")


def test_init_works_alone_and_names_every_key_with_its_rule(run: Run, pair: Any) -> None:
    args = ("--init-preset", "kaiming", "--into", "target.pth")
    found = document(run, *args, "-o", "fresh.pth")
    made = torch.load("fresh.pth")
    assert found["result"]["counts"] == {"initialised": 9}
    assert all(row["detail"].startswith("kaiming: ") for row in found["result"]["rows"])
    assert torch.equal(made["1.running_var"], torch.ones(4))
    assert made["1.num_batches_tracked"] == 0
    assert (made["3.bias"].abs().sum(), made["1.weight"].sum()) == (0, 4)
    document(run, *args, "-o", "again.pth")
    document(run, *args, "-o", "other.pth", "--seed", "1")
    assert Path("fresh.pth").read_bytes() == Path("again.pth").read_bytes()
    assert not torch.equal(torch.load("other.pth")["0.weight"], made["0.weight"])
    code, out, _ = run("load-partial", "--init", "3.*=constant(0.5)", "--into", "target.pth", "-o", "part.pth")
    assert code == 0
    assert out.startswith("part.pth: 9 tensors, 2 initialised (seed 0)")
    assert torch.equal(torch.load("part.pth")["0.weight"], pair[1]["0.weight"])


def test_each_key_draws_from_a_stream_of_its_own(run: Run, pair: Any) -> None:
    run("load-partial", "--init", "*=default", "--into", "target.pth", "-o", "all.pth", "--seed", 3)
    run("load-partial", "source.pth", "--init", "3.*=default", "--into", "target.pth", "-o", "head.pth", "--seed", 3)
    whole, head = torch.load("all.pth"), torch.load("head.pth")
    assert torch.equal(whole["3.weight"], head["3.weight"])
    assert torch.equal(head["0.weight"], pair[0]["0.weight"])


def test_presets_are_listed_for_people_and_for_scripts(run: Run) -> None:
    code, out, _ = run("load-partial", "--init-preset", "list")
    assert code == 0
    assert "kaiming " in out
    assert "resnext" in out
    found = document(run, "--init-preset", "list")
    assert found["result"]["presets"]["kaiming"]["rows"][0][:2] == [
        "conv weight", "kaiming_normal(mode=fan_out,nonlinearity=relu)",
    ]  # fmt: skip


def test_ties_stay_ties_whether_loaded_adapted_or_initialised(run: Run) -> None:
    class Tied(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(count, 4), nn.Linear(4, count, bias=False)
            self.head.weight = self.embed.weight

    torch.save(Tied(8).state_dict(), "source.pth")
    torch.save({"embed.weight": torch.ones(8, 4)}, "half.pth")
    for count, source, more in (
        (8, ["source.pth"], []), (8, ["half.pth"], []), (10, ["source.pth"], ["--adapt", "embed.weight=rows"]),
        (10, ["half.pth"], ["--adapt", "*=rows:fill=zero"]), (10, [], ["--init", "*=default"]),
        (10, [], ["--init", "head.weight=normal(0,1)", "--init", "embed.weight=normal(0,1)"]),
    ):  # fmt: skip
        torch.save(Tied(count).state_dict(), "target.pth")
        args = ("load-partial", *source, "--into", "target.pth", "-o", "out.pth", "--force", *more)
        assert run(*args, *(["--strict"] if source else []))[0] == 0
        made = torch.load("out.pth")
        assert made["embed.weight"].data_ptr() == made["head.weight"].data_ptr()
        assert made["embed.weight"].shape == (count, 4)


def test_values_are_cast_to_the_targets_dtype_and_lost_ones_are_told(run: Run) -> None:
    torch.save({"weight": torch.tensor([1e6, 1.0]), "bias": torch.ones(2)}, "source.pth")
    torch.save({"weight": torch.zeros(2).half(), "bias": torch.zeros(2).bfloat16()}, "target.pth")
    found = document(run, "source.pth", "--into", "target.pth", "-o", "out.pth")
    made = torch.load("out.pth")
    assert made["weight"].dtype == torch.float16
    assert found["result"]["counts"] == {"cast": 2}
    assert found["result"]["overflowed"] == {"weight": 1}


# --- what training gets ------------------------------------------------------------------------------------------


def test_groups_are_disjoint_and_covering_and_frozen_ones_are_apart(run: Run, pair: Any) -> None:
    parameters = {name for name, _ in net().named_parameters()}
    for freeze, frozen in (
        ([], set()), (["loaded"], {name for name in parameters if name[0] in "01"}), (["0.*"], {"0.weight", "0.bias"}),
        (["first:1"], {"0.weight", "0.bias"}), (["first:1", "1.weight"], {"0.weight", "0.bias", "1.weight"}),
    ):  # fmt: skip
        options = [part for spec in freeze for part in ("--freeze", spec)]
        args = ("load-partial", "source.pth", "--into", "target.pth", "-o", "out.pth", "--force",
                "--groups-out", "groups.json", "--new-lr-mult", 5, "--weight-decay", 0.01)  # fmt: skip
        code, out, _ = run(*args, *options)
        assert code == 0
        made = json.loads(Path("groups.json").read_text())
        names = [name for group in made["groups"] for name in group["params"]]
        assert len(names) == len(set(names))
        assert {*names, *made["frozen"]} == parameters
        assert set(made["frozen"]) == frozen
        groups = {group["name"]: (group["lr_mult"], group["weight_decay"]) for group in made["groups"]}
        assert groups["new"] == (5.0, 0.01)
        assert groups["new_no_decay"] == (5.0, 0.0)
        assert ("batchnorm  1: frozen" in out) == ("1.weight" in frozen)
        model = net()
        live = dict(model.named_parameters())
        torch.optim.AdamW([
            {"params": [live[name] for name in group["params"]], "lr": group["lr_mult"]} for group in made["groups"]
        ])  # fmt: skip


def test_report_is_the_document_and_a_dry_run_writes_nothing_else(run: Run, pair: Any) -> None:
    args = ("source.pth", "--into", "target.pth", "-o", "out.pth", "--groups-out", "groups.json")
    before = set(content())
    found = document(run, *args, "--dry-run")
    assert set(content()) == before
    assert "output" not in found["result"]
    code, out, _ = run("load-partial", *args, "--dry-run")
    assert (code, out.startswith("out.pth (dry run): 7 loaded (")) == (0, True)
    found = document(run, *args, "--report", "report.json")
    assert set(content()) - before == {"out.pth", "groups.json", "report.json"}
    del found["code"]
    assert json.loads(Path("report.json").read_text()) == found
    result = found["result"]
    assert result["output"] == "out.pth"
    assert result["counts"] == {"loaded": 7, "mismatched": 2}
    assert [row["key"] for row in result["rows"]] == list(pair[1])
    row = next(row for row in result["rows"] if row["key"] == "3.weight")
    assert (row["shape"], row["source_shape"], row["source"]) == ([6, 16], [10, 16], "3.weight")
    assert {"groups", "frozen", "moving", "tied", "seed", "loaded_fraction"} <= result.keys()


def test_an_error_is_a_document_too(run: Run, pair: Any) -> None:
    found = document(run, "source.pth", "--into", "target.pth", "-o", "out.pth", "--freeze", "nothing")
    assert (found["code"], found["error"]["kind"]) == (2, "usage")


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for seed in range(3):
        seed_torch(seed)
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


def test_an_optimizer_is_left_carried_or_dropped(run: Run) -> None:
    old = net(10, seed=1)
    optimizer = trained(old)
    torch.save({"model": old.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, "run.pth")
    new = net(6, seed=2)
    torch.save({"model": new.state_dict(), "epoch": 0}, "target.pth")
    args = ("load-partial", "run.pth", "--into", "target.pth", "--adapt", "3.weight=rows")
    code, out, _ = run(*args, "-o", "left.pth")
    assert code == 0
    assert "not taken from run.pth: optimizer" in out
    assert list(torch.load("left.pth")) == ["model", "epoch"]
    code, out, _ = run(*args, "-o", "carried.pth", "--optimizer", "remap")
    made = torch.load("carried.pth")
    new.load_state_dict(made["model"])
    resumed = torch.optim.AdamW(new.parameters(), lr=0.5)
    resumed.load_state_dict(made["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.01
    for position, (parameter, other) in enumerate(zip(new.parameters(), old.parameters(), strict=True)):
        if position < 4:
            for name, value in optimizer.state[other].items():
                assert torch.equal(resumed.state[parameter][name], value)
        else:
            assert parameter not in resumed.state
    new(torch.randn(2, 3, 4, 4)).sum().backward()
    resumed.step()
    again = ("load-partial", "run.pth", "--into", "carried.pth", "-o", "dropped.pth", "--optimizer", "drop")
    code, out, _ = run(*again)
    assert (code, "dropped: optimizer" in out) == (0, True)
    assert list(torch.load("dropped.pth")) == ["model", "epoch"]


def test_an_optimizer_follows_rules_where_it_has_names(run: Run) -> None:
    old = net(6, seed=1)
    named = torch.optim.AdamW(old.named_parameters(), lr=0.01)
    old(torch.randn(4, 3, 4, 4)).square().sum().backward()
    named.step()
    torch.save({"model": {f"old.{key}": value for key, value in old.state_dict().items()},
                "optimizer": {**named.state_dict(), "param_groups": [
                    {**group, "param_names": [f"old.{name}" for name in group["param_names"]]}
                    for group in named.state_dict()["param_groups"]]}}, "run.pth")  # fmt: skip
    torch.save(net(6, seed=2).state_dict(), "target.pth")
    Path("rules.json").write_text(json.dumps([["^old\\.", ""]]))
    code, _, err = run("load-partial", "run.pth", "--into", "target.pth", "-o", "out.pth", "--rules", "rules.json",
                       "--optimizer", "remap")  # fmt: skip
    assert code == 0, err
    made = torch.load("out.pth")
    group = made["optimizer"]["param_groups"][0]
    assert group["param_names"] == [name for name, _ in old.named_parameters()]
    assert torch.equal(made["optimizer"]["state"][0]["exp_avg"], named.state_dict()["state"][0]["exp_avg"])


def test_counters_that_the_source_lacks_are_bookkeeping(run: Run, pair: Any) -> None:
    torch.save({key: value for key, value in pair[0].items() if "num_batches" not in key}, "old.pth")
    args = ("old.pth", "--into", "target.pth", "-o", "out.pth", "--adapt", "3.*=rows")
    found = document(run, *args, "--strict")
    assert found["code"] == 0
    assert found["result"]["counts"] == {"loaded": 6, "bookkeeping": 1, "adapted": 2}
    assert torch.load("out.pth")["1.num_batches_tracked"] == pair[1]["1.num_batches_tracked"]
    found = document(run, *args, "--init", "*tracked=zeros", "--force")
    assert torch.load("out.pth")["1.num_batches_tracked"] == 0


def test_inputs_are_the_same_bytes_afterwards(run: Run, pair: Any) -> None:
    before = content()
    run("load-partial", "source.pth", "--into", "target.pth", "-o", "out.pth", "--adapt", "3.*=rows", "--verify")
    after = content()
    assert {name: after[name] for name in before} == before


def test_verify_reads_back_what_was_adapted_cast_and_drawn(run: Run, pair: Any) -> None:
    torch.save({key: value.double() if value.is_floating_point() else value for key, value in pair[0].items()}, "d.pth")
    for output in ("out.pth", "out.safetensors"):
        args = ("load-partial", "d.pth", "--into", "target.pth", "-o", output, "--verify")
        assert run(*args, "--adapt", "3.weight=rows", "--init", "3.bias=normal(0,1)")[0] == 0
