"""The names of files that stand for sets of weights, and those that a new set gets.

    model.safetensors                     a whole file         (STEM.safetensors; STEM.VARIANT.safetensors)
    model-00001-of-00002.safetensors      a shard              (STEM.VARIANT-00001-of-00002.safetensors)
    model.safetensors.index.json          their index          (STEM.safetensors.index.VARIANT.json)
    .metadata, __0_0.distcp               a distributed checkpoint

A set is known by its whole file or its index. ``.bin`` files have the same forms.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ckptool.core.dtypes import lookup
from ckptool.core.tensor import TensorInfo
from ckptool.errors import UsageError

INDEX = re.compile(r"(.+?)(?:\.(safetensors|bin)(?:\.([\w-]+))?)?\.index(?:\.([\w-]+))?\.json")
SHARD = re.compile(r"(.+)-(\d{1,9})-of-(\d{1,9})(\..+)")
WHOLE = re.compile(r"(model|pytorch_model|diffusion_pytorch_model|adapter_model)(?:\.([\w-]+))?\.(safetensors|bin)")

CONSOLIDATED = re.compile(r"consolidated[.-]")
"""How names of weights in Mistral's and Meta's own layout begin; Mistral's loader refuses two of them."""

LOADERS = {
    "model": "transformers", "pytorch_model": "transformers", "diffusion_pytorch_model": "diffusers",
    "adapter_model": "peft",
}  # fmt: skip
"""The loader that takes files of a stem, in the order in which several are tried."""

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")


class Set(NamedTuple):
    """A set of weights, known by the name of its index or whole file. ``kind``: safetensors, bin, or empty."""

    name: str
    stem: str
    variant: str
    kind: str
    is_index: bool

    @property
    def loader(self) -> str:
        """Returns the library that looks for this name; "" if none is known."""
        return LOADERS.get(self.stem, "")

    @property
    def rank(self) -> tuple[bool, bool, bool, str]:
        """Returns the order in which its loader tries names: no variant is taken unless asked for."""
        index_first = self.loader in ("diffusers", "") and self.kind == "safetensors"
        return self.variant != "", self.kind != "safetensors", self.is_index != index_first, self.name

    def owns(self, name: str) -> bool:
        """Returns whether a file is named as a part of this set."""
        shard = SHARD.fullmatch(name)
        bases = (self.stem, f"{self.stem}.{self.variant}")
        return name == self.name or bool(shard and shard[1] in bases and shard[4].endswith(self.kind or "\0"))

    def competes(self, names: Names) -> bool:
        """Returns whether a loader would look for both this set and one of those names, and take one of them."""
        if self.variant != names.variant:
            return False
        loaders = {names.loader, self.loader}
        return self.stem == names.stem or ("" not in loaders and (len(loaders) == 1 or "peft" not in loaders))


def parse(name: str) -> Set | None:
    """Returns the set that a file of this name stands for; None for a shard and all other files.

    >>> parse("model.safetensors.index.fp16.json")[1:]
    ('model', 'fp16', 'safetensors', True)
    """
    if SHARD.fullmatch(name):
        return None
    if found := WHOLE.fullmatch(name):
        return Set(name, found[1], found[2] or "", found[3], False)
    if found := INDEX.fullmatch(name):
        return Set(name, found[1], found[3] or found[4] or "", found[2] or "", True)
    return None


