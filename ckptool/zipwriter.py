"""A zip archive byte for byte as torch's own writer makes it, in one pass.

Every record is stored, begins its payload on a multiple of 64 (an ``FB`` extra field pads the local header),
has zeros for sizes in front and a descriptor behind. With that layout torch can compute where each storage
lies without reading the headers (``.format_version`` 1), and can map the file.

    local header    30 bytes, name, [zip64 extra], 'FB' u16 padding, padding x 'Z'
    payload
    descriptor      PK\\7\\8, crc, packed, size: 16 bytes, 24 where 64-bit; none behind an empty payload

Source: miniz's writer as patched in torch 2.13 (``third_party/miniz``), ``inline_container.cc``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

from ckptool.files import Output

ALIGNMENT = 64
_FAR = 0xFFFFFFFF


class ZipWriter:
    """Writes records below ``root/``; `close` writes the directory."""

    def __init__(self, output: Output, root: str) -> None:
        self.output = output
        self.root = root
        self.entries: list[bytes] = []

    def add(self, name: str, data: bytes) -> None:
        """Writes a small record."""
        self.add_blocks(name, len(data), (data,), None)

    def add_blocks(self, name: str, nbytes: int, blocks: Iterable[bytes | memoryview], crc32: int | None) -> None:
        """Writes a record of exactly ``nbytes`` bytes; a known ``crc32`` saves computing it."""
        start = self.output.position
        full = f"{self.root}/{name}".encode()
        big, far = nbytes >= _FAR, start >= _FAR
        flags = 0x0808 if nbytes else 0x0800
        extra = b""
        if big or far:
            values = [nbytes, 0] * big + [start] * far
            extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)
        padding = -(start + 30 + len(full) + len(extra) + 4) % ALIGNMENT
        self.output.write(
            struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(full), len(extra) + 4 + padding)
            + full + extra + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        )  # fmt: skip
        begin = self.output.position
        computed = 0
        for block in blocks:
            if crc32 is None:
                computed = zlib.crc32(block, computed)
            self.output.write(block)
        if self.output.position - begin != nbytes:
            raise RuntimeError(f"{name} came to {self.output.position - begin} bytes, not {nbytes}")
        crc = computed if crc32 is None else crc32
        if nbytes:
            sizes = "QQ" if big or far else "II"
            self.output.write(struct.pack(f"<4sI{sizes}", b"PK\x07\x08", crc, nbytes, nbytes))
        wide = struct.pack(f"<{2 * big + far}Q", *([nbytes, nbytes] * big + [start] * far))
        if wide:
            wide = struct.pack("<HH", 1, len(wide)) + wide
        self.entries.append(
            struct.pack(
                "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 0, 0, flags, 0, 0, 0, crc,
                min(nbytes, _FAR), min(nbytes, _FAR), len(full), len(wide), 0, 0, 0, 0, min(start, _FAR),
            ) + full + wide
        )  # fmt: skip

    def close(self) -> None:
        """Writes the central directory and the end records, of which torch always writes the zip64 ones too."""
        start = self.output.position
        directory = b"".join(self.entries)
        count, size = len(self.entries), len(directory)
        self.output.write(
            directory
            + struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 798, 45, 0, 0, count, count, size, start)
            + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
            + struct.pack(
                "<4sHHHHIIH", b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF),
                min(size, _FAR), min(start, _FAR), 0,
            )
        )  # fmt: skip
