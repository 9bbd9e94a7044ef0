"""Paths as text: what is a URL, what is beside it, and what of it is secret."""

from __future__ import annotations

import pytest

from ckptool.io import paths


@pytest.mark.parametrize(
    "path",
    ["https://host/a.pth", "s3://b/a", "memory://a", "zip://a.pth::b.zip", "simplecache::https://h/a", "hf://o/m@v1/a"],
)
def test_what_begins_with_a_scheme_is_a_url(path: str) -> None:
    assert paths.is_url(path)


@pytest.mark.parametrize(
    "path",
    ["a.pth", "C:\\a.pth", "C://a.pth", "pkg.mod:Net", "a/b://c", "x::y", "train.py:f", "", ":", "://a", "a b://c"],
)
def test_all_else_is_a_path_of_this_machine(path: str) -> None:
    assert not paths.is_url(path)
    assert paths.given(path) == path


SPLIT = {
    "https://host/dir/a.pth": ("https://host/dir", "a.pth"),
    "https://host/a.pth": ("https://host", "a.pth"),
    "https://host/dir/a%20b.pth?download=true": ("https://host/dir?download=true", "a b.pth"),
    "https://host/dir/?x=1": ("https://host/dir?x=1", ""),
    "s3://bucket/dir/a?b.pth": ("s3://bucket/dir", "a?b.pth"),
    "s3://bucket/a%20b": ("s3://bucket", "a%20b"),
    "memory://a.pth": ("memory://", "a.pth"),
    "zip://d/a.pth::https://host/x.zip?y": ("zip://d::https://host/x.zip?y", "a.pth"),
    "zip://a.pth::x.zip": ("zip://::x.zip", "a.pth"),
    "hf://org/model@v1/a.bin": ("hf://org/model@v1", "a.bin"),
    "d/a.pth": ("d", "a.pth"),
}


@pytest.mark.parametrize("path", SPLIT)
def test_a_path_is_its_directory_and_its_name(path: str) -> None:
    assert paths.split(path) == SPLIT[path]
    assert paths.join(*SPLIT[path]).replace("+", "%20") == path


def test_names_are_quoted_where_a_url_needs_it() -> None:
    assert paths.join("https://host/d?t", "a b#?%.pth") == "https://host/d/a%20b%23%3F%25.pth?t"
    assert paths.join("s3://b/d", "a b#?%.pth") == "s3://b/d/a b#?%.pth"
    assert paths.basename(paths.join("https://host/d?t", "a b#?%.pth")) == "a b#?%.pth"
    assert paths.relative("zip://d/x/a.pth::b.zip", "zip://d::b.zip") == "x/a.pth"


SECRET = {
    "https://me:p4ss@one.host/a.pth": "https://***@one.host/a.pth",
    "https://tok@en@one.host/a.pth": "https://***2@one.host/a.pth",
    "https://two.host/a.pth?X-Amz-Signature=0&b=1": "https://two.host/a.pth?***",
    "https://two.host/b.pth?sig=other": "https://two.host/b.pth?***2",
    "https://three.host/a?download=true": "https://three.host/a?download=true",
    "zip://a.pth::https://u:p@four.host/x.zip?s=1": "zip://a.pth::https://***@four.host/x.zip?***",
    "hf://model@v1/a.bin": "hf://model@v1/a.bin",
    "s3://bucket/a@b?c": "s3://bucket/a@b?c",
    "s3://id:key@bucket/a?c": "s3://***@bucket/a?c",
    "memory://a@b?c": "memory://a@b?c",
    "sftp://me:p4ss@five.host/a@b": "sftp://***@five.host/a@b",
    "https://six.host/a@b/c.pth": "https://six.host/a@b/c.pth",
    "https://seven.host:8000/a@b.pth": "https://seven.host:8000/a@b.pth",
    "http://me:p4/s#s@eight.host/a.pth": "http://***@eight.host/a.pth",
    "http://me:p4ss@nine.host:99999/a": "http://***@nine.host:99999/a",
    "az://me:p4ss@ten/a?sig=1": "az://***@ten/a?***",
    "anything://me:p4ss@eleven/a?sig=1": "anything://***@eleven/a?***",
}


def test_secrets_are_masked_once_and_come_back_for_who_opens() -> None:
    masked = {url: paths.given(url) for url in SECRET}
    assert masked == SECRET
    for url, mask in masked.items():
        assert paths.given(mask) == mask
        assert paths.given(url) == mask
        assert paths.revealed(mask) == url
    for url in ("HTTPS://me:p4ss@twelve.host/A.pth", "zip://a::HTTPS://me:p4ss@twelve.host/A.pth"):
        assert paths.given(url).endswith("https://***@twelve.host/A.pth")
    beside = paths.join(paths.dirname("https://***@one.host/a.pth"), "b.pth")
    assert paths.revealed(beside) == "https://me:p4ss@one.host/b.pth"
    assert "p4ss" not in paths.scrubbed("no route to me:p4ss@one.host (p4ss)")
    assert paths.revealed("https://***@never.host/a?***") == "https://***@never.host/a?***"
