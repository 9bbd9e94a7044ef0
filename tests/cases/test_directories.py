"""Which set of weights is read of a directory that holds several, and what is said about the others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.errors import IncompleteError

INDEX = "model.safetensors.index.json"
Shards = Mapping[str, Mapping[str, torch.Tensor]]


def filled(number: float, *keys: str) -> dict[str, torch.Tensor]:
    return {key: torch.full((4,), float(number)) for key in keys}


def made(files: Shards, directory: str = "d") -> Path:
    """Writes files of tensors: safetensors or torch's, by their suffixes."""
    os.makedirs(directory, exist_ok=True)
    for name, tensors in files.items():
        if name.endswith(".safetensors"):
            save_file(dict(tensors), f"{directory}/{name}", {"format": "pt"})
        else:
            torch.save(dict(tensors), f"{directory}/{name}")
    return Path(directory)


def indexed(shards: Shards, name: str = INDEX, directory: str = "d", **weight_map: str) -> Path:
    """Writes shards and their index, which names each key's shard, or that of ``weight_map``."""
    path = made(shards, directory)
    entries = {key: shard for shard, tensors in shards.items() for key in tensors} | weight_map
    (path / name).write_text(json.dumps({"metadata": {}, "weight_map": entries}))
    return path


def two(stem: str, suffix: str, *keys: str) -> Shards:
    """Two shards, a key in each."""
    return {f"{stem}-0000{number}-of-00002{suffix}": filled(number, key) for number, key in enumerate(keys, 1)}


def keys_of(path: str | Path) -> list[str]:
    return list(ckptool.open(path).state_dict())


