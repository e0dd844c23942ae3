"""Strangers' files: archives."""

import zipfile

import pytest

import files
from utils import InputError


def test_bad_archives_are_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="a.zip/1.jpg: it is no zip"):
        files.read_file(tmp_path, "a.zip/1.jpg")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("2.jpg", b"x")
    with pytest.raises(InputError, match="b.zip/1.jpg.*no item named"):
        files.read_file(tmp_path, "b.zip/1.jpg")
    with pytest.raises(InputError, match="c.zip/1.jpg: No such file"):
        files.read_file(tmp_path, "c.zip/1.jpg")
