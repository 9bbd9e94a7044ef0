"""What ckptool is measured against: what a user would pick today, as scripts of a few lines, and the limits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Other(NamedTuple):
    """Something to measure against: its name in the table, the packages it needs, its command, whether it writes."""

    name: str
    needs: tuple[str, ...]
    command: list[str]
    writes: bool = False


def python(name: str, code: str, *arguments: Path | str, needs: Sequence[str] = ("torch",)) -> Other:
    """A script as a process of its own; the arguments are the sources and then the output."""
    return Other(name, tuple(needs), [sys.executable, "-c", code, *map(str, arguments)])


def system(name: str, *command: object) -> Other:
    """A program that every system has."""
    return Other(name, (), [str(part) for part in command])


def copy(source: Path, output: Path, *flags: str, sync: bool = True) -> Other:
    """The limit of a job that writes: a copy that is on disk when it ends, as ckptool's is."""
    script = f'cp {" ".join(flags)} "$0" "$1"' + (' && sync "$1"' if sync else "")
    name = " ".join(["cp", *flags, *(["+ sync"] if sync else [])])
    return system(name, "sh", "-c", script, source, output)._replace(writes=True)


PASS = python("python -c pass", "pass", needs=())

LIST_TORCH = """
import sys, torch
for key, tensor in torch.load(sys.argv[1], mmap=True, weights_only=True).items():
    print(key, tensor.dtype, tuple(tensor.shape))
"""
LIST_SAFETENSORS = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "numpy") as file:
    for key in file.keys():
        view = file.get_slice(key)
        print(key, view.get_dtype(), view.get_shape())
"""
DIFF_TORCH = """
import sys, torch
a, b = (torch.load(name, mmap=True, weights_only=True) for name in sys.argv[1:3])
print(a.keys() == b.keys(), [key for key in a if a[key].shape != b[key].shape or a[key].dtype != b[key].dtype])
"""
EQUAL_TORCH = """
import sys, torch
a, b = (torch.load(name, mmap=True, weights_only=True) for name in sys.argv[1:3])
print(all(torch.equal(a[key], b[key]) for key in a))
"""
APART_TORCH = """
import sys, torch
a, b = (torch.load(name, mmap=True, weights_only=True) for name in sys.argv[1:3])
for key in a:
    one, gap = a[key].float(), a[key].float() - b[key].float()
    print(key, gap.abs().max().item(), (gap.norm() / one.norm()).item())
"""
STATS_TORCH = """
import sys, torch
for key, tensor in torch.load(sys.argv[1], mmap=True, weights_only=True).items():
    x = tensor.float()
    print(key, x.mean(), x.std(), x.min(), x.max(), (x == 0).sum(), x.isnan().sum(), x.isinf().sum())
"""
CAST_TORCH = """
import sys, torch
from safetensors.torch import load_file, save_file
dtype = getattr(torch, sys.argv[3])
save_file({key: tensor.to(dtype) for key, tensor in load_file(sys.argv[1]).items()}, sys.argv[2])
"""
SAVE_TORCH = """
import sys, torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1]), sys.argv[2])
"""
RENAME_TORCH = """
import sys, torch
state = torch.load(sys.argv[1], mmap=True, weights_only=True)
torch.save({"model." + key: tensor for key, tensor in state.items()}, sys.argv[2])
"""
RENAME_SAFETENSORS = """
import sys
from safetensors.torch import load_file, save_file
save_file({"model." + key: tensor for key, tensor in load_file(sys.argv[1]).items()}, sys.argv[2])
"""
FILTER_TORCH = """
import sys, torch
source, target = (torch.load(name, mmap=True, weights_only=True) for name in sys.argv[1:3])
target.update({k: v for k, v in source.items() if k in target and v.shape == target[k].shape})
torch.save(target, sys.argv[3])
"""
CONVERT_TORCH = """
import sys, torch
from safetensors.torch import save_file
save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])
"""

LIST_WHOLE = LIST_TORCH.replace("mmap=True, weights_only=True", "weights_only=False").replace(
    ".items()", ".state_dict().items()"
)
LIST_META = LIST_TORCH.replace("mmap=True", 'map_location="meta"')
LIST_LEGACY = LIST_TORCH.replace("mmap=True, ", "")
CONVERT_MMAP = CONVERT_TORCH.replace("weights_only", "mmap=True, weights_only")
CLOSE_TORCH = EQUAL_TORCH.replace("torch.equal", "torch.allclose")
