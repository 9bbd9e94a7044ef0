"""What a directory of shards is called, what it replaces, and what comes along with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from oracles import Run
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.errors import OutputError

TENSORS = {"a.weight": torch.arange(8.0), "b.weight": torch.ones(8)}
SMALL = {"config.json": '{"hidden_size": 8}', "tokenizer.json": "{}", "tokenizer.model": "x", "LICENSE": "free"}


def sharded(
    stem: str, directory: str = "in", suffix: str = ".safetensors", variant: str = "", scale: float = 1.0
) -> Path:
    """Writes two shards and their index, as save_pretrained of transformers and diffusers names them."""
    os.makedirs(directory, exist_ok=True)
    base = f"{stem}.{variant}" if variant else stem
    names = [f"{base}-0000{number}-of-00002{suffix}" for number in (1, 2)]
    for name, (key, tensor) in zip(names, TENSORS.items(), strict=True):
        if suffix == ".safetensors":
            save_file({key: tensor * scale}, f"{directory}/{name}", {"format": "pt"})
        else:
            torch.save({key: tensor * scale}, f"{directory}/{name}")
    index = f"{stem}{suffix}.index.{variant}.json" if variant else f"{stem}{suffix}.index.json"
    Path(directory, index).write_text(
        json.dumps({"metadata": {}, "weight_map": dict(zip(TENSORS, names, strict=True))})
    )
    return Path(directory)


def loaded(directory: str, index: str) -> dict[str, torch.Tensor]:
    """Reads a set as loaders do: by its index, or where there is none its whole file."""
    if not os.path.exists(f"{directory}/{index}"):
        return load_file(f"{directory}/{index.replace('.index.json', '')}")
    weight_map = json.loads(Path(directory, index).read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for name in set(weight_map.values()):
        found |= load_file(f"{directory}/{name}")
    assert found.keys() == weight_map.keys()
    return found


def names(directory: str) -> list[str]:
    return sorted(os.listdir(directory))


def ok(run: Run, *args: str) -> str:
    code, out, err = run(*args)
    assert (code, err) == (0, ""), (args, err)
    return " ".join(out.split())


def set_of(base: str, count: int = 2) -> list[str]:
    """Returns the sorted names of a set of shards and its index."""
    shards = [f"{base}-0000{number}-of-0000{count}.safetensors" for number in range(1, count + 1)]
    return [*shards, f"{base}.safetensors.index.json"]


SPLIT = ("--to", "sharded", "--max-shard-size", "20")
FILES = {
    "filter": lambda source: ["filter", source],
    "filter --match": lambda source: ["filter", source, "--match", source],
    "remap": lambda source: ["remap", source, "--sub", "s/weight/weight/", "--allow-unused"],
    "convert": lambda source: ["convert", source],
    "load-partial": lambda source: ["load-partial", source, "--into", source],
}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize(
    ("stem", "suffix", "base"),
    [
        ("diffusion_pytorch_model", ".safetensors", "diffusion_pytorch_model"),
        ("diffusion_pytorch_model", ".bin", "diffusion_pytorch_model"),
        ("pytorch_model", ".bin", "model"), ("consolidated", ".safetensors", "consolidated"),
    ],
)  # fmt: skip
def test_shards_have_the_names_of_the_inputs_family(command: str, stem: str, suffix: str, base: str, run: Run) -> None:
    source = str(sharded(stem, suffix=suffix))
    for output in ("out", "other/"):
        ok(run, *FILES[command](source), "-o", output, *(SPLIT if output == "out" else SPLIT[2:]))
        assert names(output) == set_of(base)
        found = loaded(output, f"{base}.safetensors.index.json")
        assert {key: tensor.tolist() for key, tensor in found.items()} == {
            key: tensor.tolist() for key, tensor in TENSORS.items()
        }
        assert list(ckptool.open(output).state_dict()) == list(TENSORS)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "diffusion_pytorch_model.bin"])
def test_a_whole_file_keeps_its_familys_name_too(name: str, run: Run) -> None:
    os.mkdir("in")
    save_file(TENSORS, f"in/{name}") if name.endswith("safetensors") else torch.save(TENSORS, f"in/{name}")
    ok(run, "convert", f"in/{name}", "--to", "sharded", "-o", "out")
    assert names("out") == [f"{name.split('.')[0]}.safetensors"]


def test_a_variant_keeps_its_name_until_a_cast_belies_it(run: Run) -> None:
    sharded("diffusion_pytorch_model", variant="fp32")
    base = "diffusion_pytorch_model.fp32"
    ok(run, "filter", "in", "-o", "same", *SPLIT)
    assert names("same") == [*set_of(base)[:2], "diffusion_pytorch_model.safetensors.index.fp32.json"]
    assert list(ckptool.open("same").state_dict()) == list(TENSORS)
    ok(run, "convert", "in", "--dtype", "bf16", "-o", "cast", *SPLIT)
    assert names("cast") == set_of("diffusion_pytorch_model")
    sharded("model", "ema", variant="non_ema")
    ok(run, "convert", "ema", "--dtype", "bf16", "-o", "kept/", "--max-shard-size", "1MB")
    assert names("kept") == ["model.non_ema.safetensors"]


def test_the_name_can_be_chosen_and_a_wrong_one_is_refused(run: Run) -> None:
    torch.save(TENSORS, "x.pth")
    for name, files in (("unet", set_of("unet")), ("model.fp16", [*set_of("model.fp16")[:2],
                                                                  "model.safetensors.index.fp16.json"])):  # fmt: skip
        ok(run, "remap", "x.pth", "--add-prefix", "m.", "-o", name, "--shard-name", name, *SPLIT)
        assert names(name) == files
        assert len(ckptool.open(name).state_dict()) == 2
    for wrong in ("a/b", "../x", "", ".hidden", "x.safetensors", "x-00001-of-00002", "a b"):
        code, _, err = run("convert", "x.pth", "-o", "wrong/", "--shard-name", wrong)
        assert (code, "--shard-name" in err, os.path.exists("wrong")) == (2, True, False), wrong
    code, _, err = run("convert", "x.pth", "-o", "x.safetensors", "--shard-name", "unet")
    assert (code, "--to sharded" in err) == (2, True)


@pytest.mark.parametrize("command", FILES)
def test_a_directory_or_a_slash_as_output_means_shards(command: str, run: Run) -> None:
    torch.save(TENSORS, "x.pth")
    os.mkdir("there")
    for output in ("new/", "there", "./"):
        ok(run, *FILES[command]("x.pth"), "-o", output)
        assert load_file(f"{output}/model.safetensors").keys() == TENSORS.keys()
    code, _, err = run(*FILES[command]("x.pth"), "-o", "absent/new/")
    assert (code, "no such directory" in err) == (2, True)
    ckptool.save("x.pth", "api/")
    ckptool.convert("x.pth", "api2/", max_shard_size=20, shard_name="unet")
    assert (names("api"), names("api2")) == (["model.safetensors"], set_of("unet"))


# --- what is there already -------------------------------------------------------------------------------------------


def test_the_inputs_own_directory_is_refused_or_replaced_and_read_again(run: Run) -> None:
    base = "diffusion_pytorch_model"
    for more in (["--max-shard-size", "20"], ["--max-shard-size", "1MB"]):
        sharded(base)
        for option in ([], ["--force"]):
            before = names("in")
            code, _, err = run("convert", "in", "--to", "sharded", "--dtype", "bf16", "-o", "in", *more, *option)
            assert (code, "--force" in err or "--in-place" in err, names("in")) == (2, True, before)
        ok(run, "convert", "in", "--to", "sharded", "--dtype", "bf16", "-o", "in", *more, "--in-place")
        found = loaded("in", f"{base}.safetensors.index.json")
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        assert {row.dtype for row in ckptool.inspect("in").tensors} == {"bfloat16"}
        assert names("in") in (set_of(base), [f"{base}.safetensors"])
        for name in names("in"):
            os.remove(f"in/{name}")


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "adapter_model"])
def test_with_force_nothing_of_the_old_set_stays_beside_the_new_one(stem: str, run: Run) -> None:
    torch.save({"new": torch.ones(4), "more": torch.ones(4)}, "x.pth")
    sharded(stem, "out")
    (Path("out") / "config.json").write_text("{}")
    for size, files in (("1MB", [f"{stem}.safetensors"]), ("16", set_of(stem)), ("1MB", [f"{stem}.safetensors"])):
        args = ["convert", "x.pth", "-o", "out", "--shard-name", stem, "--max-shard-size", size]
        code, _, err = run(*args)
        assert (code, "--force" in err) == (2, True)
        assert "removed: " in ok(run, *args, "--force")
        assert names("out") == sorted(["config.json", *files])
        assert loaded("out", f"{stem}.safetensors.index.json").keys() == {"new", "more"}
        assert ckptool.open("out").state_dict().keys() == {"new", "more"}


def test_a_whole_file_is_split_in_place_and_put_together_again(run: Run) -> None:
    os.mkdir("in")
    save_file(TENSORS, "in/model.safetensors")
    ok(run, "convert", "in/model.safetensors", "-o", "in", *SPLIT, "--in-place")
    assert names("in") == set_of("model")
    ok(run, "remap", "in", "--add-prefix", "x.", "-o", "in", "--in-place")
    assert names("in") == ["model.safetensors"]
    assert load_file("in/model.safetensors").keys() == {"x.a.weight", "x.b.weight"}


def test_a_bin_set_is_replaced_in_place_by_safetensors(run: Run) -> None:
    sharded("pytorch_model", suffix=".bin")
    Path("in/training_args.bin").write_bytes(b"mine")
    ok(run, "convert", "in", "-o", "in", *SPLIT, "--in-place")
    assert names("in") == [*set_of("model"), "training_args.bin"]


@pytest.mark.parametrize("force", [[], ["--force"], ["--in-place"]])
@pytest.mark.parametrize(
    ("there", "stem"),
    [("pytorch_model.bin", "model"), ("diffusion_pytorch_model.safetensors", "model"),
     ("model.safetensors", "diffusion_pytorch_model"), ("diffusion_pytorch_model.bin", "diffusion_pytorch_model"),
     ("pytorch_model.bin.index.json", "model")],
)  # fmt: skip
def test_a_set_that_would_hide_or_be_hidden_is_refused(there: str, stem: str, force: list[str], run: Run) -> None:
    os.mkdir("out")
    Path("out", there).write_bytes(b"{}")
    torch.save(TENSORS, "x.pth")
    for more in ([], ["--dry-run"]):
        code, _, err = run("convert", "x.pth", "-o", "out", "--shard-name", stem, *force, *more)
        assert (code, there in err, names("out")) == (2, True, [there])


def test_what_no_loader_mixes_up_may_lie_beside_and_is_named_with_its_reader(run: Run) -> None:
    os.mkdir("out")
    beside = ["adapter_model.safetensors", "consolidated.00.pth", "model.fp16.safetensors", "optimizer.pt", "x.ckpt"]
    for name in beside:
        Path("out", name).write_bytes(b"mine")
    torch.save(TENSORS, "x.pth")
    for more in (["--dry-run"], []):
        assert (
            "transformers: model.safetensors is read; also there: adapter_model.safetensors (peft), "
            "consolidated.00.pth (Mistral's and Meta's own loaders), "
            "model.fp16.safetensors (transformers, variant fp16), x.ckpt (no loader by this name)"
        ) in ok(run, "convert", "x.pth", "-o", "out", *more)
    assert names("out") == sorted([*beside, "model.safetensors"])
    assert list(ckptool.open("out").state_dict()) == list(TENSORS)


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize(
    ("there", "name", "note"),
    [
        ("model.safetensors", "adapter_model",
         "peft: adapter_model.safetensors is read; also there: model.safetensors (transformers)"),
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.fp16",
         "diffusers, variant fp16: diffusion_pytorch_model.fp16.safetensors is read; also there: "
         "diffusion_pytorch_model.safetensors.index.json (diffusers)"),
        ("consolidated-00001-of-00002.safetensors", "model",
         "also there: consolidated-*-of-00002.safetensors (Mistral's and Meta's own loaders)"),
        ("model.safetensors", "consolidated",
         "Mistral's and Meta's own loaders: consolidated.safetensors is read; also there: model.safetensors (transf"),
    ],
)  # fmt: skip
def test_each_command_names_the_reader_of_a_set_beside_the_output(
    command: str, there: str, name: str, note: str, run: Run
) -> None:
    os.mkdir("out")
    Path("out", there).write_text("{}")
    torch.save(TENSORS, "x.pth")
    assert note in ok(run, *FILES[command]("x.pth"), "-o", "out", "--shard-name", name)
    assert load_file(f"out/{name}.safetensors").keys() == TENSORS.keys()


def test_the_inputs_own_file_and_what_is_replaced_are_not_named_as_beside(run: Run) -> None:
    torch.save(TENSORS, "x.pth")
    assert "also there" not in ok(run, "convert", "x.pth", "-o", "./")
    os.remove("model.safetensors")
    sharded("model")
    assert "also there" not in ok(run, "convert", "in", "-o", "in", *SPLIT, "--in-place")
    assert "also there" not in ok(run, "convert", "x.pth", "-o", "in", "--force")
    assert names("in") == ["model.safetensors"]


@pytest.mark.parametrize(
    ("there", "name", "note"),
    [
        ("model.safetensors.index.json", "model.safetensors", "transformers reads model.safetensors only"),
        ("model.safetensors", "pytorch_model.bin", "transformers reads model.safetensors only"),
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
         "diffusers reads diffusion_pytorch_model.safetensors.index.json only"),
        ("adapter_model.bin", "adapter_model.safetensors", "peft reads adapter_model.safetensors only"),
    ],
)  # fmt: skip
def test_a_file_beside_a_set_of_which_one_is_read_says_which(there: str, name: str, note: str, run: Run) -> None:
    os.mkdir("out")
    Path("out", there).write_text("{}")
    torch.save(TENSORS, "x.pth")
    for more in (["--dry-run"], []):
        assert f"beside {there}: {note}" in ok(run, "convert", "x.pth", "-o", f"out/{name}", *more)
    assert "beside" not in ok(run, "convert", "x.pth", "-o", "out/model.fp32.safetensors")


@pytest.mark.parametrize("there", ["consolidated.00.pth", "consolidated.safetensors.index.json", "consolidated.pth"])
def test_a_second_consolidated_set_is_refused(there: str, run: Run) -> None:
    os.mkdir("out")
    Path("out", there).write_text("{}")
    torch.save(TENSORS, "x.pth")
    for more in ([], ["--dry-run"]):
        code, _, err = run("convert", "x.pth", "-o", "out", "--shard-name", "consolidated", *more)
        assert (code, there in err, names("out")) == (2, True, [there])


@pytest.mark.parametrize("there", ["unet.safetensors", "unet-00001-of-00007.safetensors"])
def test_files_of_the_sets_own_names_are_replaced_by_force_only(there: str, run: Run) -> None:
    os.mkdir("out")
    Path("out", there).write_text("old")
    torch.save(TENSORS, "x.pth")
    args = ["convert", "x.pth", "-o", "out", "--shard-name", "unet", "--max-shard-size", "20"]
    code, _, err = run(*args)
    assert (code, f"{there}: exists already" in err, names("out")) == (2, True, [there])
    assert f"removed: {there}" in ok(run, *args, "--force")
    assert names("out") == set_of("unet")


def test_a_model_where_transformers_would_read_an_adapter_alone_is_refused(run: Run) -> None:
    source = str(sharded("model"))
    Path(source, "config.json").write_text("{}")
    os.mkdir("out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        Path("out", name).write_text("{}")
    code, _, err = run("convert", source, "-o", "out", *SPLIT)
    assert (code, "adapter_config.json without a config.json" in err) == (2, True)
    ok(run, "convert", source, "-o", "out", *SPLIT, "--with-files")  # then there is a config.json
    assert "adapter_model.safetensors (peft)" in ok(run, "convert", source, "-o", "out", *SPLIT, "--force")
    ok(run, "convert", source, "-o", "out", "--shard-name", "unet")


def test_no_name_of_a_hostile_index_is_removed(run: Run) -> None:
    os.mkdir("out")
    index = {"weight_map": {"a": "thesis.safetensors", "b": "../x.pth", "c": "config.json"}}
    torch.save(TENSORS, "x.pth")
    for weight_map in (index["weight_map"], {"a": "thesis.safetensors", "c": "config.json"}):
        Path("out/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for name in ("thesis.safetensors", "config.json"):
            Path("out", name).write_text("mine")
        ok(run, "convert", "x.pth", "-o", "out", "--force")
        assert names("out") == ["config.json", "model.safetensors", "thesis.safetensors"]
    assert os.path.exists("x.pth")


def test_a_failure_leaves_the_old_set_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptool.directories import place as module

    sharded("diffusion_pytorch_model")
    before = {name: Path("in", name).read_bytes() for name in names("in")}

    def fails(*_: object) -> None:
        raise OutputError("no")

    monkeypatch.setattr(module, "commit_set", fails)
    with pytest.raises(OutputError, match="no"):
        ckptool.convert("in", "in", to="sharded", dtype="bf16", in_place=True)
    assert {name: Path("in", name).read_bytes() for name in names("in")} == before


# --- small files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", FILES)
def test_small_files_are_named_or_copied(command: str, run: Run) -> None:
    source = str(sharded("model"))
    for name, text in {**SMALL, "trainer_state.json": "{}", ".cache.json": "{}"}.items():
        Path("in", name).write_text(text)
    Path("in/optimizer.pt").write_bytes(b"x")
    os.symlink("config.json", "in/generation_config.json")
    small = sorted([*SMALL, "generation_config.json"])
    for output in ("named", "named2/"):
        for more in (["--dry-run"], []):
            said = ok(run, *FILES[command](source), "-o", output, *SPLIT, *more)
            assert f"not copied (--with-files): {', '.join(small)}" in said
        assert names(output) == set_of("model")
    for more in (["--dry-run"], []):
        said = ok(run, *FILES[command](source), "-o", "copied", *SPLIT, "--with-files", *more)
        assert f"copied: {', '.join(small)}" in said
        assert os.path.exists("copied") == (not more)
    assert names("copied") == sorted([*set_of("model"), *small])
    for name in small:
        assert Path("copied", name).read_bytes() == Path("in", name).read_bytes()
    assert not os.path.islink("copied/generation_config.json")


def test_files_that_are_there_are_not_overwritten_without_force(run: Run) -> None:
    sharded("model")
    for directory, text in (("in", "theirs"), ("out", "mine")):
        os.makedirs(directory, exist_ok=True)
        Path(directory, "config.json").write_text(text)
        Path(directory, "vocab.txt").write_text("same")
    code, _, err = run("convert", "in", "-o", "out", "--with-files")
    assert (code, "config.json: exists already" in err, names("out")) == (2, True, ["config.json", "vocab.txt"])
    assert "note" not in ok(run, "convert", "in", "-o", "out")
    assert Path("out/config.json").read_text() == "mine"
    assert "copied: config.json" in ok(run, "convert", "in", "-o", "out", "--with-files", "--force")
    assert Path("out/config.json").read_text() == "theirs"


def test_of_a_file_in_any_directory_nothing_is_copied_or_named(run: Run) -> None:
    torch.save(TENSORS, "x.pth")
    Path("notes.txt").write_text("private")
    assert "note" not in ok(run, "convert", "x.pth", "-o", "out/", "--with-files")
    assert names("out") == ["model.safetensors"]
    code, _, err = run("convert", "x.pth", "-o", "x.safetensors", "--with-files")
    assert (code, "--to sharded" in err) == (2, True)


def test_in_place_small_files_stay_without_a_word(run: Run) -> None:
    sharded("model")
    Path("in/config.json").write_text("{}")
    for more in ([], ["--with-files"]):
        assert "config.json" not in ok(run, "convert", "in", "-o", "in", *SPLIT, "--in-place", *more)
    assert names("in") == ["config.json", *set_of("model")]
