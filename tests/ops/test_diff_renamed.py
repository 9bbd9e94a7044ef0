"""Renames, of `diff` with values: a tensor under another name is one, and not only in A and only in B."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from oracles import Run

import ckptool


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1000 + sum(shape)))


def renamed(a: Any, b: Any, **options: Any) -> list[tuple[str, str]]:
    report = ckptool.diff(a, b, renames="values", **{"values": True, **options})
    found = [(row.a, row.b) for row in report.renamed]
    assert all(row.key == row.a for row in report.renamed)
    assert not {*report.only_in_a} & {one for one, _ in found}
    assert not {*report.only_in_b} & {other for _, other in found}
    return found


A = {"conv1.weight": random(8, 3, 3, 3), "bn1.weight": torch.ones(8), "bn1.bias": torch.zeros(8),
     "layer1.0.fc.weight": random(8, 8), "layer1.0.fc.bias": torch.zeros(8), "head.weight": random(4, 8)}  # fmt: skip


def test_keys_of_the_same_values_are_renamed() -> None:
    b = {f"stem.{key}" if key < "g" else key.replace("layer1", "stage.1"): one.clone() for key, one in A.items()}
    assert renamed(A, b) == [(key, f"stem.{key}" if key < "g" else key.replace("layer1", "stage.1"))
                             for key in A if key != "head.weight"]  # fmt: skip
    assert renamed(A, b, values=False, quick=True) == renamed(A, b)


def test_another_shape_dtype_or_value_is_no_rename() -> None:
    b = {"a": A["conv1.weight"].flatten(1), "b": A["head.weight"].double(), "c": A["layer1.0.fc.weight"].T.contiguous(),
         "d": -A["head.weight"]}  # fmt: skip
    assert renamed(A, b) == []


def test_tensors_of_one_value_follow_their_module_and_stay_alone_without() -> None:
    b = {"gone.scale": torch.ones(8), "x.0.fc.weight": A["layer1.0.fc.weight"], "x.0.fc.bias": torch.zeros(8)}
    assert renamed(A, b) == [("layer1.0.fc.weight", "x.0.fc.weight"), ("layer1.0.fc.bias", "x.0.fc.bias")]


def test_copies_of_equal_values_are_told_apart_by_their_modules() -> None:
    block = random(6, 6)
    a = {f"l.{n}.{k}": one for n in range(3) for k, one in (("w", block.clone()), ("own", random(5, 5, seed=n + 1)))}
    b = {key.replace("l.", "m.h."): one for key, one in reversed(a.items())}
    assert renamed(a, b) == [(key, key.replace("l.", "m.h.")) for key in a]
    alone = {"p.w": block.clone(), "q.w": block.clone()}
    assert renamed({"l.0.w": block, "l.1.w": block.clone()}, alone) == []


def test_renames_are_said_and_fail_where_they_are_asked_for(saved: Callable[..., Any], run: Run) -> None:
    one = saved(A, "a.pth")
    other = saved({key.replace("layer1", "stage1"): tensor for key, tensor in A.items()}, "b.pth")
    code, out, _ = run("diff", one, other, "--values")
    assert code == 1
    assert "differ: 2 renamed; 4 equal" in out
    assert "layer1.0.fc.weight" in out
    assert "is stage1.0.fc.weight in B" in out
    assert run("diff", one, other, "--values", "--fail-on", "only-in-a,values")[0] == 0
    assert run("diff", one, other, "--values", "--fail-on", "renamed")[0] == 1
    assert run("diff", one, other, "--fail-on", "renamed", "--renames", "off")[0] == 0
    result = json.loads(run("diff", one, other, "--values", "--json")[1])["result"]
    key = "layer1.0.fc.weight"
    assert result["renamed"][0] == {"key": key, "a": key, "b": "stage1.0.fc.weight", "by": "values", "confidence": 1.0,
                                    "witnesses": ["values"]}  # fmt: skip
    assert (result["only_in_a"], result["only_in_b"], result["fails"]) == ([], [], ["renamed"])


def test_a_planned_rename_is_allowed() -> None:
    b = {key.replace("layer1", "stage1"): tensor for key, tensor in A.items()}
    allow = {"allow": [{"kind": "renamed", "key": "layer1.*", "b": "stage1.0.fc.weight", "reason": "stages"}]}
    report = ckptool.diff(A, b, values=True, allow=allow)
    assert [(row.key, row.reason) for row in report.allowed] == [("layer1.0.fc.weight", "stages")]
    assert report.fails == ["renamed"]  # the bias is not