def converted(run: Run, directory: str = "d", *more: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Returns what `convert` makes of a directory, and its notes."""
    code, out, err = run("convert", directory, "-o", "out.safetensors", "--force", "--json", *more)
    assert code == 0, err
    return load_file("out.safetensors"), json.loads(out)["notes"]


def others(notes: list[str]) -> set[str]:
    """Returns the names that the notes list as not read."""
    found = [note.split("not read: ")[1] for note in notes if "not read: " in note]
    return {name for names in found for name in names.split(", ")}


# --- the loader's rule -----------------------------------------------------------------------------------------------


def test_of_two_indexes_the_one_that_transformers_takes_is_read(run: Run) -> None:
    indexed(two("model", ".safetensors", "model.embed_tokens.weight", "lm_head.weight"))
    consolidated = two("consolidated", ".safetensors", "tok_embeddings.weight", "output.weight")
    indexed(consolidated, "consolidated.safetensors.index.json")
    code, out, err = run("inspect", "d", "--keys")
    assert (code, out) == (0, "model.embed_tokens.weight\nlm_head.weight\n")
    assert "consolidated.safetensors.index.json" in err
    found, notes = converted(run)
    assert found.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert others(notes) == {"consolidated.safetensors.index.json"}
    assert keys_of("d/consolidated.safetensors.index.json") == ["tok_embeddings.weight", "output.weight"]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
        (["diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin"),
        (["model.safetensors", "consolidated.safetensors"], "model.safetensors"),
        (["model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin"], "model.safetensors"),
        (["adapter_model.safetensors", "model.safetensors"], "model.safetensors"),
        (["adapter_model.bin", "adapter_model.safetensors"], "adapter_model.safetensors"),
        (["pytorch_model.bin", "consolidated.00.pth"], "pytorch_model.bin"),
        (["model.safetensors", "mtp.safetensors"], "model.safetensors"),
    ],
)
def test_of_several_whole_files_the_loaders_is_read_and_the_rest_named(names: list[str], read: str, run: Run) -> None:
    made({name: filled(1, name) for name in names})
    found, notes = converted(run)
    assert list(found) == [read]
    assert others(notes) == {*names} - {read}
    for command in (["inspect", "d"], ["filter", "d", "-o", "o.pth"], ["diff", "d", "d"],
                    ["remap", "d", "--add-prefix", "x.", "-o", "o.safetensors"],
                    ["load-partial", "d", "--into", "out.safetensors", "--dry-run"]):  # fmt: skip
        out = run(*command)[1]
        assert all(name in out for name in names), command


def test_what_a_trainer_leaves_beside_the_weights_is_no_other_set(run: Run) -> None:
    names = ["optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"]
    made({"model.safetensors": filled(1, "a"), **{name: {} for name in names}})
    assert others(converted(run)[1]) == set()


def test_a_variant_alone_is_read_and_of_two_variants_none(run: Run) -> None:
    shards = {"model.fp16-00001-of-00001.safetensors": filled(1, "a")}
    indexed(shards, "model.safetensors.index.fp16.json")
    assert keys_of("d") == ["a"]
    made({"model.bf16.safetensors": filled(2, "a")})
    code, _, err = run("inspect", "d")
    assert (code, "name one of" in err, "model.bf16.safetensors" in err) == (2, True, True)


def test_diffusers_looks_for_an_index_first_and_transformers_for_a_whole_file(run: Run) -> None:
    for stem, first in (("diffusion_pytorch_model", "index"), ("model", "whole")):
        indexed(two(stem, ".safetensors", "index", "second"), f"{stem}.safetensors.index.json", stem)
        made({f"{stem}.safetensors": filled(3, "whole")}, stem)
        found, notes = converted(run, stem)
        assert first in found
        assert len(others(notes)) == 1


@pytest.mark.parametrize(
    ("config", "read"),
    [
        ({"_class_name": "UNet", "_diffusers_version": "0.3"}, "b"),
        ({"model_type": "llama"}, "a"),
        (None, None),
        ([], None),
    ],
)
def test_sets_of_two_libraries_are_told_apart_by_the_config(config: Any, read: str | None, run: Run) -> None:
    made({"model.safetensors": filled(1, "a"), "diffusion_pytorch_model.safetensors": filled(2, "b")})
    if config is not None:
        Path("d/config.json").write_text(json.dumps(config))
    if read is not None:
        assert keys_of("d") == [read]
    else:
        code, _, err = run("convert", "d", "-o", "o.pth")
        assert (code, "name one of them" in err) == (2, True)


def test_safetensors_shards_come_before_bin_shards_and_both_are_named(run: Run) -> None:
    indexed(two("model", ".safetensors", "a", "b"))
    indexed(two("pytorch_model", ".bin", "x", "y"), "pytorch_model.bin.index.json")
    found, notes = converted(run)
    assert found.keys() == {"a", "b"}
    assert others(notes) == {"pytorch_model.bin.index.json"}


def test_of_indexes_that_no_loader_looks_for_one_must_be_named(run: Run) -> None:
    indexed(two("one", ".safetensors", "a", "b"), "one.safetensors.index.json")
    assert keys_of("d") == ["a", "b"]
    indexed(two("two", ".safetensors", "c", "d"), "two.safetensors.index.json")
    assert "name one of them" in run("inspect", "d")[2]
    assert keys_of("d/two.safetensors.index.json") == ["c", "d"]


# --- an index that goes on where a whole file ends -------------------------------------------------------------------


@pytest.mark.parametrize("second", ["mtp.safetensors", "model-00002-of-00002.safetensors"])
def test_an_index_that_names_the_whole_file_and_others_is_followed(second: str, run: Run) -> None:
    indexed({"model.safetensors": filled(1, "a"), second: filled(2, "b")})
    found, notes = converted(run)
    assert found.keys() == {"a", "b"}
    assert others(notes) == set()


def test_an_index_that_does_not_name_the_whole_file_is_not_followed_and_named(run: Run) -> None:
    indexed(two("model", ".safetensors", "old", "older"))
    made({"model.safetensors": filled(3, "new")})
    found, notes = converted(run)
    assert found.keys() == {"new"}
    assert others(notes) == {INDEX}


def test_shards_of_an_earlier_set_that_the_index_does_not_name_are_named(run: Run) -> None:
    indexed(two("model", ".safetensors", "a", "b"))
    made({"model-00003-of-00007.safetensors": filled(3, "old")})
    assert others(converted(run)[1]) == {"model-*-of-00007.safetensors"}


# --- shards and index that contradict each other ---------------------------------------------------------------------


def test_an_extra_tensor_in_a_shard_is_said_by_every_command(run: Run) -> None:
    indexed({"m1.safetensors": filled(1, "a", "stale.experts.0"), "m2.safetensors": filled(2, "b")})
    index = json.loads(Path("d", INDEX).read_text())
    del index["weight_map"]["stale.experts.0"]
    Path("d", INDEX).write_text(json.dumps(index))
    said = "in a shard and not in the index: stale.experts.0"
    for command in (["inspect", "d"], ["convert", "d", "-o", "o.pth"], ["filter", "d", "-o", "f.pth"],
                    ["filter", "d", "--match", "o.pth", "-o", "m.pth"], ["diff", "d", "o.pth"],
                    ["remap", "d", "--add-prefix", "x.", "-o", "r.pth"],
                    ["remap", "d", "--add-prefix", "x.", "--dry-run"],
                    ["load-partial", "d", "--into", "o.pth", "-o", "l.pth"]):  # fmt: skip
        for more in ([], ["--json", *(["--force"] if "-o" in command else [])]):
            code, out, err = run(*command, *more)
            assert (code, said in " ".join(out.split())) == (0, True), (command, more, out, err)
    assert any(said in note for note in ckptool.save("d", "s.pth").notes)


def test_an_overlay_shard_counts_where_the_index_names_it(run: Run) -> None:
    base = filled(1, "layers.0.w", "emb")
    overlay = {"model-overlay-00001.safetensors": filled(7, "layers.0.w")}
    indexed({"model-00001-of-00001.safetensors": base, **overlay})
    found, notes = converted(run)
    assert found["layers.0.w"].tolist() == [7.0] * 4
    assert found["emb"].tolist() == [1.0] * 4
    assert any("layers.0.w (model-overlay-00001.safetensors, not model-00001-of-00001" in note for note in notes)
    (row,) = (row for row in ckptool.inspect("d", stats=True).tensors if row.key == "layers.0.w")
    assert row.stats is not None
    assert row.stats.mean == 7.0
    assert run("diff", "d", "out.safetensors", "--values")[0] == 0


@pytest.mark.parametrize("first", [True, False])
def test_of_a_base_that_comes_last_or_first_the_index_decides(first: bool, run: Run) -> None:
    names = ["z.bin", "a.bin"] if first else ["a.bin", "z.bin"]
    indexed({names[0]: filled(1, "w", "b"), names[1]: filled(2, "w")}, "pytorch_model.bin.index.json", w=names[1])
    assert converted(run)[0]["w"].tolist() == [2.0] * 4
    indexed({names[0]: filled(1, "w", "b"), names[1]: filled(2, "w")}, "pytorch_model.bin.index.json", w=names[0])
    assert converted(run)[0]["w"].tolist() == [1.0] * 4


def test_three_copies_are_said_and_one_that_the_index_does_not_settle_is_refused(run: Run) -> None:
    shards = {f"m{number}.safetensors": filled(number, "w", f"k{number}") for number in (1, 2, 3)}
    indexed(shards, w="m2.safetensors")
    found, notes = converted(run)
    assert found["w"].tolist() == [2.0] * 4
    assert any("w (m2.safetensors, not m1.safetensors, m3.safetensors)" in note for note in notes)
    index = json.loads(Path("d", INDEX).read_text())
    del index["weight_map"]["w"]
    Path("d", INDEX).write_text(json.dumps(index))
    code, out, _ = run("convert", "d", "-o", "o.pth", "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (2, "incomplete")


# --- what is missing -------------------------------------------------------------------------------------------------

EVERY = [["inspect", "d"], ["inspect", "d", "--check"], ["convert", "d", "-o", "o.pth"], ["filter", "d", "-o", "o.pth"],
         ["filter", "whole.pth", "--match", "d", "-o", "o.pth"], ["diff", "d", "whole.pth"],
         ["remap", "d", "--add-prefix", "x.", "-o", "o.pth"],
         ["load-partial", "d", "--into", "whole.pth", "-o", "o.pth"],
         ["load-partial", "whole.pth", "--into", "d", "-o", "o.pth"]]  # fmt: skip


def incomplete(run: Run, commands: list[list[str]], *words: str) -> None:
    torch.save(filled(1, "a"), "whole.pth")
    for command in commands:
        code, out, err = run(*command, "--json")
        error = json.loads(out)["error"]
        assert (code, error["kind"]) == (2, "incomplete"), (command, error)
        assert all(word in error["message"] for word in words), error
        assert len(err.splitlines()) == 1


def test_absent_shards_are_one_error_on_every_command_that_names_the_other_set(run: Run) -> None:
    indexed(two("pytorch_model", ".bin", "a", "b"), "pytorch_model.bin.index.json")
    indexed({}, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    incomplete(run, EVERY, "model-00001-of-00002.safetensors", "pytorch_model.bin.index.json")


def test_shards_that_are_links_to_nowhere_are_missing(run: Run) -> None:
    for name in two("model", ".safetensors", "a", "b"):
        made({})
        os.symlink(f"../blobs/{name}", f"d/{name}")
    indexed({}, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    incomplete(run, EVERY, "links to nowhere", "model-00002-of-00002.safetensors")


def half(directory: str = "d") -> str:
    """Writes two shards and their index, removes the second, and returns its name."""
    indexed(two("model", ".safetensors", "a", "b"), directory=directory)
    os.remove(f"{directory}/model-00002-of-00002.safetensors")
    return "model-00002-of-00002.safetensors"


LOOKS = [["inspect", "d", *more] for more in ([], ["--flat"], ["--depth", "1"], ["--stats"], ["--root", ""],
                                              ["--include", "a"], ["--check", "--fail-on", "nan,acting"])]  # fmt: skip


def test_one_shard_that_is_absent_or_a_link_to_nowhere_is_incomplete_on_every_command(run: Run) -> None:
    name = half()
    for _ in range(2):
        hashes = [["inspect", "d", "--hash"], ["inspect", "d", "--hash", "--check"]]
        incomplete(run, [*LOOKS, *hashes, *EVERY[2:]], f"missing shards: {name}, and in them b")
        for command in LOOKS:
            code, out, err = run(*command)
            assert (code, name in err, len(err.splitlines())) == (2, True, 1), command
            assert ("1 tensor" in out, "missing shards" in out) == (True, True), (command, out)
            (row,) = json.loads(run(*command, "--json")[1])["result"]
            assert [tensor["key"] for tensor in row["tensors"]] == ["a"]
        assert run("inspect", "d", "--keys")[:2] == (2, "a\n")
        for command in hashes:
            assert run(*command)[:2] == (2, "")
        if not os.path.islink(f"d/{name}"):
            os.symlink("nowhere", f"d/{name}")


def test_a_check_reports_missing_shards_as_damage(run: Run) -> None:
    half()
    for more in ([], ["--fail-on", "index"], ["--stats"]):
        code, out, err = run("inspect", "d", "--check", *more)
        assert (code, "index" in out, "error" in err) == (1, True, False)
        document = json.loads(run("inspect", "d", "--check", "--json", *more)[1])
        assert [finding["kind"] for finding in document["result"][0]["check"]["findings"]] == ["index"]
        assert "error" not in document


def test_of_several_inputs_half_a_set_stops_no_other(run: Run) -> None:
    half()
    made({"w.safetensors": filled(1, "w")}, "e")
    code, out, err = run("inspect", "d", "e", "absent", "--json")
    document = json.loads(out)
    assert (code, len(err.splitlines())) == (2, 2)
    assert [len(report["tensors"]) for report in document["result"]] == [1, 1]
    assert [error["kind"] for error in document["errors"]] == ["incomplete", "unreadable"]
    assert document["error"] == document["errors"][0]
    assert run("inspect", "d", "e", "--check")[0] == 1


def test_tensors_that_no_shard_has_and_copies_that_no_index_settles_are_incomplete_too(run: Run) -> None:
    indexed(two("model", ".safetensors", "a", "b"), c="model-00001-of-00002.safetensors")
    incomplete(run, [*LOOKS, ["inspect", "d", "--hash"], *EVERY[2:]], "in the index and in no shard: c")
    assert run("inspect", "d", "--check")[0] == 1


def test_the_library_shows_half_a_set_and_does_not_hash_or_save_it() -> None:
    half()
    report = ckptool.inspect("d", stats=True)
    assert ([row.key for row in report.tensors], len(report.problems)) == (["a"], 1)
    for call in (lambda: ckptool.inspect("d", hashes=True), lambda: ckptool.save("d", "o.pth"),
                 lambda: ckptool.open("d").to_torch(), lambda: ckptool.diff("d", "d")):  # fmt: skip
        with pytest.raises(IncompleteError, match="missing shards"):
            call()


@pytest.mark.parametrize(
    ("link", "there"),
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("model.safetensors", INDEX),
        (INDEX, "pytorch_model.bin"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ("model.safetensors", "model.fp16.safetensors"),
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("adapter_model.safetensors", "adapter_model.bin"),
        ("model.safetensors", "adapter_model.safetensors"),
    ],
)
def test_a_link_to_nowhere_that_the_loader_takes_first_is_incomplete(link: str, there: str, run: Run) -> None:
    made({})
    os.symlink("../blobs/abc", f"d/{link}")
    incomplete(run, EVERY, f"links to nowhere: {link}")
    if there.endswith("json"):
        suffix = ".bin" if ".bin" in there else ".safetensors"
        indexed(two(there.split(".")[0], suffix, "a", "b"), there)
    else:
        made({there: filled(1, "a")})
    incomplete(run, EVERY, f"links to nowhere: {link}", "name the file to read")
    assert "a" in keys_of(f"d/{there}")


@pytest.mark.parametrize(
    ("link", "there"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        (INDEX, "model.safetensors"),
        ("model.fp16.safetensors", "model.safetensors"),
        ("adapter_model.bin", "model.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        ("diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model.bin"),
        ("consolidated.00.pth", "model.safetensors"),
    ],
)
def test_a_link_to_nowhere_that_no_loader_would_take_is_a_note(link: str, there: str, run: Run) -> None:
    if there.endswith("json"):
        indexed(two("diffusion_pytorch_model", ".safetensors", "a", "b"), there)
    else:
        made({there: filled(1, "a")})
    os.symlink("../blobs/abc", f"d/{link}")
    found, notes = converted(run)
    assert "a" in found
    assert notes == [f"links to nowhere: {link}"]


def test_links_to_nowhere_of_names_that_no_loader_knows_are_incomplete(run: Run) -> None:
    made({})
    os.symlink("../blobs/abc", "d/weights.pth")
    incomplete(run, EVERY, "links to nowhere: weights.pth")
    for number in (1, 2):
        name = f"w-0000{number}-of-00002.safetensors"
        made({name: filled(1, "a")}, "e") if number == 1 else os.symlink("gone", f"e/{name}")
    incomplete(run, [["inspect", "e"], ["convert", "e", "-o", "o.pth"]], "links to nowhere: w-00002-of-00002")


def test_the_file_that_a_config_of_transformers_names_is_read(run: Run) -> None:
    made({"model.safetensors": filled(1, "a"), "hf.safetensors": filled(2, "b")})
    Path("d/config.json").write_text(json.dumps({"model_type": "llama", "transformers_weights": "hf.safetensors"}))
    found, notes = converted(run)
    assert (found.keys(), others(notes)) == ({"b"}, {"model.safetensors"})
    os.rename("d/hf.safetensors", "d/other.safetensors")
    incomplete(run, EVERY, "'hf.safetensors'", "not there")
    Path("d/config.json").write_text(json.dumps({"transformers_weights": "model.safetensors.index.json"}))
    indexed(two("model", ".safetensors", "x", "y"))
    assert converted(run)[0].keys() == {"x", "y"}
    Path("d/config.json").write_text(json.dumps({"transformers_weights": 3}))
    assert converted(run)[0].keys() == {"a"}


def test_a_shard_of_which_the_others_were_read_is_named_itself(run: Run) -> None:
    shards = two("model", ".safetensors", "a", "b")
    indexed(dict(list(shards.items())[:1]))
    made(shards)
    assert others(converted(run)[1]) == {"model-00002-of-00002.safetensors"}
    made({f"model-0000{number}-of-00003.safetensors": filled(number, "c") for number in (1, 2, 3)})
    assert others(converted(run)[1]) == {"model-00002-of-00002.safetensors", "model-*-of-00003.safetensors"}


def test_shards_without_an_index_are_not_taken_for_a_whole(run: Run) -> None:
    shards = two("model", ".safetensors", "a", "b")
    made(dict(list(shards.items())[:1]))
    incomplete(run, EVERY, "1-of-00002", "number 2 is missing")
    made(shards)
    code, _, err = run("inspect", "d")
    assert (code, "2 files of weights and no index" in err, "joins" in err) == (2, True, True)
    assert run("filter", *(f"d/{name}" for name in shards), "-o", "o.safetensors")[0] == 0
    assert load_file("o.safetensors").keys() == {"a", "b"}


def test_a_cache_of_links_to_blobs_is_read(run: Run) -> None:
    shards = two("model", ".safetensors", "a", "b")
    indexed(shards, directory="blobs")
    os.makedirs("snapshots/abc")
    for name in (*shards, INDEX):
        os.rename(f"blobs/{name}", f"blobs/{abs(hash(name))}")
        os.symlink(f"../../blobs/{abs(hash(name))}", f"snapshots/abc/{name}")
    for path in ("snapshots/abc", f"snapshots/abc/{INDEX}", f"./snapshots/../snapshots/abc/{INDEX}"):
        found, notes = converted(run, path)
        assert found.keys() == {"a", "b"}
        assert notes == []


# --- other tools' directories ----------------------------------------------------------------------------------------


def test_a_trainers_directory_with_deepspeed_beside_is_read(run: Run) -> None:
    made({"model.safetensors": filled(1, "a")}, "checkpoint-500")
    os.makedirs("checkpoint-500/global_step500")
    for name, text in (("config.json", "{}"), ("latest", "global_step500"), ("zero_to_fp32.py", "")):
        Path("checkpoint-500", name).write_text(text)
    code, out, _ = run("inspect", "checkpoint-500")
    assert (code, "DeepSpeed" in out, "1 tensor" in out) == (0, True, True)
    found, notes = converted(run, "checkpoint-500")
    assert found.keys() == {"a"}
    assert any("DeepSpeed" in note for note in notes)


def test_shards_and_adapters_beside_deepspeed_are_read_and_a_file_that_only_has_its_name_is_refused(run: Run) -> None:
    indexed(two("model", ".safetensors", "a", "b"))
    Path("d/latest").write_text("global_step1")
    assert keys_of("d") == ["a", "b"]
    made({"adapter_model.safetensors": filled(1, "lora")}, "e")
    Path("e/zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"x")
    assert keys_of("e") == ["lora"]
    made({"mp_rank_00_model_states.pt": filled(1, "a")}, "f")
    Path("f/latest").write_text("global_step1")
    code, out, _ = run("inspect", "f", "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (2, "damaged")


# --- hostile indexes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors", "model.safetensors/x"]
)
def test_an_index_beside_a_whole_file_cannot_name_files_elsewhere(name: str, run: Run) -> None:
    made({"outside.safetensors": filled(1, "secret")}, ".")
    indexed({"model.safetensors": filled(1, "a")}, b=name)
    code, _, err = run("convert", "d", "-o", "o.pth")
    assert (code, "outside its directory" in err) == (2, True)


def test_an_index_that_is_damaged_is_an_error_even_beside_a_whole_file(run: Run) -> None:
    made({"diffusion_pytorch_model.safetensors": filled(1, "a")})
    Path("d/diffusion_pytorch_model.safetensors.index.json").write_text("{")
    code, out, _ = run("inspect", "d", "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (2, "damaged")


def test_a_pipeline_that_links_to_itself_ends(run: Run) -> None:
    made({})
    Path("d/model_index.json").write_text("{}")
    os.symlink(".", "d/unet")
    made({"x.bin": {}})
    assert run("convert", "d", "-o", "o.pth")[0] == 2
