"""What the conversion scripts that transformers 4.46 ships need to run on tagged tensors: no files, no downloads, no other library."""

import importlib
import sys
from collections.abc import Iterable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch

State = dict[str, torch.Tensor]
Row = tuple[str, tuple[int, ...]]


class _Absent(MetaPathFinder, Loader):
    """Makes a stand-in of a library that a script imports and does not need here."""

    names = ("flax", "t5x", "gdown", "flatdict", "nemo", "torchaudio", "datasets", "pytorch_lightning", "audiocraft", "jax", "models",
             "accelerate", "tensorflow", "fairseq", "sentencepiece", "omegaconf", "mmcv", "dac", "clip", "lavis", "yaml")  # fmt: skip

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = mock.MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def script(room: str, name: str) -> Any:
    """A conversion script of transformers."""
    finder = _Absent()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(f"transformers.models.{room}.{name}")
    finally:
        sys.meta_path.remove(finder)


class Caught(Exception):
    """Ends a script where it has made the new state."""


def caught(call: Any, model: type, loads: Any = None) -> State:
    """The state that a script gives to a model's load_state_dict; what it reads with torch.load is given."""
    got: State = {}

    def catch(self: object, state: State, *_: object, **__: object) -> None:
        got.update(state)
        raise Caught

    with mock.patch.object(model, "load_state_dict", catch), mock.patch("torch.load", loads or torch.load):
        try:
            call()
        except Caught:
            return got
    raise AssertionError("no state was loaded")


def renamed(module: Any, state: State, keys: Iterable[tuple[str, str]]) -> State:
    """Renames in place, by the script's own function."""
    for old, new in keys:
        module.rename_key(state, old, new)
    return state


def made(rows: Iterable[Row]) -> State:
    """A state of zeros of these shapes, in this order."""
    return {key: torch.zeros(shape) for key, shape in rows}


def linear(name: str, out: int, into: int, bias: bool = True) -> Iterator[Row]:
    """weight and bias"""
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def norm(name: str, size: int) -> Iterator[Row]:
    """weight and bias"""
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def conv(name: str, out: int, into: int, *kernel: int, bias: bool = True) -> Iterator[Row]:
    """weight and bias"""
    yield f"{name}.weight", (out, into, *kernel)
    if bias:
        yield f"{name}.bias", (out,)


def weight_norm(name: str, *shape: int, bias: bool = True) -> Iterator[Row]:
    """bias, weight_g, weight_v: the order of torch's weight_norm"""
    if bias:
        yield f"{name}.bias", (shape[0],)
    yield f"{name}.weight_g", (shape[0], *(1 for _ in shape[1:]))
    yield f"{name}.weight_v", shape
