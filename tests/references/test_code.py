"""A model in code as a reference: what runs, what is read of the module, and what the user's mistakes look like."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, bits
from torch import nn

import ckptool
from ckptool.cli import main
from ckptool.errors import UsageError
from ckptool.references import is_code
from ckptool.references.code import parsed

Saved = Callable[..., Path]
Refused = Callable[..., str]

NETS = """
import os
import subprocess

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=3, width=4, tie=False, dtype="float32"):
        super().__init__()
        self.body = nn.Linear(2, width, dtype=getattr(torch, dtype))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes)
        self.register_buffer("seen", torch.zeros(5))
        self.register_buffer("cache", torch.zeros(9), persistent=False)
        if tie:
            self.again = nn.Linear(width, classes)
            self.again.weight = self.head.weight


def build(**given):
    return Net(**given)


def several():
    return Net(), None, {"epoch": 3}


def device():
    model = Net()
    model.head = nn.Linear(4, 3 if model.body.weight.is_meta else 8)
    return model


def not_on_meta():
    model = Net()
    if float(model.body.weight.sum().item()) is None:
        raise AssertionError
    return model


def constant(value=2.0):
    model = Net()
    for tensor in model.state_dict().values():
        tensor.fill_(value)
    return model


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"scale": torch.ones(2)}

    def set_extra_state(self, state):
        pass


def extra():
    return Extra(2, 3)


def quantised():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 3)), {nn.Linear}, dtype=torch.qint8)


def nothing():
    return None


def state():
    return Net().state_dict()


def pair():
    return [Net(), 1]


def raising():
    depth = {}
    return depth["layers"]


def inside_torch():
    return nn.Linear(2, -1)


class Hooked(nn.Linear):
    def state_dict(self, *args, **more):
        raise RuntimeError("no state today")


def hooked():
    return Hooked(2, 2)


def talking():
    print("a word of mine")
    return Net()


def talking_child():
    subprocess.run("echo of a child", shell=True, check=True)
    os.write(1, b"of a library\\n")
    return Net()


def elsewhere():
    os.chdir("nets_in_code")
    return Net()


def elsewhere_and_raising():
    os.chdir("/")
    raise RuntimeError("no")


def lazy():
    return nn.Sequential(nn.Linear(2, 4), nn.LazyLinear(3), nn.LazyBatchNorm1d())


def lazy_and_run():
    model = lazy()
    model(torch.zeros(5, 2))
    return model


model = Net()
"""


def line_of(words: str) -> int:
    return 1 + next(number for number, line in enumerate(NETS.splitlines()) if words in line)


class Net(nn.Module):
    def __init__(self, classes: int = 3, tie: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(2, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, classes)
        self.register_buffer("seen", torch.zeros(5))
        self.register_buffer("cache", torch.zeros(9), persistent=False)
        if tie:
            self.again = nn.Linear(4, classes)
            self.again.weight = self.head.weight


@pytest.fixture(autouse=True)
def nets() -> Iterator[None]:
    """The user's code is in the current directory, under two names; what was imported of it is forgotten afterwards."""
    before, known = list(sys.path), {*sys.modules}
    Path("train.py").write_text(NETS)
    Path("nets_in_code").mkdir()
    Path("nets_in_code/__init__.py").write_text("")
    Path("nets_in_code/models.py").write_text(NETS)
    yield
    sys.path[:] = before
    for name in {*sys.modules} - known:
        if name.startswith(("train", "nets_in_code", "_types_", "timm", "transformers", "model_")):
            del sys.modules[name]


