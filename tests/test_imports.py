from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, loads_safely

import ckptool

OLD, FULL = FIXTURES / "resnet_old.pth", FIXTURES / "resnet_122.pth"
SAFE = FIXTURES / "resnet_old.safetensors"

IMPORTED = """
import ast, contextlib, io, sys
from ckptool.cli import main
for args in ast.literal_eval(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(args)
    print((args, code, sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "safetensors"})))
"""

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from ckptool.cli import main
sys.exit(main(sys.argv[1:]))
"""


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=60)


WITHOUT = [
    (["--help"], 0),
    (["--version"], 0),
    (["inspect", "--help"], 0),
    (["inspect", FULL], 0),
    (["inspect", FIXTURES / "resnet_module.pth", "--json"], 0),
    (["inspect", SAFE, FIXTURES / "sharded", FIXTURES / "resnet_legacy.pth"], 0),
    (["diff", OLD, FULL], 0),
    (["diff", OLD, FIXTURES / "resnet_new.pth", "--json"], 1),
    (["diff", SAFE, FIXTURES / "resnet_nested.pth"], 0),
    (["filter", "--match", FULL, OLD, "-o", "out.pth"], 0),
    (["filter", "--match", FULL, SAFE, "-o", "out.safetensors"], 0),
    (["filter", "--match", FIXTURES / "resnet_nested.pth", FIXTURES / "resnet_legacy.pth", "-o", "nested.pth"], 0),
    (["filter", FIXTURES / "sharded", "-o", "sharded.pth"], 0),
    (["inspect", FIXTURES / "bad" / "html.pth"], 2),
]


def test_what_moves_bytes_and_reads_headers_imports_neither_torch_nor_numpy() -> None:
    done = python(IMPORTED, [[str(arg) for arg in args] for args, _ in WITHOUT])
    assert (done.returncode, done.stderr) == (0, "")
    told = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert told == [([str(arg) for arg in args], code, []) for args, code in WITHOUT]


# --- what each command may import, by name ---------------------------------------------------------------------------

FAMILIES = {"click", "typer", "shellingham", "annotated_doc"}
"""The packages of others that a command line may need: typer, and what it imports. pydantic would take 75 ms."""

BEGIN = (
    "cli cli.app cli.progress cli.render cli.terminal cli.terminal.colours cli.terminal.tables errors io io.paths "
    "io.system io.tally errno typer ranks ranks.world contextlib dataclasses re reports signal text typing"
)
CORE = (
    f"{BEGIN} limits contextvars core core.checkpoint core.dtypes core.keys core.modules core.optimizers "
    "core.tensor core.tree core.versions text fnmatch math"
)
READ = (
    f"{CORE} api api.sources core.pickled_names core.roots formats io.files io.probe io.source io.zip_read "
    "pickling pickling.guard pickling.load pickling.torch_calls array bisect struct zlib _pickle _compat_pickle"
)
WRITE = (
    f"{READ} api.reading api.writing cli.options cli.output cli.progress core.aliases formats.layout "
    "formats.torch_file io.leftovers io.output io.targets io.zip_write "
    "pickling.dump reports.document saving values values.blocks values.streams fcntl json mmap references"
)
SAFETENSORS = "core.aliases formats.safetensors formats.safetensors_file json"
TORCH = "formats.pytorch formats.pytorch.zip pickling.archives"
MERGE = "ops ops.filter ops.notes ops.rows ops.scales ops.segments ops.steps"
REFERENCES = "api.reading cli.options cli.progress references"
DIFF = "api.matching cli.diff cli.screens cli.screens.diff reports.wording ops ops.diff ops.notes"
INSPECT = f"{REFERENCES} cli.inspect cli.screens cli.screens.inspect ops ops.inspect ops.notes"
PARTIAL = (
    "partial partial.adapt partial.adapters partial.grids partial.handover partial.init partial.initplan "
    "partial.layers partial.plan partial.presets partial.resume partial.vocabulary values.adapt tempfile"
)
RULES = "ops ops.maps ops.notes ops.remap ops.rules ops.segments ops.steps"

ALLOWED: dict[str, tuple[list[object], str]] = {
    "--version": (["--version"], "cli"),
    "--help": (["--help"], f"{BEGIN} cli.terminal.help"),
    "inspect": (["inspect", FULL], f"{READ} {TORCH} {INSPECT}"),
    "inspect --json": (["inspect", FULL, "--json"], f"{READ} {TORCH} {INSPECT} json reports.document"),
    "inspect legacy": (
        ["inspect", FIXTURES / "resnet_legacy.pth"],
        f"{READ} {INSPECT} pickling.streams formats.pytorch formats.pytorch.legacy",
    ),
    "inspect safetensors": (["inspect", SAFE], f"{READ} {SAFETENSORS} {INSPECT}"),
    "diff": (
        ["diff", OLD, FULL],
        f"{READ} {TORCH} {REFERENCES} {DIFF}",
    ),
    "diff safetensors": (
        ["diff", SAFE, FULL],
        f"{READ} {TORCH} {SAFETENSORS} {REFERENCES} {DIFF}",
    ),
    "filter": (
        ["filter", "--match", FULL, OLD, "-o", "out.pth"],
        f"{WRITE} {TORCH} {MERGE} cli.filter cli.screens cli.screens.plans reports.gates reports.wording shlex",
    ),
    "convert": (
        ["convert", SAFE, "-o", "out.pth"],
        f"{WRITE} {TORCH} {SAFETENSORS} cli.convert ops ops.convert ops.notes ops.scales",
    ),
    "remap": (
        ["remap", OLD, "--add-prefix", "x.", "-o", "out.pth"],
        f"{WRITE} {TORCH} {RULES} cli.remap cli.screens cli.screens.remap",
    ),
    "load-partial": (
        ["load-partial", OLD, "--into", FULL, "-o", "out.pth"],
        f"{WRITE} {TORCH} {MERGE} {PARTIAL} api.loading cli.load_partial cli.screens cli.screens.plans "
        "reports.gates reports.wording",
    ),
}
"""Command lines, and what they may import: our modules without ``ckptool.``, and others with all that those import."""

COMMAND = "from ckptool.cli import main; assert main(sys.argv[1:]) == 0"

ASKED = """
import os, sys
for line in sys.stdin:
    if not os.fork():
        statements, sys.argv[1:] = eval(line)
        told = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        exec(statements)
        print(*sys.modules, file=told, flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
"""An interpreter that has just started, and runs the statements of each line in a fork."""


@pytest.fixture(scope="module")
def imported() -> Iterator[Callable[..., set[str]]]:
    """The names of all modules that there are behind some statements, Python's own start included."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", ASKED], text=True, **pipes) as asked:

        @functools.cache
        def ask(statements: str, *args: object) -> frozenset[str]:
            here = f"os.chdir({os.getcwd()!r}); {statements}", [*map(str, args)]
            print(here, file=asked.stdin, flush=True)
            found = frozenset(asked.stdout.readline().split())
            assert found, asked.stderr.read()
            return found

        yield ask
        asked.stdin.close()


@pytest.mark.parametrize("name", ALLOWED)
def test_a_command_imports_what_stands_here_and_nothing_else(name: str, imported: Callable[..., set[str]]) -> None:
    arguments, allowed = ALLOWED[name]
    package = Path(ckptool.__file__).parent
    places = {word: package / Path(*word.split(".")) for word in allowed.split()}
    ours = {word for word, place in places.items() if place.with_suffix(".py").exists() or place.is_dir()}
    begun = imported("import __future__, gc")
    others = {one for word in {*places} - ours for one in imported(f"import {word}")}
    others = {one for one in others if one.partition(".")[0] in sys.stdlib_module_names}
    found = {one for one in imported(COMMAND, *arguments) if one.partition(".")[0] not in FAMILIES}
    unexpected = found - begun - others - {"ckptool", *(f"ckptool.{word}" for word in ours)}
    assert not unexpected, f"{name} imports {', '.join(sorted(unexpected))}"
    assert "ckptool.cli" in found


def test_importing_the_library_imports_no_command_line() -> None:
    done = python("import sys, ckptool; print(*sys.modules)")
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert not imported & {"typer", "rich", "click", "torch", "numpy", "safetensors"}


def test_the_library_does_the_main_job_without_torch_or_numpy() -> None:
    code = """
import sys, ckptool
source, target = sys.argv[1:]
merged, report = ckptool.filter(source, match=target)
ckptool.save(merged, "out.pth")
assert report.counts == {"loaded": 102, "bookkeeping": 20}
assert ckptool.diff("out.pth", target).same
assert ckptool.inspect("out.pth").parameters
print(*sys.modules)
"""
    done = python(code, OLD, FULL)
    assert done.returncode == 0, done.stderr
    assert not {name.partition(".")[0] for name in done.stdout.split()} & {"torch", "numpy"}
    assert loads_safely(Path("out.pth"))


def test_comparing_values_needs_numpy_and_no_torch() -> None:
    done = python(BLOCKED % ["torch"], "diff", FIXTURES / "dtypes.pth", FIXTURES / "dtypes.safetensors", "--values")
    assert done.returncode == 1, done.stderr
    done = python(BLOCKED % ["torch"], "diff", OLD, FIXTURES / "resnet_new.pth", "--values")
    assert (done.returncode, done.stderr) == (1, "")


# --- where torch cannot be imported ----------------------------------------------------------------------------------


def without_torch(*calls: list[object]) -> None:
    """Runs command lines one behind the other, which must all succeed without a word of complaint."""
    each = "sys.exit([main(args) for args in eval(sys.argv[1])] != [0] * len(eval(sys.argv[1])))"
    code = (BLOCKED % ["torch"]).replace("sys.exit(main(sys.argv[1:]))", each)
    done = python(code, [[str(arg) for arg in args] for args in calls])
    assert (done.returncode, done.stderr) == (0, "")


def test_the_whole_flow_works_where_torch_cannot_be_imported() -> None:
    nested, legacy = FIXTURES / "resnet_nested.pth", FIXTURES / "resnet_legacy.pth"
    without_torch(
        ["inspect", nested, "--json"],
        ["filter", "--match", nested, legacy, "-o", "out.pth"],
        ["diff", "out.pth", legacy, "--values"],
        ["filter", "out.pth", "-o", "out.safetensors"],
        ["diff", "out.safetensors", "out.pth", "--values"],
    )
    old = torch.load(OLD)
    for name, tensor in torch.load("out.pth", weights_only=False)["model"].items():
        assert torch.equal(tensor, old[name])


def test_views_and_lazy_bits_are_gathered_without_torch() -> None:
    names = ("views.pth", "conj_neg.pth", "big_endian.pth")
    without_torch(*(["filter", FIXTURES / name, "-o", f"out-{name}"] for name in names))
    without_torch(*(["diff", FIXTURES / name, f"out-{name}", "--values"] for name in names))


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("ckptool: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_cast_says_in_one_line_that_torch_is_absent_and_writes_nothing() -> None:
    torch.save({"w": torch.ones(2)}, "source.pth")
    torch.save({"w": torch.ones(2).to(torch.float8_e4m3fn)}, "target.pth")
    done = python(BLOCKED % ["torch"], "filter", "--match", "target.pth", "source.pth", "-o", "out.pth", "--cast")
    assert "needs torch, which is not installed: pip install 'ckptool[torch]'" in one_line(done)
    assert sorted(path.name for path in Path().iterdir()) == ["source.pth", "target.pth"]
    again = python(BLOCKED % ["torch"], "filter", "--match", "target.pth", "source.pth", "-o", "out.pth")
    assert again.returncode == 0  # without --cast it is bytes


def test_casts_between_common_floats_need_no_torch() -> None:
    torch.save({"w": torch.tensor([1.0, 2.5, 3.0e38])}, "source.pth")
    done = python(BLOCKED % ["torch"], "convert", "source.pth", "-o", "out.pth", "--dtype", "bf16")
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.equal(torch.load("out.pth")["w"], torch.load("source.pth")["w"].bfloat16())


def test_making_real_tensors_says_in_one_line_that_torch_is_absent() -> None:
    call = "import ckptool; ckptool.open(sys.argv[1]).to_torch()"
    code = (BLOCKED % ["torch"]).replace("sys.exit(main(sys.argv[1:]))", call)
    done = python(code, OLD)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ckptool.errors.DependencyError: ")
    assert "making real tensors needs torch" in last


def test_nothing_of_a_mapping_is_imported_where_one_side_has_no_key_of_its_own() -> None:
    code = """
import sys, ckptool
less, _ = ckptool.filter(sys.argv[1], exclude=["fc.*"])
assert len(ckptool.diff(less, sys.argv[1]).only_in_b) == len(ckptool.diff(sys.argv[1], less).only_in_a) == 2
assert ckptool.diff(less, less).same
print(*sys.modules)
"""
    done = python(code, OLD)
    assert done.returncode == 0, done.stderr
    assert not [name for name in done.stdout.split() if name.startswith(("ckptool.mapping", "numpy"))]
