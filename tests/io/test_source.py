"""The protocol of sources: whatever can be read at any offset is a checkpoint's file."""

from __future__ import annotations

import ast
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, bits

import ckptool.formats
from ckptool.errors import FormatError
from ckptool.formats import safetensors
from ckptool.formats.pytorch import legacy as torch_legacy
from ckptool.formats.pytorch import zip as torch_zip
from ckptool.io.files import Files
from ckptool.io.probe import Probe
from ckptool.io.source import LocalFile, Source, Spool
from ckptool.values import blocks as data
from ckptool.values.blocks import read_bytes

PACKAGE = Path(ckptool.formats.__file__).parents[1]


class Memory(Source):
    """A source that is no file: all that one has to write."""

    def __init__(self, path: str, content: bytes) -> None:
        self.path, self.size, self.version = path, len(content), None
        self.content = content
        self.reads = 0

    def read(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or offset + nbytes > self.size:
            raise FormatError("outside", self.path)
        self.reads += nbytes
        return self.content[offset : offset + nbytes]


@pytest.mark.parametrize("name", ["resnet_new.pth", "views.pth", "conj_neg.pth", "deflated.pth", "resnet_legacy.pth"])
@pytest.mark.parametrize("held", [data.READ_WHOLE, 0])
def test_tensors_are_read_from_whatever_is_a_source(name: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "READ_WHOLE", held)  # 0: views are gathered from a map, which a source need not have
    source = Memory("memory://" + name, (FIXTURES / name).read_bytes())
    opened = (torch_legacy if "legacy" in name else torch_zip).read(Probe(source.path, lambda _: source))
    loaded = torch.load(FIXTURES / name)
    with Files(opener={source.path: source}.__getitem__) as files:
        for key, tensor in opened.state_dict().items():
            assert read_bytes(tensor, files) == bits(loaded[key]), key


def test_headers_are_all_that_opening_reads() -> None:
    content = (FIXTURES / "resnet_old.safetensors").read_bytes()
    source = Memory("memory://x", content)
    probe = Probe(source.path, lambda _: source)
    assert safetensors.matches(probe)
    safetensors.read(probe)
    assert source.reads < int.from_bytes(content[:8], "little") + 600


def test_a_spool_gives_back_what_went_in() -> None:
    with Spool([b"abc", memoryview(b"defg"), b""]) as spool:
        assert (spool.size, spool.read(2, 3)) == (7, b"cde")
        mapped = spool.map(1, 5)
        assert mapped is not None
        assert bytes(mapped) == b"bcdef"
        assert [bytes(block) for block in spool.blocks(1, 6, bytearray(4))] == [b"bcde", b"fg"]


def test_a_spool_of_what_cannot_be_read_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[bytes]:
        yield b"abc"
        raise FormatError("cut off")

    made = tempfile.TemporaryFile()  # noqa: SIM115 - the spool closes it
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: made)
    with pytest.raises(FormatError, match="cut off"):
        Spool(broken())
    assert made.closed


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 70_000])
def test_a_map_is_the_range_itself(offset: int, tmp_path: Path) -> None:
    content = bytes(number % 251 for number in range(80_000))
    (tmp_path / "f").write_bytes(content)
    with LocalFile(str(tmp_path / "f")) as file:
        mapped = file.map(offset, 9000)
        assert mapped is not None
        assert bytes(mapped) == content[offset : offset + 9000]


def _descriptors(text: str) -> list[str]:
    """What a file does with file descriptors and memory maps of its own."""
    found: list[str] = []
    if not re.search(r"\.fd\b|mmap|\bos\.(open|p?read)", text):  # parsing takes long
        return found
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and (
            node.attr == "fd" or ast.unparse(node) in ("os.open", "os.pread", "os.preadv", "os.read", "mmap.mmap")
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "mmap" in ast.unparse(node):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_only_io_holds_file_descriptors() -> None:
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "io" and (lines := _descriptors(path.read_text()))
    }
    assert len(found.pop("cli/render.py")) == 1  # what stands in for an output whose reader has gone
    assert found == {}


@pytest.mark.parametrize(
    "text", ["file.fd", "import mmap", "import os\nos.open(path, 0)", "from mmap import mmap", "os.pread(3, 1, 0)"]
)
def test_the_rule_can_be_broken(text: str) -> None:
    assert _descriptors(text)
