"""Which layers moved: --depth sums distances up below prefixes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from oracles import Run

import ckptool

Saved = Callable[..., Path]
Tensors = Mapping[str, torch.Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return tensor.reshape(-1).to(torch.complex128 if tensor.is_complex() else torch.float64)


def oracle(a: Tensors, b: Tensors, depth: int, behind: str = "") -> dict[str, tuple[float, float, float, float]]:
    """Returns {prefix: (max abs, relative L2, mean abs, cosine)}, by torch in float64, of finite tensors."""
    groups: dict[str, list[str]] = {}
    for key in a:
        if key in b and a[key].shape == b[key].shape:
            parts = key.removeprefix(behind).split(".")
            groups.setdefault(behind + ".".join(parts[:depth]), []).append(key)
    found = {}
    for prefix, keys in groups.items():
        one, other = (
            torch.cat(
                [
                    torch.view_as_real(wide(side[key]).to(torch.complex128)).reshape(-1)
                    if side[key].is_complex()
                    else wide(side[key])
                    for key in keys
                ]
            )
            for side in (a, b)
        )
        pairs = [(wide(a[key]) - wide(b[key])).abs() for key in keys]
        gap = torch.cat(pairs)
        cosine = torch.dot(one, other) / (one.norm() * other.norm())
        found[prefix] = (float(gap.max()), float((one - other).norm() / one.norm()), float(gap.mean()), float(cosine))
    return found


def rows_of(a: Any, b: Any, depth: int, **options: Any) -> dict[str, Any]:
    report = ckptool.diff(str(a), str(b), values=True, depth=depth, **options)
    assert report.prefixes is not None
    return {row.prefix: row for row in report.prefixes}


def assert_are(rows: Mapping[str, Any], expected: Mapping[str, tuple[float, float, float, float]]) -> None:
    assert list(rows) == list(expected)
    for prefix, numbers in expected.items():
        row = rows[prefix]
        found = (row.max_abs, row.rel_l2, row.mean_abs, row.cosine)
        assert found == pytest.approx(numbers, rel=2e-6, abs=1e-12), prefix


def a_model() -> dict[str, torch.Tensor]:
    return {
        "stem.weight": normal(8, 3, seed=1),
        "layer1.0.conv.weight": normal(300, 200, seed=2),  # large: compared in float32 pieces
        "layer1.0.bn.weight": normal(8, seed=3),
        "layer1.1.conv.weight": normal(300, 200, seed=4),
        "layer1.1.bn.weight": normal(8, seed=5),
        "layer2.0.conv.weight": normal(64, 64, seed=6, dtype=torch.float64),
        "layer2.0.steps": torch.tensor([5, -7, 2**40]),
        "layer2.0.mask": torch.tensor([True, False, True]),
        "layer2.0.wave": torch.complex(normal(4, seed=7), normal(4, seed=8)),
        "scale": normal(2, seed=9, dtype=torch.bfloat16),
    }


def moved(model: Tensors, *parts: str) -> dict[str, torch.Tensor]:
    return {
        key: tensor.clone() if not any(part in key for part in parts)
        else ~tensor if tensor.dtype == torch.bool
        else tensor + (tensor.abs().double().mean() / 8).to(tensor.dtype) + 1
        for key, tensor in model.items()
    }  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 9])
def test_the_numbers_below_each_prefix_are_those_of_torch_in_float64(depth: int, saved: Saved) -> None:
    a = a_model()
    b = moved(a, "layer1.0", "steps", "mask", "wave", "scale")
    rows = rows_of(saved(a, "a.pth"), saved(b, "b.pth"), depth)
    assert_are(rows, oracle(a, b, depth))
    assert sum(row.changed for row in rows.values()) == 6
    assert sum(row.tensors for row in rows.values()) == len(a)


def test_equal_tensors_count_in_the_denominator(saved: Saved) -> None:
    a = {
        "body": normal(3),
        "head.w": torch.tensor([3.0]),
        "head.big": normal(400, 400, seed=1),
        "head.ints": torch.tensor([4, 5]),
    }
    b = {**a, "head.w": torch.tensor([4.0])}
    rows = rows_of(saved(a, "a.pth"), saved(b, "b.pth"), 1)
    assert_are(rows, oracle(a, b, 1))
    norm = math.sqrt(9 + float(a["head.big"].double().norm()) ** 2 + 16 + 25)
    assert rows["head"].rel_l2 == pytest.approx(1 / norm)
    assert (rows["head"].changed, rows["head"].tensors) == (1, 3)


def test_what_did_not_move_has_a_distance_of_zero_and_a_cosine_of_one(saved: Saved) -> None:
    a = {"a.w": normal(3), "a.zero": torch.zeros(2), "zero.w": torch.zeros(3), "empty.w": torch.empty(0, 4)}
    rows = rows_of(saved(a, "a.pth"), saved({key: one.clone() for key, one in a.items()}, "b.pth"), 1)
    assert {(one.max_abs, one.rel_l2, one.mean_abs, one.cosine, one.changed) for one in rows.values()} == {
        (0.0, 0.0, 0.0, 1.0, 0)
    }


def test_prefixes_are_cut_as_inspect_cuts_them(saved: Saved, run: Run) -> None:
    a = {"model.a.0.w": normal(2), "model.a.1.w": normal(2), "model.b": normal(3), "model.c.w": normal(2)}
    path = str(saved(a, "a.pth"))
    b = str(saved({key: one + 1 for key, one in a.items()}, "b.pth"))
    for depth in ("1", "2", "3"):
        shown = run("inspect", path, "--depth", depth)[1].splitlines()
        at = shown.index("model.")
        names = ["model." + line.split()[0].removesuffix(".*") for line in shown[at + 1 :]]
        found = json.loads(run("diff", path, b, "--values", "--depth", depth, "--json")[1])["result"]["prefixes"]
        assert [row["prefix"] for row in found] == names
    rows = rows_of(path, b, 1, ignore=["*.b", "*.c.*"])  # what all others begin with
    assert list(rows) == ["model.a.0", "model.a.1"]


def test_keys_of_a_wrapped_model_are_spelled_as_in_a(saved: Saved) -> None:
    a = {f"module.layer{at}.w": normal(2, seed=at) for at in range(2)}
    b = {key.removeprefix("module."): one + 1 for key, one in a.items()}
    assert list(rows_of(saved(a, "a.pth"), saved(b, "b.pth"), 1)) == ["module.layer0", "module.layer1"]
    assert list(rows_of(saved(b, "b.pth"), saved(a, "a.pth"), 1)) == ["layer0", "layer1"]


def test_other_dtypes_and_quantised_tensors_are_compared_by_their_values(saved: Saved) -> None:
    a = a_model() | {"q.w": normal(4, 5)}
    quantised = torch.quantize_per_tensor(a["q.w"], 0.05, 0, torch.qint8)
    b = {key: one.to(torch.bfloat16) if one.dtype == torch.float32 else one for key, one in a.items()}
    b["q.w"] = quantised
    rows = rows_of(saved(a, "a.pth"), saved(b, "b.pth"), 1)
    assert_are(rows, oracle(a, b, 1))
    c = {"q.w": quantised, "q.v": a["q.w"] * 2, "body": torch.ones(2)}
    a = {**c, "q.v": a["q.w"]}
    assert_are(rows_of(saved(a, "a.pth"), saved(c, "b.pth"), 1), oracle(a, c, 1))


def test_other_shapes_are_counted_and_measured_nowhere(saved: Saved, run: Run) -> None:
    a = {"fc.weight": normal(6, 4), "fc.bias": normal(6), "body.weight": normal(3, 3), "gone.w": normal(2)}
    b = {"fc.weight": normal(9, 4), "fc.bias": a["fc.bias"] + 1, "body.weight": a["body.weight"], "new.w": normal(3)}
    paths = str(saved(a, "a.pth")), str(saved(b, "b.pth"))
    rows = rows_of(*paths, 1)
    assert_are(rows, oracle(a, b, 1))
    assert [(row.tensors, row.changed, row.unmeasured) for row in rows.values()] == [(2, 1, 1), (1, 0, 0)]
    lines = [line.split() for line in run("diff", *paths, "--values", "--depth", "1")[1].splitlines()]
    assert lines[1][:2] == ["shape", "fc.weight"]
    assert " ".join(lines[4][-10:]) == "1 of 2 tensors, 1 of them without a distance"
    assert ["equal", "1", "prefix"] in lines
    rows = rows_of(saved({"fc.weight": a["fc.weight"]}, "a.pth"), saved({"fc.weight": b["fc.weight"]}, "b.pth"), 1)
    assert (rows["fc"].rel_l2, rows["fc"].unmeasured) == (None, 1)
    assert "unmeasured  fc: 1 of 1 tensor without a distance" in run("diff", *paths, "--values", "--depth", "1")[1]


def test_nan_and_infinity_on_one_side_leave_a_prefix_without_numbers_and_first(saved: Saved, run: Run) -> None:
    nan, inf = math.nan, math.inf
    a = {
        "a.w": torch.tensor([1.0, nan]),
        "b.w": torch.tensor([1.0, 2.0]),
        "b.v": normal(3),
        "c.w": torch.tensor([inf, 1.0]),
    }
    b = {
        "a.w": torch.tensor([2.0, nan]),
        "b.w": torch.tensor([1.0, inf]),
        "b.v": a["b.v"] + 9,
        "c.w": torch.tensor([inf, 1.0]),
    }
    paths = str(saved(a, "a.pth")), str(saved(b, "b.pth"))
    rows = rows_of(*paths, 1)
    assert (rows["a"].max_abs, rows["a"].rel_l2, rows["a"].mean_abs) == (1.0, 1.0, 0.5)  # NaN equals NaN
    assert {rows["b"].max_abs, rows["b"].rel_l2, rows["b"].mean_abs, rows["b"].cosine} == {None}
    assert (rows["c"].changed, rows["c"].rel_l2) == (0, 0.0)
    out = run("diff", *paths, "--values", "--depth", "1", "--sort", "rel-l2")[1]
    assert [line.split()[1] for line in out.splitlines() if "differs" in line] == ["b", "a"]
    assert "max abs not finite" in out


def test_a_prefix_that_was_zero_has_no_relative_distance(saved: Saved, run: Run) -> None:
    paths = (
        str(saved({"a.w": torch.zeros(2), "a.v": torch.zeros(2), "b": torch.ones(1)}, "a.pth")),
        str(saved({"a.w": torch.ones(2), "a.v": torch.zeros(2), "b": torch.ones(1)}, "b.pth")),
    )
    row = rows_of(*paths, 1)["a"]
    assert (row.max_abs, row.rel_l2, row.mean_abs, row.cosine) == (1.0, None, 0.5, None)
    assert "undefined (A is zero)" in run("diff", *paths, "--values", "--depth", "1")[1]


def test_tied_tensors_count_once_below_a_prefix(saved: Saved) -> None:
    one, other = normal(3, 4, seed=1), normal(3, 4, seed=2)
    a = {"lm.embed.w": one, "lm.head.w": one, "lm.norm.w": torch.ones(4), "out.w": one}
    b = {"lm.embed.w": other, "lm.head.w": other, "lm.norm.w": torch.ones(4), "out.w": other}
    rows = rows_of(saved(a, "a.pth"), saved(b, "b.pth"), 1)
    once = {key: value for key, value in a.items() if key != "lm.head.w"}
    assert_are(rows, oracle(once, b, 1))
    assert [(row.tensors, row.changed) for row in rows.values()] == [(3, 2), (1, 1)]
    untied = {key: value.clone() for key, value in b.items()} | {"lm.head.w": other * 3}
    assert_are(rows_of(saved(a, "a.pth"), saved(untied, "c.pth"), 1), oracle(a, untied, 1))


def test_close_values_are_close_below_a_prefix_too(saved: Saved, run: Run) -> None:
    a = {"a.w": normal(4), "b.w": normal(4), "b.v": normal(4)}
    b = {"a.w": a["a.w"] * (1 + 1e-6), "b.w": a["b.w"] + 1, "b.v": a["b.v"] * (1 + 1e-6)}
    paths = str(saved(a, "a.pth")), str(saved(b, "b.pth"))
    assert [(row.status, row.changed, row.close) for row in rows_of(*paths, 1).values()] == [
        ("close", 0, 1),
        ("differ", 1, 1),
    ]
    lines = run("diff", *paths, "--values", "--depth", "1")[1].splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["close", "a"], ["differs", "b"]]
    assert lines[2].endswith("1 of 2 tensors, 1 close")


def test_shards_and_a_file_have_the_same_distances(saved: Saved, tmp_path: Path) -> None:
    a, b = a_model(), moved(a_model(), "layer1")
    directory = tmp_path / "shards"
    directory.mkdir()
    names = list(b)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        safetensors.torch.save_file({key: b[key] for key in part}, directory / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_are(rows_of(saved(a, "a.pth"), directory, 2), oracle(a, b, 2))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("rel-l2", ["far", "turned", "near"]), ("max-abs", ["far", "turned", "near"]),
        ("cosine", ["turned", "near", "far"]), ("key", ["far", "near", "turned"]),
    ],
)  # fmt: skip
def test_sort_and_top_are_of_the_prefixes(order: str, expected: list[str], saved: Saved, run: Run) -> None:
    a = {f"{name}.{at}": torch.tensor([1.0, 2.0]) for name in ("near", "turned", "far") for at in range(2)}
    by = {"near": torch.tensor([1.5, 2.0]), "turned": torch.tensor([2.0, -1.0]), "far": torch.tensor([8.0, 16.0])}
    b = {key: by[key.partition(".")[0]] for key in a}
    paths = str(saved(a, "a.pth")), str(saved(b, "b.pth"))
    found = json.loads(run("diff", *paths, "--values", "--depth", "1", "--sort", order, "--json")[1])["result"]
    assert [row["prefix"] for row in found["prefixes"]] == expected
    assert len(found["values"]) == 6
    lines = run("diff", *paths, "--values", "--depth", "1", "--sort", order, "--top", "2")[1].splitlines()
    assert [line.split()[1] for line in lines if "differs" in line] == expected[:2]
    assert lines[-1].split()[:3] == ["more", "1", "prefix"]


def test_every_form_shows_the_prefixes(saved: Saved, run: Run) -> None:
    a = {f"layer{at}.{name}": normal(3, seed=at) for at in range(3) for name in ("w", "b")}
    b = {key: one + (key == "layer1.w") for key, one in a.items()}
    paths = str(saved(a, "a.pth")), str(saved(b, "b.pth"))
    for form in ("markdown", "github", "junit", "sarif"):
        out = run("diff", *paths, "--values", "--depth", "1", "--format", form)[1]
        assert "1 of 2 tensors" in out, form
        assert "layer1.w" not in out, form


def test_planned_changes_are_counted_below_their_prefix(saved: Saved, run: Run, tmp_path: Path) -> None:
    a = {"fc.w": normal(2), "body.w": normal(3), "body.v": normal(3)}
    b = {key: one + 1 for key, one in a.items()}
    plan = tmp_path / "plan.toml"
    plan.write_text('[[allow]]\nkind = "values"\nkey = "fc.*"\n[[allow]]\nkind = "values"\nkey = "body.v"\n')
    given = ("diff", str(saved(a, "a.pth")), str(saved(b, "b.pth")), "--values", "--depth", "1", "--allow", str(plan))
    code, out, _ = run(*given)
    lines = out.splitlines()
    assert code == 1
    assert (lines[1].split()[:2], lines[2].split()[:3]) == (["differs", "body"], ["allowed", "differs", "fc"])
    assert lines[1].endswith("2 of 2 tensors, 1 allowed")
    rows = json.loads(run(*given, "--json")[1])["result"]["prefixes"]
    assert [row["allowed"] for row in rows] == [1, 1]


def test_counters_are_in_the_sums_and_a_note_says_how_to_leave_them_out(saved: Saved) -> None:
    a = torch.nn.BatchNorm1d(3).state_dict()
    b = {key: one + 1 for key, one in a.items()}
    paths = (
        saved({f"bn.{key}": one for key, one in a.items()}, "a.pth"),
        saved({f"bn.{key}": one for key, one in b.items()}, "b.pth"),
    )
    report = ckptool.diff(*map(str, paths), values=True, depth=1)
    assert any("num_batches_tracked" in note for note in report.notes)
    report = ckptool.diff(*map(str, paths), values=True, depth=1, ignore="*num_batches_tracked")
    assert not any("num_batches_tracked" in note for note in report.notes)


def test_many_keys_of_few_modules_are_few_rows(saved: Saved) -> None:
    a = {f"blocks.{at // 10}.m{at % 10}": torch.tensor([float(at)]) for at in range(2000)}
    b = {key: one if at % 2 else one + 1 for at, (key, one) in enumerate(a.items())}
    rows = rows_of(saved(a, "a.pth"), saved(b, "b.pth"), 1)
    assert (len(rows), {row.tensors for row in rows.values()}) == (200, {10})
    assert {row.changed for row in rows.values()} == {5}


@pytest.mark.parametrize("given", [["--depth", "1"], ["--depth", "1", "--quick"], ["--depth", "0", "--values"]])
def test_without_values_there_is_nothing_to_sum_up(given: list[str], saved: Saved, run: Run) -> None:
    path = str(saved({"w": normal(2)}, "a.pth"))
    code, out, err = run("diff", path, path, *given)
    assert (code, out) == (2, "")
    assert "--depth" in err


@pytest.mark.parametrize("depth", [0, -1, True, 1.5, "2"])
def test_a_depth_that_is_none_is_refused(depth: Any, saved: Saved) -> None:
    path = str(saved({"w": normal(2)}, "a.pth"))
    with pytest.raises(ckptool.UsageError, match="depth is a whole number from 1 on"):
        ckptool.diff(path, path, values=True, depth=depth)
    with pytest.raises(ckptool.UsageError, match="values=True"):
        ckptool.diff(path, path, depth=1)


def test_without_depth_the_report_has_no_prefixes(saved: Saved, run: Run) -> None:
    path = str(saved({"w": normal(2)}, "a.pth"))
    assert "prefixes" not in json.loads(run("diff", path, path, "--values", "--json")[1])["result"]
