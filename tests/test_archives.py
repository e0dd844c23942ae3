"""Images in archives; test_mutations.py damages them at random."""

import zipfile

import pytest

from infra import archives
from utils import InputError


def test_bad_archives_are_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="a.zip/1.jpg: it is no zip"):
        archives.read_file(tmp_path, "a.zip/1.jpg")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("2.jpg", b"x")
    with pytest.raises(InputError, match="b.zip/1.jpg.*no item named"):
        archives.read_file(tmp_path, "b.zip/1.jpg")
    with pytest.raises(InputError, match="c.zip/1.jpg: No such file"):
        archives.read_file(tmp_path, "c.zip/1.jpg")
