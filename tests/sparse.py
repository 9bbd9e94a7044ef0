"""Checkpoints of many gigabytes that take a few kilobytes of disk: every tensor is zeros that were never written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Span, Storage, TensorInfo
from ckptool.formats import safetensors
from ckptool.formats.pytorch import zip as torch_zip

ZEROS = bytes(1 << 24)


class SparseOutput:
    """Takes what `outputs.Output` takes, and seeks where it is handed `ZEROS`."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.position = 0

    def reserve(self, nbytes: int) -> None:
        pass

    def write(self, data: bytes | memoryview) -> None:
        self.position += len(data)
        if data is ZEROS:
            self.file.seek(self.position)
        else:
            self.file.write(data)

    def clones(self, file: object) -> bool:
        return False

    def copy(self, files: ZeroFiles, span: Span) -> None:
        for block in files.blocks(span):
            self.write(block)

    def close(self) -> None:
        self.file.truncate(self.position)
        self.file.close()


class ZeroFiles:
    """Stands in for `files.Files`: every span reads as zeros."""

    def get(self, span: Span) -> None:
        return None

    def locate(self, span: Span) -> Span:
        return span

    def blocks(self, span: Span, offset: int = 0, nbytes: int | None = None) -> Iterator[bytes]:
        left = span.nbytes - offset if nbytes is None else nbytes
        while left >= len(ZEROS):
            yield ZEROS
            left -= len(ZEROS)
        if left:
            yield bytes(left)


def write_sparse(path: Path, sizes: Mapping[str, int]) -> Path:
    """Writes {key: elements} as float32 zeros, in the format of the suffix; returns the path.

    The zip's checksums are made up: nothing that reads headers, and no torch.load, looks at them.
    """
    tree = {
        key: TensorInfo("float32", (numel,), (1,), 0, Storage(Span("", 0, 4 * numel), "float32", crc32=1))
        for key, numel in sizes.items()
    }
    writer: Any = safetensors if path.suffix == ".safetensors" else torch_zip
    output = SparseOutput(path)
    writer.write(Checkpoint(tree), output, ZeroFiles())
    output.close()
    return path
