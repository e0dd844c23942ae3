"""Images in archives; test_mutations.py damages them at random."""

import os
import tarfile
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


def test_folders_that_are_called_as_archives_are(tmp_path):
    """At any depth; an archive below such a folder is one still."""
    (tmp_path / "a.tar/b.zip").mkdir(parents=True)
    (tmp_path / "a.tar/b.zip/1.jpg").write_bytes(b"one")
    with zipfile.ZipFile(tmp_path / "a.tar/b.zip/c.zip", "w") as archive:
        archive.writestr("d.zip/2.jpg", b"two")
    with tarfile.open(tmp_path / "a.tar/t.tar", "w") as archive:
        archive.add(tmp_path / "a.tar/b.zip/1.jpg", "1.jpg")
    with tarfile.open(tmp_path / "a.tar/t.tar") as archive:
        place = archive.getmember("1.jpg").offset_data
    names = {
        "a.tar/b.zip/1.jpg": b"one",
        "a.tar/b.zip/c.zip/d.zip/2.jpg": b"two",
        f"a.tar/t.tar/1.jpg@{place}+3": b"one",
    }
    for name, data in names.items():
        assert archives.read_file(tmp_path, name) == data and archives.has_file(tmp_path, name)
    assert not archives.has_file(tmp_path, "a.tar/b.zip/3.jpg")
    with pytest.raises(InputError, match="a.tar/b.zip/3.jpg: No such file"):
        archives.read_file(tmp_path, "a.tar/b.zip/3.jpg")
    files = [os.path.relpath(archives.file_of(str(tmp_path / name)), tmp_path) for name in names]
    assert files == ["a.tar/b.zip/1.jpg", "a.tar/b.zip/c.zip", "a.tar/t.tar"]


@pytest.mark.parametrize("number", [1000, 6000])
def test_a_zip_of_many_images(tmp_path, number):
    """The directory of a large one is parsed once: to search it for each name took squared time."""
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        for i in range(number):
            archive.writestr(f"folder/{i}.jpg", str(i))
    reader = archives.Zip(tmp_path / "i.zip")
    assert (len(reader.directory) > archives.LARGE) == (number == 6000)
    for i in (0, 1, number // 2, number - 1):
        assert archives.read_file(tmp_path, f"i.zip/folder/{i}.jpg") == str(i).encode()
    with pytest.raises(InputError, match="no item named 'folder/x.jpg'"):
        archives.read_file(tmp_path, "i.zip/folder/x.jpg")
    assert not archives.has_file(tmp_path, "i.zip/1.jpg")  # the end of a name