NAMES = ["train.py:build", "nets_in_code.models:build", "nets_in_code/models.py:build", "train:Net"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_code_stands_where_a_checkpoint_is_a_reference(name: str, run: Run, saved: Saved) -> None:
    model = Net()
    path, other = saved(model.state_dict()), saved(Net(5).state_dict(), "other.pth")
    assert run("diff", name, path)[0] == run("diff", path, name)[0] == 0
    assert run("diff", name, other)[0] == 1
    assert run("diff", name, other, "--arg", "classes=5")[0] == 0
    code, out, _ = run("inspect", name, "--json")
    found = {row["key"]: (row["shape"], row["dtype"]) for row in json.loads(out)["result"][0]["tensors"]}
    truth = {key: (list(one.shape), str(one.dtype).removeprefix("torch.")) for key, one in model.state_dict().items()}
    assert (code, found) == (0, truth)
    for gate in (["--strict"], ["--min-loaded", "100%"], ["--require", "*"]):
        assert run("filter", path, "--match", name, "--dry-run", *gate)[0] == 0
        assert run("filter", other, "--match", name, "--dry-run", *gate)[0] == 1
        assert run("load-partial", path, "--into", name, "--dry-run", *gate)[0] == 0
        assert run("load-partial", other, "--into", name, "--dry-run", *gate)[0] == 1


@pytest.mark.parametrize("command", ["diff", "inspect", "filter", "load-partial"])
def test_every_command_says_that_it_ran_the_users_code(command: str, run: Run, saved: Saved) -> None:
    path = saved(Net().state_dict())
    args = {
        "diff": ["train.py:build", path], "inspect": ["train.py:build"],
        "filter": [path, "--match", "train.py:build", "--dry-run"],
        "load-partial": [path, "--into", "train.py:build", "--dry-run"],
    }[command]  # fmt: skip
    for extra in ([], ["--json"]):
        code, out, _ = run(command, *args, *extra)
        assert (code, "imported and ran train.py:build, your own code" in out) == (0, True)


def test_it_is_built_on_meta_where_that_works_and_else_on_the_cpu_which_is_said(run: Run, saved: Saved) -> None:
    path = saved(Net().state_dict())
    assert run("diff", "train.py:device", path)[0] == 0  # its head is another one on the CPU
    code, out, _ = run("diff", "train.py:not_on_meta", path)
    assert (code, "built on the CPU: on meta it raised RuntimeError" in out) == (0, True)
    assert "(train.py:" in out
    assert "CPU" not in run("diff", "train.py:build", path)[1]


def test_what_needs_values_builds_on_the_cpu(run: Run, saved: Saved) -> None:
    state = {key: torch.full_like(one, 2) for key, one in Net().state_dict().items()}
    path, other = saved(state), saved({**state, "seen": torch.ones(5)}, "other.pth")
    assert run("diff", "train.py:constant", path, "--values")[0] == 0
    assert run("diff", "train.py:constant", other, "--values")[0] == 1
    assert run("diff", "train.py:constant", other, "--quick")[0] == 1
    code, out, _ = run("inspect", "train.py:constant", "--hash", "--json")
    hashes = {row["key"]: row["hash"] for row in json.loads(out)["result"][0]["tensors"]}
    assert (code, hashes) == (0, {row.key: row.hash for row in ckptool.inspect(path, hashes=True).tensors})
    assert run("inspect", "train.py:constant", "--check")[0] == 0


def test_values_that_no_source_has_are_those_that_the_model_was_built_with(run: Run, saved: Saved) -> None:
    state = Net(5).state_dict()
    path = saved(state)
    for number, args in enumerate((["filter", path, "--match"], ["load-partial", path, "--into"])):
        code, out, err = run(*args, "train.py:constant", "-o", f"{number}.pth", "--arg", "value=7")
        assert (code, err) == (0, ""), out
        made = torch.load(f"{number}.pth", weights_only=True)
        assert list(made) == list(Net().state_dict())
        assert {*made["head.weight"].flatten().tolist(), *made["head.bias"].tolist()} == {7.0}
        assert bits(made["body.weight"]) == bits(state["body.weight"])
        assert not any(one.requires_grad or isinstance(one, nn.Parameter) for one in made.values())


@pytest.mark.filterwarnings("ignore")
def test_extra_state_and_packed_weights_are_those_of_state_dict(run: Run, saved: Saved) -> None:
    assert run("diff", "train.py:extra", saved({"weight": torch.ones(3, 2), "bias": torch.ones(3)}))[0] == 1
    path = saved({"weight": torch.ones(3, 2), "bias": torch.ones(3), "_extra_state": {"scale": torch.ones(2)}})
    assert run("diff", "train.py:extra", path)[0] == 0
    assert run("filter", path, "--match", "train.py:extra", "-o", "out.pth")[0] == 0
    assert torch.equal(torch.load("out.pth", weights_only=True)["_extra_state"]["scale"], torch.ones(2))
    layers = nn.Sequential(nn.Linear(2, 3))
    made = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8)
    path = saved(made.state_dict(), "quantised.pth")
    assert run("diff", "train.py:quantised", path)[0] == run("diff", path, "train.py:quantised")[0] == 0


