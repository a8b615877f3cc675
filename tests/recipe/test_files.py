"""flash_ladder.files: several files that are all written or none, and what damaged ones are read as."""

import errno

import pytest

from flash_ladder import files
from flash_ladder.errors import UserError
from flash_ladder.files import json_of, read_json, replace_files, write_json
from tests.helpers.disk import disk_with


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_all_files_are_written(tmp_path):
    (tmp_path / "a").write_text("old")
    replace_files({tmp_path / "a": "é", tmp_path / "b": ""})
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text(), names(tmp_path)) == ("é", "", ["a", "b"])


def test_or_none_of_them(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    (tmp_path / "folder").mkdir()
    for texts, code in (({"a": "new", "folder": ""}, errno.EISDIR), ({"a": "new", "none/b": ""}, errno.ENOENT)):
        with pytest.raises(OSError) as caught:
            replace_files({tmp_path / name: text for name, text in texts.items()})
        assert (caught.value.errno, caught.value.filename) == (code, str(tmp_path / list(texts)[1]))
        assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a", "folder"]
    with disk_with(bytes_left=100), pytest.raises(OSError, match=r"too large: .*b'$"):
        replace_files({tmp_path / "a": "new", tmp_path / "b": "x" * 101})
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match=r"Permission denied: .*a'$"):
        replace_files({tmp_path / "b": "new", tmp_path / "a": "new"})
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a", "folder"]


def test_a_json_file_that_does_not_fit_leaves_nothing(tmp_path):
    with disk_with(bytes_left=10), pytest.raises(UserError, match=r"x.json cannot be written \(File too large\)"):
        write_json(tmp_path / "x.json", list(range(100)))
    assert names(tmp_path) == []


def test_what_is_nested_too_deeply_is_damaged(tmp_path):
    (tmp_path / "deep").write_text("[" * 10**5)
    with pytest.raises(ValueError):
        json_of("[" * 10**5)
    with pytest.raises(UserError, match=r"cannot be read \(nested too deeply"):
        read_json(tmp_path / "deep")