def sets_in(names: Iterable[str]) -> list[Set]:
    """Returns the sets that a directory with these names has."""
    return [found for name in names if (found := parse(name))]


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the files of a set that is written. ``kind``: safetensors or bin."""

    stem: str
    variant: str = ""
    kind: str = "safetensors"

    @classmethod
    def of(cls, name: str) -> Names:
        """Returns the names of the set to which a file of this name belongs, or would in safetensors."""
        if found := parse(name):
            return cls(found.stem, found.variant, found.kind or "safetensors")
        shard = SHARD.fullmatch(name)
        base = shard[1] if shard else os.path.splitext(name)[0]
        kind = "bin" if name.endswith(".bin") else "safetensors"
        whole = WHOLE.fullmatch(f"{base}.safetensors")
        return cls(whole[1], whole[2] or "", kind) if whole else cls(base, kind=kind)

    @property
    def base(self) -> str:
        """Returns the beginning of the names of the whole file and of each shard."""
        return f"{self.stem}.{self.variant}" if self.variant else self.stem

    @property
    def whole(self) -> str:
        """Returns the name of the only file of weights; there is no index then."""
        return f"{self.base}.{self.kind}"

    @property
    def index(self) -> str:
        """Returns the name of the index."""
        return f"{self.stem}.{self.kind}.index.{f'{self.variant}.' * bool(self.variant)}json"

    def shard(self, number: int, count: int) -> str:
        """Returns the name of a shard, counted from 1."""
        return f"{self.base}-{number:05d}-of-{count:05d}.{self.kind}"

    @property
    def loader(self) -> str:
        """Returns the library that looks for these names; "" if none is known."""
        return LOADERS.get(self.stem, "")

    def gives(self, name: str) -> bool:
        """Returns whether it is one of these names."""
        shard = SHARD.fullmatch(name)
        return name in (self.whole, self.index) or bool(shard and (shard[1], shard[4]) == (self.base, f".{self.kind}"))

    def are_of(self, found: Set) -> bool:
        """Returns whether these are the names of a set."""
        return (found.stem, found.variant, found.kind) == (self.stem, self.variant, self.kind)


METADATA = re.compile(r"\.metadata|__\d{1,9}\.metadata")
"""Names of the files that say what is where in a distributed checkpoint: one for all, or one of each process."""


SHARDED = re.compile(r"shard-(\d{5,9})-model-(\d{5,9})-of-(\d{5,9})\.safetensors")
"""Names of a distributed checkpoint's files in Hugging Face's layout: the process, the file's number, of how many."""


MERGED = ("common.pt", "meta.pt")
"""Files of values that are not sharded: Megatron-core's (dist_checkpointing) and Lightning's (FSDPStrategy)."""


class Distributed:
    """The names of the files of a distributed checkpoint."""

    index = ".metadata"
    loader = "torch.distributed.checkpoint"

    def gives(self, name: str) -> bool:
        """Returns whether it is one of these names."""
        return METADATA.fullmatch(name) is not None or re.fullmatch(r"__\d{1,9}_\d{1,9}\.distcp", name) is not None

    def are_of(self, found: Set) -> bool:
        """Returns whether these are the names of a set of weights."""
        return False


DCP = Distributed()


def beside_it(name: str) -> Callable[[str], object]:
    """Returns what tells the names of the distributed checkpoint that has a file of this name; none if it has none."""
    if SHARDED.fullmatch(name):
        return SHARDED.fullmatch
    return (lambda other: DCP.gives(other) or other in MERGED) if DCP.gives(name) else lambda _: False


def is_part(name: str) -> bool:
    """Returns whether a file of several that are written together may have this name."""
    return Names.of(name).gives(name) or DCP.gives(name)


STEMS = {"safetensors": "model", "bin": "pytorch_model"}
"""The stem that transformers looks for, by the kind of the files."""


def output_names(source: str, tensors: Mapping[str, TensorInfo], kind: str) -> Names:
    """Returns the names of a set made of a file called ``source``: of its family, else those of transformers.

    A variant that is a dtype which no tensor has any more is left out.
    """
    found = parse(source)
    if found is None:
        return Names(STEMS[kind], kind=kind)
    names = Names(STEMS[kind] if found.stem in STEMS.values() else found.stem, found.variant, kind)
    try:
        dtype = lookup(found.variant).name
    except UsageError:  # a variant such as non_ema
        return names
    return names if any(tensor.dtype == dtype for tensor in tensors.values()) else replace(names, variant="")


def named(text: str, kind: str) -> Names:
    """Returns the names that begin with a text. Raises: UsageError if no file's name can begin so."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}", text) or SHARD.fullmatch(f"{text}.x") or text.endswith(WEIGHTS):
        raise UsageError(f"--shard-name takes the beginning of the files' names, such as model, not {text!r}")
    return Names.of(f"{text}.{kind}")


def reader(name: str) -> str:
    """Returns who looks for a file of weights of this name.

    >>> reader("model.fp16.safetensors"), reader("consolidated.00.pth"), reader("x.pth")
    ('transformers, variant fp16', "Mistral's and Meta's own loaders", 'no loader by this name')
    """
    found = parse(name)
    if found and found.loader:
        return found.loader + f", variant {found.variant}" * bool(found.variant)
    if METADATA.fullmatch(name):
        return DCP.loader
    return "Mistral's and Meta's own loaders" if CONSOLIDATED.match(name) else "no loader by this name"