def test_what_a_lock_of_it_says_is_what_state_dict_and_named_parameters_say(run: Run) -> None:
    model = Net(tie=True)
    assert run("inspect", "train.py:build", "--arg", "tie=True", "--lock", "x.lock")[0] == 0
    lines = [line.split("\t") for line in Path("x.lock").read_text().splitlines()[1:]]
    assert [line[0] for line in lines] == sorted(model.state_dict())
    kinds = {line[0]: "parameter" if "parameter" in line else "buffer" if "buffer" in line else "" for line in lines}
    named = dict(model.named_parameters(remove_duplicate=False))
    assert kinds == {key: "parameter" if key in named else "buffer" for key in model.state_dict()}
    assert [line[-1] for line in lines if line[0] == "head.weight"] == ["tied:again.weight"]
    assert not any(line[0] == "cache" for line in lines)


def test_ties_of_the_model_hold_in_what_is_filtered_into_it(run: Run, saved: Saved) -> None:
    state = {key: one for key, one in Net(tie=True).state_dict().items() if key != "again.weight"}
    code, out, _ = run(
        "filter", saved(state), "--match", "train.py:build", "--arg", "tie=True", "-o", "out.pth", "--strict", "--json"
    )
    rows = {row["key"]: row["reason"] for row in json.loads(out)["result"]["rows"]}
    assert (code, rows["again.weight"]) == (0, "tied")
    made = torch.load("out.pth", weights_only=True)
    assert made["again.weight"].data_ptr() == made["head.weight"].data_ptr()


@pytest.mark.parametrize("name", ["several", "model", "build"])
def test_a_module_first_in_a_tuple_or_there_already_is_taken(name: str, run: Run, saved: Saved) -> None:
    assert run("diff", f"train.py:{name}", saved(Net().state_dict()))[0] == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "not a torch.nn.Module but None"), ("state", "not a torch.nn.Module but a OrderedDict"),
        ("pair", "not a torch.nn.Module but a list"),
        ("raising", f"KeyError: 'layers' (train.py:{line_of('return depth')})"),
        ("absent", "has no attribute 'absent'"), ("Net.absent", "has no attribute 'absent'"),
        ("hooked", f"RuntimeError: no state today (train.py:{line_of('no state today')})"),
        ("inside_torch", "Trying to create tensor with negative dimension"), ("nn", "TypeError"),
    ],
)  # fmt: skip
def test_an_error_of_the_users_code_is_one_line_with_file_and_line(
    name: str, said: str, refused: Refused, saved: Saved
) -> None:
    path = saved(Net().state_dict())
    for args in (
        ["diff", f"train.py:{name}", path], ["inspect", f"train.py:{name}"],
        ["filter", path, "--match", f"train.py:{name}", "-o", "out.pth"],
        ["load-partial", path, "--into", f"train.py:{name}", "-o", "out.pth"],
    ):  # fmt: skip
        line = refused(*args)
        assert line.startswith(f"ckptool: error: train.py:{name}: ")
        assert said in line
    if name == "inside_torch":
        assert f"(train.py:{line_of('nn.Linear(2, -1)')})" in line


