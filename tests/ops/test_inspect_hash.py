"""`inspect --hash`: what is hashed, spelled out with hashlib; the same for the same content in any format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run, Saved, bits

import ckptool


def of(tensor: torch.Tensor) -> str:
    """The hash as the README has it, without ckptool."""
    name = str(tensor.dtype).removeprefix("torch.")
    head = f"{name}[{','.join(map(str, tensor.shape))}]\n".encode()
    return hashlib.sha256(head + bits(tensor.detach().resolve_conj().resolve_neg().contiguous())).hexdigest()


def whole(hashes: dict[str, str]) -> str:
    lines = [f"{hashes[key]}  {key}\n" for key in sorted(hashes)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hashed(path: Path | ckptool.Checkpoint, **options: Any) -> tuple[str | None, dict[str, str | None]]:
    report = ckptool.inspect(path, hashes=True, **options)
    return report.hash, {row.key: row.hash for row in report.tensors}


@pytest.mark.parametrize("name", ["views.pth", "big_endian.pth", "deflated.pth", "conj_neg.pth", "dtypes.pth",
                                  "tied.pth", "resnet_legacy.pth", "resnet_old.pth"])  # fmt: skip
def test_a_tensors_hash_is_of_its_dtype_shape_and_elements(name: str) -> None:
    loaded = torch.load(FIXTURES / name, weights_only=False)
    total, found = hashed(FIXTURES / name)
    expected = {key: of(loaded[key]) for key in found}
    assert found == expected
    assert total == whole(expected)


def test_the_shape_is_joined_with_commas_and_a_scalar_has_none(saved: Saved) -> None:
    path = saved({"m": torch.arange(6, dtype=torch.float32).reshape(2, 3), "s": torch.tensor(7)})
    raw = torch.arange(6, dtype=torch.float32).numpy().tobytes()
    found = hashed(path)[1]
    assert found["m"] == hashlib.sha256(b"float32[2,3]\n" + raw).hexdigest()
    assert found["s"] == hashlib.sha256(b"int64[]\n" + (7).to_bytes(8, "little")).hexdigest()


def test_no_format_changes_a_hash(tmp_path: Path) -> None:
    source = FIXTURES / "resnet_old.pth"
    expected = hashed(source)
    for name, to in (("a.safetensors", None), ("b.pth", "torch-legacy"), ("c", "sharded"), ("d.bin", None)):
        ckptool.convert(source, tmp_path / name, to=to)
        total, found = hashed(tmp_path / name)
        assert (total, found) == (expected[0], expected[1])
    assert hashed(FIXTURES / "resnet_legacy.pth")[0] == expected[0]


def test_the_order_of_keys_ties_and_strides_change_nothing(saved: Saved) -> None:
    weight = torch.randn(4, 6)
    one = saved({"a": weight, "b": weight, "c": torch.ones(2)}, "one.pth")
    other = saved({"c": torch.ones(2), "b": weight.clone(), "a": weight.t().contiguous().t()}, "other.pth")
    assert hashed(one) == hashed(other)


def test_anything_else_changes_the_hash(saved: Saved) -> None:
    base = {"a": torch.zeros(4, 6), "b": torch.ones(3)}
    seen = {hashed(saved(base))[0]}
    for changed in (
        {**base, "a": torch.zeros(6, 4)},
        {**base, "a": torch.zeros(4, 6).int()},
        {**base, "a": torch.zeros(4, 6).neg()},  # -0.0
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"]},
        {"b": base["a"], "a": base["b"]},
    ):
        seen.add(hashed(saved(changed))[0])
    assert len(seen) == 7


def test_keys_cannot_be_made_to_look_like_others(saved: Saved) -> None:
    one, other = torch.zeros(1), torch.ones(1)
    split = f"a\n{of(other)}  b"
    assert hashed(saved({"a": one, "b": other}))[0] != hashed(saved({split: one}))[0]
    assert hashed(saved({"a\\n": one}))[0] != hashed(saved({"a\n": one}))[0]
    assert hashed(saved({"a\n": one}))[0] == hashlib.sha256(f"{of(one)}  a\\n\n".encode()).hexdigest()


def test_tensors_made_of_parts_have_hashes_of_their_parts(saved: Saved) -> None:
    total, found = hashed(FIXTURES / "composite.pth")
    assert total is not None
    assert None not in found.values()
    data = torch.randint(-9, 9, (4,), dtype=torch.int8)
    digests = set()
    for scale, zero in ((0.5, 0), (0.25, 0), (0.5, 1)):
        made = torch._make_per_tensor_quantized_tensor(data, scale, zero)
        path = saved({"q": made})
        digests.add(hashed(path)[1]["q"])
    assert len(digests) == 3
    inner = hashlib.sha256(b"qint8[4]\n" + data.numpy().tobytes()).hexdigest()
    text = f"quantized qint8[4]\nper_tensor_affine 0.5 1\n{inner}\n"
    assert hashed(path)[1]["q"] == hashlib.sha256(text.encode()).hexdigest()


def test_where_the_tensors_of_a_sparse_one_are_the_same_so_is_its_hash(saved: Saved) -> None:
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    one = hashed(saved({"s": dense.to_sparse()}, "one.pth"))
    assert one == hashed(saved({"s": dense.to_sparse(), "x": 1}, "other.pth"))
    assert one != hashed(saved({"s": (dense * 2).to_sparse()}, "third.pth"))


def test_the_hash_is_of_the_chosen_keys(saved: Saved) -> None:
    path = saved({"a": torch.ones(3), "b": torch.zeros(3)})
    total, found = hashed(path, include=["a"])
    assert (total, found["b"]) == (whole({"a": of(torch.ones(3))}), None)


def test_a_remapped_checkpoint_is_hashed_as_it_would_be_written(tmp_path: Path) -> None:
    made, _ = ckptool.remap(FIXTURES / "resnet_old.pth", [{"transpose": "fc.weight"}, {"rename": "fc", "to": "head"}])
    ckptool.save(made, tmp_path / "a.pth")
    assert hashed(made) == hashed(tmp_path / "a.pth")


def test_text_and_json_show_the_same(run: Run) -> None:
    total, found = hashed(FIXTURES / "tied.pth")
    code, out, _ = run("inspect", FIXTURES / "tied.pth", "--hash")
    assert code == 0
    assert f"hash     {total}" in out
    assert all(f"{digest}\n" in out for digest in found.values())
    [result] = json.loads(run("inspect", FIXTURES / "tied.pth", "--hash", "--json")[1])["result"]
    assert result["hash"] == total
    assert {row["key"]: row["hash"] for row in result["tensors"]} == found
    both = run("inspect", FIXTURES / "tied.pth", "--hash", "--stats")[1]
    assert "abs max" in both
    assert str(found["twin"]) in both
