"""Which URLs are taken, and what for."""

import pytest

from pyint8.errors import OptionError
from pyint8.remote.urls import RemotePath, is_plain_name, is_url, parsed, refuse_url


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("s3://bucket/folder", "s3://bucket/folder", None),
        ("S3://bucket/a/b///", "s3://bucket/a/b", None),
        ("gs://bucket", "gs://bucket", None),
        ("az://container/a", "az://container/a", None),
        ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a", None),
        ("https://host:8000/m/model.safetensors", "https://host:8000/m", "model.safetensors"),
        ("s3://b/m/model.safetensors.index.json", "s3://b/m", "model.safetensors.index.json"),
        ("s3://model.safetensors", "s3://model.safetensors", None),
    ],
)
def test_what_is_meant(url: str, folder: str, name: str | None) -> None:
    assert is_url(url)
    assert parsed(url) == RemotePath(folder, name)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/a", "reads nothing from ftp://, there are s3://"),
        ("file:///a/b", "give the path alone"),
        ("hf://org/model", "give the hub id alone"),
        ("https://user:secret@host/a", "password"),
        ("https://host/a?sig=secret", "query"),
        ("s3://bucket/a#b", "fragment"),
        ("s3://bucket/a b", "blanks"),
        ("s3://bucket/a\n", "blanks"),
        ("s3://bucket/../a", "give the URL of a folder"),
        ("s3://bucket//a", "give the URL of a folder"),
        ("s3://", "give the URL of a folder"),
    ],
)
def test_what_is_refused(url: str, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        parsed(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["a/b", "/a/b", "org/model", "C:\\a", "s3:/a", "", "1s3://a", "a b://c"])
def test_what_is_no_url(path: str) -> None:
    assert not is_url(path)
    refuse_url("folder", path)


def test_where_a_folder_is_needed_a_url_is_refused() -> None:
    with pytest.raises(OptionError, match="cache is s3://a/b, which is no folder here"):
        refuse_url("cache", "s3://a/b")


@pytest.mark.parametrize(
    ("url", "title"),
    [("s3://b/Llama-3.1-8B", "Llama-3.1-8B"), ("s3://b/a%20b", "a_20b"), ("s3://b/...", "model"), ("s3://ö", "ö")],
)
def test_the_name_of_the_folder_here(url: str, title: str) -> None:
    assert parsed(url).title == title


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "a\0b", "a" * 256])
def test_names_that_leave_their_folder(name: str) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")
