"""Paths as people type them and as lists spell them."""

import os
import unicodedata
from pathlib import Path

import pytest

from union_igrot.storage.files import absolute_path, expand_user, find_path, is_web_address


def test_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_user("~/a") == tmp_path / "a"
    assert absolute_path("~/a/../b") == str(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert expand_user("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")
    assert absolute_path("~nobody-of-this-name/a") == os.path.join(tmp_path, "~nobody-of-this-name/a")  # noqa: PTH118


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_letters_composed_or_decomposed_and_backslashes(tmp_path, on_disk, listed):
    folder, file = (unicodedata.normalize(on_disk, name) for name in ("Ausflüge", "café é.jpg"))
    (tmp_path / folder).mkdir()
    (tmp_path / folder / file).touch()
    given = f"{tmp_path}/{unicodedata.normalize(listed, 'Ausflüge')}"
    name = unicodedata.normalize(listed, "café é.jpg")
    for spelling in (f"{given}/{name}", f"{given}\\{name}"):
        assert find_path(spelling) == str(tmp_path / folder / file)
    assert expand_user(f"{given}/{name}") == Path(absolute_path(f"{given}/{name}")) == tmp_path / folder / file
    assert expand_user(f"{given}/ö") == Path(f"{given}/ö")
    assert find_path(f"{given}/other.jpg") == f"{given}/other.jpg"


def test_a_name_with_a_backslash_comes_first(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/b.jpg", "a\\b.jpg"):
        (tmp_path / name).touch()
    assert find_path(f"{tmp_path}/a\\b.jpg") == f"{tmp_path}/a\\b.jpg"
    assert find_path("\0\\ü") == "\0\\ü"


@pytest.mark.slow
def test_web_addresses():
    assert is_web_address("HTTPS://host/a.jpg")
    assert is_web_address("https:/host/a.jpg")  # what pathlib makes of one
    assert not is_web_address("https.d/host/a.jpg")
