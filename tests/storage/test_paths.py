"""Names of files as people type them."""

import os
from pathlib import Path

from union_igrot.storage.paths import absolute_path, expand_user


def test_the_home_folder_is_put_in_front(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_user("~/a") == tmp_path / "a"
    assert absolute_path("~/a/../b") == str(tmp_path / "b")


def test_what_is_no_home_folder_stays_as_it_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert expand_user("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")
    assert absolute_path("~nobody-of-this-name/a") == os.path.join(tmp_path, "~nobody-of-this-name/a")  # noqa: PTH118