def test_mistakes_in_the_file_and_its_imports_are_shown_where_they_are(
    refused: Refused, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of modules; that of a file is never written
    path = saved(Net().state_dict())
    Path("model_syntax.py").write_text("x = 1\ndef build(:\n")
    Path("model_import.py").write_text("\n\nimport no_such_package_\n")
    Path("model_exit.py").write_text("import sys\nsys.exit('usage: train')\n")
    for name, said in (
        ("model_syntax", "SyntaxError: invalid syntax (model_syntax.py:2)"),
        ("model_import", "ModuleNotFoundError: No module named 'no_such_package_' (model_import.py:3)"),
        ("model_exit", "SystemExit: usage: train (model_exit.py:2)"),
    ):
        assert said in refused("diff", f"{name}.py:build", path)
        assert said in refused("diff", f"{name}:build", path)
    assert "there is no file no.py" in refused("diff", "no.py:build", path)
    assert "there is no such file, and ModuleNotFoundError: No module named 'no_mod'" in refused(
        "diff", "no_mod:x", path
    )


def test_a_file_of_that_very_name_goes_before_the_code(run: Run, saved: Saved) -> None:
    saved({"w": torch.ones(2)}, "train.py:build")
    code, out, _ = run("inspect", "train.py:build", "--keys")
    assert (code, out) == (0, "w\n")
    assert "train" not in sys.modules


def test_only_the_form_of_a_model_in_code_is_taken_for_one() -> None:
    assert all(map(is_code, ["a:b", "a.b:c.d", "x/y.py:f", "../x y.py:f", "/a/b.py:C.make", "a:B"]))
    wrong = [
        "a",
        "a.py",
        "https://x",
        "s3://b/k",
        "a:",
        ":b",
        "a:b/c",
        "a/b:c",
        "a:b:c",
        "a-b:c",
        "a:b-c",
        "1a:b",
        "a.:b",
    ]
    assert not any(map(is_code, [*wrong, "C:\\x.pth", "a: b", ""]))


def test_sources_and_inputs_that_are_written_are_never_code(refused: Refused, saved: Saved) -> None:
    path = saved(Net().state_dict())
    for args in (
        ["convert", "train.py:build", "-o", "x.pth"], ["remap", "train.py:build", "--add-prefix", "a.", "-o", "x.pth"],
        ["filter", "train.py:build", "-o", "x.pth"], ["load-partial", "train.py:build", "--into", path, "-o", "x.pth"],
    ):  # fmt: skip
        refused(*args)
    assert "train" not in sys.modules
    with pytest.raises(ckptool.CkptoolError):
        ckptool.open("train.py:build")


def test_arguments_are_literals_or_text() -> None:
    given = ["a=1", "b=-1.5e3", "c='x=y'", "d=[1, (2,)]", "e=None", "f=True", "g=false", "h=[true, 1]", "i=resnet18",
             "j=path/to: it", "k=", "l={'a': 1}", "m=2020-01-01", "n='open", "o=b'x'", "p=__import__('os')", "q=inf",
             "r=1\nvalue2=3", "s=\u00e9", 'u="x"', "v=0x10", "w={}[0]"]  # fmt: skip
    assert parsed(given) == {
        "a": 1, "b": -1500.0, "c": "x=y", "d": [1, (2,)], "e": None, "f": True, "g": False, "h": [True, 1],
        "i": "resnet18", "j": "path/to: it", "k": "", "l": {"a": 1}, "m": "2020-01-01", "n": "'open", "o": b"x",
        "p": "__import__('os')", "q": float("inf"), "r": "1\nvalue2=3", "s": "\u00e9", "u": "x", "v": 16, "w": "{}[0]",
    }  # fmt: skip
    for wrong in (["a"], ["=1"], ["a b=1"], ["a=1", "a=2"], ["1a=2"]):
        with pytest.raises(UsageError):
            parsed(wrong)


def test_arguments_without_a_model_in_code_are_refused(refused: Refused, saved: Saved) -> None:
    path = saved(Net().state_dict())
    for args in (
        ["diff", path, path], ["inspect", path], ["filter", path, "--match", path, "--dry-run"],
        ["filter", path, "--dry-run"], ["load-partial", path, "--into", path, "--dry-run"],
    ):  # fmt: skip
        assert "--arg goes with a model in code" in refused(*args, "--arg", "a=1")
    line = refused("diff", "train.py:build", path, "--arg", "depth=1")
    assert (
        f"TypeError: Net.__init__() got an unexpected keyword argument 'depth' (train.py:{line_of('return Net(**')})"
        in line
    )
    line = refused("diff", "train.py:Net", path, "--arg", "depth=1")
    assert f"argument 'depth' (defined at train.py:{line_of('def __init__')})" in line
    assert "--into-root" in refused("load-partial", path, "--into", "train.py:Net", "--into-root", "a", "--dry-run")


def test_the_current_directory_is_the_one_that_is_searched_whatever_ran_before(
    run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (3, 6, 3):
        Path(f"there{number}").mkdir(exist_ok=True)
        monkeypatch.chdir(f"there{number}")
        Path("train.py").write_text(NETS.replace("classes=3", f"classes={number}"))
        assert run("diff", "train.py:build", saved(Net(number).state_dict()))[0] == 0
        monkeypatch.chdir("..")
    Path("train.py").write_text(NETS.replace("classes=3", "classes=4"))
    assert run("diff", "train.py:build", saved(Net(4).state_dict()))[0] == 0
    assert not Path("__pycache__").exists()


def test_a_file_beside_its_own_imports_and_one_of_a_known_name_work(run: Run, saved: Saved) -> None:
    Path("src/model_pkg/deep").mkdir(parents=True)
    for place in ("src/model_pkg", "src/model_pkg/deep"):
        Path(place, "__init__.py").write_text("")
    Path("src/model_pkg/layers.py").write_text(NETS)
    Path("src/model_pkg/deep/net.py").write_text("from ..layers import Net\n")
    Path("src/model_loose.py").write_text(
        "from model_beside import Net\nimport dataclasses\n@dataclasses.dataclass\nclass C:\n    x: 'int'\n"
    )
    Path("src/model_beside.py").write_text(NETS)
    Path("src/types.py").write_text(NETS)
    path = saved(Net().state_dict())
    import types

    for name in ("src/model_pkg/deep/net.py:Net", "src/model_loose.py:Net", "src/types.py:Net"):
        code, out, err = run("diff", name, path)
        assert (code, err) == (0, ""), out
    assert sys.modules["types"] is types


def test_what_the_code_prints_does_not_mix_with_the_report(run: Run, saved: Saved) -> None:
    code, out, err = run("diff", "train.py:talking", saved(Net().state_dict()), "--json")
    assert (code, json.loads(out)["result"]["same"], err) == (0, True, "a word of mine\n")


def test_nor_what_processes_and_libraries_print_that_it_starts(capfd: pytest.CaptureFixture[str], saved: Saved) -> None:
    path = saved(Net().state_dict())
    assert main(["diff", "train.py:talking_child", str(path), "--json"]) == 0
    out, err = capfd.readouterr()
    assert (json.loads(out)["result"]["same"], err) == (True, "of a child\nof a library\n")


def test_a_directory_that_the_code_changes_to_is_left_again(run: Run, refused: Refused, saved: Saved) -> None:
    path, here = saved(Net().state_dict()), os.getcwd()
    assert run("diff", "train.py:elsewhere", os.path.relpath(path))[0] == 0
    assert run("filter", path, "--match", "train.py:elsewhere", "-o", "out.pth")[0] == 0
    assert run("load-partial", path, "--into", "train.py:elsewhere", "-o", "made.pth")[0] == 0
    assert "RuntimeError: no" in refused("diff", "train.py:elsewhere_and_raising", path)
    assert os.getcwd() == here
    assert Path("out.pth").exists()
    assert Path("made.pth").exists()


@pytest.mark.parametrize("command", ["diff", "filter", "inspect"])
def test_parameters_without_a_shape_are_refused_by_name(command: str, refused: Refused, saved: Saved) -> None:
    code = "train.py:lazy"
    args = {"diff": [code, saved({"0.weight": torch.ones(4, 2), "0.bias": torch.ones(4)})], "inspect": [code]}
    args["filter"] = [args["diff"][1], "--match", code, "--dry-run"]
    said = refused(command, *args[command])
    assert "1.weight, 1.bias, 2.weight" in said
    assert "run the model once" in said


def test_a_lazy_model_that_was_run_once_has_shapes(run: Run) -> None:
    code, out, _ = run("inspect", "train.py:lazy_and_run", "--flat")
    assert (code, "3x4" in out) == (0, True)


# --- libraries -------------------------------------------------------------------------------------------------------

TIMM = """
from torch import nn
def create_model(model_name, pretrained=False, num_classes=10, **more):
    if model_name != "resnet18":
        raise RuntimeError(f"Unknown model ({model_name})")
    return nn.Sequential(nn.Linear(2, num_classes))
"""

TRANSFORMERS = """
import json, os
from torch import nn

class PretrainedConfig:
    def __init__(self, **given):
        self.__dict__.update(given)

class AutoConfig:
    @classmethod
    def from_pretrained(cls, path, **more):
        with open(os.path.join(path, "config.json")) as file:
            return PretrainedConfig(**json.load(file))

class LlamaForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        if not isinstance(config, PretrainedConfig):
            raise TypeError("Parameter config should be an instance of class `PretrainedConfig`")
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, x):
        return x

class AutoModelForCausalLM:
    def __init__(self, *args, **more):
        raise OSError("AutoModelForCausalLM is designed to be instantiated using `from_pretrained` or `from_config`")

    @classmethod
    def from_config(cls, config, **more):
        return LlamaForCausalLM(config)
"""


def test_timm_and_transformers_are_built_by_one_line_each(run: Run, refused: Refused, saved: Saved) -> None:
    Path("timm.py").write_text(TIMM)
    Path("transformers.py").write_text(TRANSFORMERS)
    path = saved(nn.Sequential(nn.Linear(2, 7)).state_dict())
    call = ["diff", "timm:create_model", path, "--arg", "num_classes=7"]
    assert run(*call, "--arg", "model_name=resnet18")[0] == 0
    assert "RuntimeError: Unknown model (resnet19) (timm.py:5)" in refused(*call, "--arg", "model_name=resnet19")
    Path("llama").mkdir()
    Path("llama/config.json").write_text('{"vocab_size": 8, "hidden_size": 3}')
    weight = torch.ones(8, 3)
    path = saved({"embed.weight": weight, "lm_head.weight": weight}, "llama.pth")
    for name in ("AutoModelForCausalLM", "AutoModelForCausalLM.from_config", "LlamaForCausalLM"):
        assert run("diff", f"transformers:{name}", path, "--arg", "config=llama")[0] == 0
        line = refused("diff", f"transformers:{name}", path, "--arg", "config=lama")
        assert "there is no directory lama" in line


# --- in Python -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_live_module_is_a_reference_in_python(device: str, saved: Saved) -> None:
    with torch.device(device):
        model, other = Net(tie=True), Net(5, tie=True)
    path = saved(Net(tie=True).state_dict())
    assert ckptool.diff(model, path).same
    assert not ckptool.diff(path, other).same
    assert {row.key: row.shape for row in ckptool.inspect(model).tensors} == {
        key: list(one.shape) for key, one in model.state_dict().items()
    }
    merged, report = ckptool.filter(path, match=model)
    assert report.loaded == len(model.state_dict())
    ckptool.save(merged, "out.pth")
    made = torch.load("out.pth", weights_only=True)
    assert not any(one.requires_grad for one in made.values())
    assert all(bits(made[key]) == bits(one) for key, one in torch.load(path).items())
    if device == "cpu":
        ckptool.save(model, "saved_again.pth")
        made = torch.load("saved_again.pth", weights_only=True)
        assert not any(one.requires_grad or isinstance(one, nn.Parameter) for one in made.values())
        assert all(bits(made[key]) == bits(one) for key, one in model.state_dict().items())
    planned, _ = ckptool.plan_partial(path, model)
    assert list(planned.state_dict()) == list(model.state_dict())
    opened = ckptool.open(model).state_dict()
    assert {key for key, one in opened.items() if one.is_parameter} == {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }


def test_what_only_a_live_module_has_is_not_written(saved: Saved) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return Path("x")

    with torch.device("meta"):
        on_meta = Net()
    sparse = nn.Linear(2, 2)
    sparse.weight = nn.Parameter(torch.eye(2).to_sparse())
    for model, word in ((on_meta, "meta"), (sparse, "sparse_coo"), (Odd(2, 2), "PosixPath")):
        merged, _ = ckptool.filter({"none": torch.ones(1)}, match=model)
        with pytest.raises(ckptool.CkptoolError, match=word):
            ckptool.save(merged, "out.pth")
    assert not Path("out.pth").exists()
